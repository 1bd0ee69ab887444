"""Code that `torch.compile` and Triton have made, as one block of bytes for another process.

torch keeps the graphs that it has compiled as one portable block; of kernels that are launched
without it, such as the loss's, Triton keeps files. Both go into one: a line of JSON that says what
the code was made by and for, then a zip archive that the line has the checksum of.

The content is code: torch unpickles it, and the GPU runs it. Whoever calls `use` vouches for it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIMIT = 1 << 30
"""Bytes of such a file, and of what its archive holds; that of a run has some ten million."""

_FORMAT = 1
_HEADER = 4096
"""Bytes of the first line at most."""

_TORCH = "torch"
_KERNEL = re.compile(r"triton/([A-Z2-7]{16,128})/([\w.-]{1,200})")
"""A file of Triton's cache: the hash of what it was made of, and its name."""
_GROUP = "__grp__"
"""Starts the name of a file that lists the paths of the others."""
_INDUCTOR = "triton_"
"""Starts the names of kernels that `torch.compile` writes, which are in torch's own block."""

_used: set[Path] = set()
"""The directories of Triton's cache that this process has used: one for each hash."""


class UnusableError(Exception):
    """Why code from elsewhere is not used."""


def use(data: bytes, device: torch.device) -> frozenset[str]:
    """Put code where torch and Triton look for it; returns the names of Triton's files.

    Raises:
        UnusableError: it is damaged, or was made by or for something else.
        OSError: it cannot be written there.
    """
    parts = _unpacked(data, _made_by(device))
    block = parts.pop(_TORCH, b"")
    # It says in several lines what the caller says in one
    logging.getLogger("torch.compiler._cache").disabled = True
    try:
        readable = torch.compiler.load_cache_artifacts(block) is not None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - torch's own checks raise many kinds
        raise UnusableError(f"torch cannot read it ({type(error).__name__})") from None
    if not readable:
        raise UnusableError("torch cannot read it")
    _write_kernels(parts)
    return frozenset(parts)


def collect(device: torch.device, known: frozenset[str] | None) -> Callable[[], bytes] | None:
    """What makes the bytes of all code that this process has used; None where that is known.

    Args:
        device: that the code is for.
        known: what `use` gave for a file that need not be made again; None where there is none.
    """
    kernels = dict(_kernels())
    if known is not None and kernels.keys() <= known and not _graphs_compiled():
        return None
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return None
    block, made_by = saved[0], _made_by(device)
    return lambda: _packed(block, kernels, made_by)


def _graphs_compiled() -> bool:
    """Whether torch has compiled a graph in this process, rather than found it."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"] > 0


# ── the file ──────────────────────────────────────────────────────────────────────────────────


def _made_by(device: torch.device) -> dict[str, str | int]:
    """What compiled code depends on beside its sources; a file of anything else is of no use."""
    gpu = device.type == "cuda"
    return {
        "compile_cache": _FORMAT,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": str(torch.version.cuda or torch.version.hip or ""),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}",
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
    }


@cache
def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _packed(block: bytes, kernels: dict[str, Path], made_by: dict[str, str | int]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr(_TORCH, block)
        for name, path in kernels.items():
            file.write(path, name)
    payload = archive.getvalue()
    header = made_by | {"sha256": hashlib.sha256(payload).hexdigest()}
    return json.dumps(header).encode() + b"\n" + payload


def _unpacked(data: bytes, made_by: dict[str, str | int]) -> dict[str, bytes]:
    """The parts of a file, checked."""
    line, newline, payload = data[:_HEADER].partition(b"\n")
    try:
        header = json.loads(line)
        digest = header.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UnusableError("it is no file of compiled code") from None
    for key, ours in made_by.items():
        if header.get(key) != ours:
            theirs = str(header.get(key))[:60]
            raise UnusableError(f"it was made with {key} {theirs!r}, and here is {ours!r}")
    payload = data[len(line) + len(newline) :]
    if hashlib.sha256(payload).hexdigest() != digest:
        raise UnusableError("it is damaged or cut short")
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > LIMIT:
                raise UnusableError(f"it holds more than {LIMIT} bytes")
            for member in members:
                if member.filename != _TORCH and not _KERNEL.fullmatch(member.filename):
                    raise UnusableError(f"it holds {member.filename[:60]!r}")
            return {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError):
        raise UnusableError("its archive is damaged") from None


# ── Triton's part ─────────────────────────────────────────────────────────────────────────────


@cache
def watch_triton(device: torch.device) -> None:
    """Let all of Triton's files be in one place, and take note of those that are used."""
    try:
        import triton
        from triton.runtime.cache import FileCacheManager
    except ImportError:
        return
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    # torch sets it too, but only after the first kernels have been launched without it
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))

    class Noting(FileCacheManager):
        """Triton's own, which also says what was asked for."""

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override=override, dump=dump)
            if not (override or dump):
                _used.add(Path(self.cache_dir))

    if triton.knobs.cache.manager_class is None:
        triton.knobs.cache.manager_class = Noting


def _kernels() -> Iterator[tuple[str, Path]]:
    """Names in the archive and paths of the files that this process has used."""
    for directory in sorted(_used):
        files = sorted(path for path in directory.iterdir() if path.is_file())
        names = [path.name.removeprefix(_GROUP) for path in files]
        if any(name.startswith(_INDUCTOR) for name in names):
            continue
        for path in files:
            name = f"triton/{directory.name}/{path.name}"
            if _KERNEL.fullmatch(name):
                yield name, path


def _write_kernels(files: dict[str, bytes]) -> None:
    """Put files into Triton's cache, where they are not there yet."""
    root = os.environ.get("TRITON_CACHE_DIR")
    if root is None:
        return
    for name, content in files.items():
        match = _KERNEL.fullmatch(name)
        assert match is not None, "the archive was checked"
        path = Path(root, match[1], match[2])
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.startswith(_GROUP):
            content = _group_here(content, path.parent)
        made = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        made.write_bytes(content)
        made.replace(path)


def _group_here(content: bytes, directory: Path) -> bytes:
    """A list of paths, with those files in a directory of this machine."""
    try:
        paths = json.loads(content)["child_paths"]
        here = {name: str(directory / Path(path).name) for name, path in paths.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return content
    return json.dumps({"child_paths": here}).encode()
