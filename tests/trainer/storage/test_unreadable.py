"""What may not be read is told as that: not as missing, and not as damaged.

The readers run without root's right to read everything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.trainer.samples import save_student

UNPRIVILEGED = (
    ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
)
"""A user who owns files and may not read them is refused; root is, without these capabilities."""

READERS = """
    import sys
    from pathlib import Path
    import torch
    from trainer import pick_best
    from trainer.checkpoints.snapshots import read_from
    from trainer.data.corpus import load_corpus
    from trainer.data.streams import open_streams
    from trainer.models.hugging_face import load_tokenizer
    from trainer.models.teacher import load_teacher, read_teacher_spec, teacher_digest
    from trainer.runtime.errors import LiquidError
    from trainer.settings.config import TrainConfig
    from trainer.settings.hf_token import find_hf_token
    from trainer.settings.layers import settings_from_yaml
    from trainer.targets.shards import read_index

    at = Path(sys.argv[1])
    def path(name): return str(at / name)
    def corpus(name): return lambda: load_corpus(
        TrainConfig(dataset_name=path(name), cache_dir=path("cache")))
    def teacher():
        spec = read_teacher_spec(path("teacher"))
        load_teacher(spec, dtype=torch.float32, device=torch.device("cpu"))
    readers = {
        "teacher/config.json": teacher,
        "teacher/model.safetensors": teacher,
        "teacher/tokenizer.json": lambda: load_tokenizer(path("teacher")),
        "corpus/train.jsonl": corpus("corpus"),
        "text.txt": corpus("text.txt"),
        "tokens/tokens.json": lambda: open_streams(at / "tokens"),
        "tokens/train.bin": lambda: open_streams(at / "tokens"),
        "targets/targets.json": lambda: read_index(path("targets")),
        "run/best.pt": lambda: read_from(path("run/best.pt"), at / "work"),
        "run/best.pt.meta.json": lambda: pick_best.run([path("run")], "val_loss_student"),
        "settings.yaml": lambda: settings_from_yaml(path("settings.yaml")),
        "token": lambda: find_hf_token(TrainConfig(hf_token_file=path("token")), {}),
    }
    def attempt(name, changed):
        mode = changed.stat().st_mode
        changed.chmod(0)
        try:
            readers[name]()
            print(f"{name}: accepted")
        except LiquidError as error:
            print(f"{name}: {error}")
        finally:
            changed.chmod(mode)
    attempt("teacher/config.json", at / "teacher/config.json")
    for name in readers:
        attempt(name, at / name)
        if "/" in name:
            attempt(name, (at / name).parent)
    attempt("text.txt", at)
    """


def test_every_reader_says_that_permission_is_denied(
    teacher_dir: Path, tokens_dir: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    for name, source in (
        ("teacher", teacher_dir),
        ("tokens", tokens_dir),
        ("corpus", tokens_dir.parent / "small-corpus"),
    ):
        shutil.copytree(source, place / name)
    for name in ("run", "targets"):
        (place / name).mkdir()
    save_student(place / "run" / "best.pt")
    for name in ("text.txt", "settings.yaml", "token", "targets/targets.json"):
        (place / name).write_text("seed: 1")
    done = subprocess.run(
        [*UNPRIVILEGED, sys.executable, "-c", textwrap.dedent(READERS), str(place)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 23
    for line in lines:
        assert "ermission denied" in line, line
        assert "o such" not in line
