"""Any user id, without a home directory, an entry in /etc/passwd or a right beyond reading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.checkpoints.snapshots import read_from
from trainer.runtime.log import FORMAT

UID = 12345

# Python and the packages may lie where only root may look
ANY_USER = (
    *("setpriv", f"--reuid={UID}", "--regid=0", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become any user")

LIBRARIES = """
import getpass, json, os, sys
from trainer.runtime.commands import run_command

def command(argv):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from huggingface_hub.constants import HF_HOME
    home = os.path.expanduser("~")
    print(json.dumps([getpass.getuser(), home, default_cache_dir(), HF_HOME]))

sys.exit(run_command(command))
"""


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with a directory for temporary files, and no other."""
    (tmp_path / "home").mkdir(mode=0o755)
    (tmp_path / "tmp").mkdir()
    os.chown(tmp_path / "tmp", UID, 0)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", FORMAT)}
    return kept | {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ANY_USER, sys.executable, *argv],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        timeout=300,
    )


@needs_root
@pytest.mark.parametrize("home", ["unwritable", "missing", "unset"])
def test_libraries_find_a_place_for_their_caches(home: str, places: dict[str, str]) -> None:
    if home == "unset":
        del places["HOME"]
    elif home == "missing":
        places["HOME"] += "/nobody"
    done = run(places, "-c", LIBRARIES)
    assert done.returncode == 0, done.stderr
    user, found, inductor, hub = json.loads(done.stdout)
    assert user == f"uid-{UID}"
    assert found == f"{places['TMPDIR']}/liquid-home-{UID}"
    assert Path(found).stat().st_mode & 0o777 == 0o700
    assert inductor.startswith(places["TMPDIR"])
    assert hub.startswith(found)


@needs_root
def test_a_home_that_others_may_write_is_not_used(places: dict[str, str]) -> None:
    prepared = Path(places["TMPDIR"], f"liquid-home-{UID}")
    for mode, owner in ((0o777, UID), (0o700, 54321)):
        prepared.mkdir()
        os.chown(prepared, owner, 0)
        prepared.chmod(mode)
        done = run(places, "-c", LIBRARIES)
        assert done.returncode == 0, done.stderr
        assert Path(json.loads(done.stdout)[1]) != prepared
        prepared.rmdir()


@needs_root
def test_no_place_at_all_is_one_line(places: dict[str, str]) -> None:
    script = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc']\n" + LIBRARIES
    done = run(places, "-c", script)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "mount one and name it by TMPDIR" in json.loads(line)["message"]


def test_a_user_with_a_home_keeps_it(places: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES], capture_output=True, text=True, env=places, timeout=300
    )
    assert json.loads(done.stdout)[1] == places["HOME"]


@needs_root
def test_a_training_with_default_places(
    places: dict[str, str], settings: dict[str, object], tmp_path: Path
) -> None:
    defaults = ("cache_dir", "local_workdir")
    flags = [f"--{name}={value}" for name, value in settings.items() if name not in defaults]
    done = run(places, "-m", "trainer.entrypoint", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    temporary = Path(places["TMPDIR"])
    assert list(temporary.glob("liquid-home-*/.cache/liquid_annealing/tokens/*"))
    assert read_from(str(temporary / "liquid_work" / "final.pt"), tmp_path).step == 6
    assert list((temporary / "liquid_work" / "tensorboard").iterdir())
    assert list((tmp_path / "home").iterdir()) == []
