"""Command lines, PARAMS and YAML of any kind: accepted, or one line and status 2; no secret shown.

Some are sound, some have one thing wrong, some are made of pieces at random: what lies behind the
first check is reached too. Derandomized: every run tries the same ones. ``make soak`` tries more.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.parameters import (
    check_parameters,
    parameter_defaults,
    parse_parameters,
    split_stage,
)
from trainer import evaluate, export_hf, prepare_tokens, resize_reset
from trainer.runtime.commands import run_command
from trainer.runtime.log import log, set_up_logging
from trainer.settings.config import REQUIRED, SETTINGS
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.layers import resolve, settings_from_yaml
from trainer.settings.values import TYPES
from trainer.training.run import check_before_reading

SECRET = "CorrectHorseBatteryStaple"
"""No word that anything here prints."""

counts: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def _report() -> Iterator[None]:
    yield
    print(f"\ncommand lines: {dict(counts)}")


def entrypoint(argv: list[str]) -> None:
    """Of `trainer.entrypoint`, what comes before anything is read."""
    args = build_parser("python -m trainer.entrypoint", "").parse_args(argv)
    set_up_logging()
    config_file = settings_from_yaml(args.config) if "config" in args else {}
    resolved = resolve(settings_from_args(args), config_file)
    check_before_reading(resolved)
    for line in resolved.lines():
        assert SECRET not in line or "hf_token_value" not in line


def door(flags: list[str]) -> Callable[[list[str]], None]:
    def parse(argv: list[str]) -> None:
        parser = build_parser("python -m trainer.x", "", only=flags)
        parser.add_argument("output")
        parser.add_argument("--tokenizer", default=None)
        args = parser.parse_args(argv)
        resolve(settings_from_args(args), {}).config  # noqa: B018 - checks the values

    return parse


FLAGS = {
    "entrypoint": sorted(SETTINGS),
    "evaluate": evaluate.FLAGS,
    "export_hf": export_hf.FLAGS,
    "resize_reset": resize_reset.FLAGS,
    "prepare_tokens": prepare_tokens.FLAGS,
}
DOORS = {name: entrypoint if name == "entrypoint" else door(flags) for name, flags in FLAGS.items()}


def check(command: Callable[[list[str]], None], argv: list[str], *, secret: bool = False) -> int:
    """Run it; the promise. Returns its status."""
    errors, output = io.StringIO(), io.StringIO()
    log.handlers.clear()  # of the stderr before
    with redirect_stderr(errors), redirect_stdout(output):
        try:
            status = run_command(command, argv)
        except SystemExit as end:  # --help
            status = int(end.code or 0)
    counts[f"status {status}"] += 1
    said = errors.getvalue()
    assert status in (0, 2), (argv, said)
    assert "Traceback" not in said, argv
    if status == 2:
        (line,) = said.splitlines()
        assert json.loads(line)["severity"] == "ERROR"
    if secret:
        assert SECRET not in said + output.getvalue(), (argv, said)
    return status


VALUES = """
-1 0 1e300 -1e300 nan inf 1_000 ١٢ 0x10 true auto 0:0.7,400:0.5 0:, , : 0:nan 5:1,0:2 gs:// gs://a/..
~ ~x/y $(date $(touch) {} 512,1024 0.9,0.95 projects/p/secrets/s
""".split()
anything = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.integers(min_value=10**30, max_value=10**40).map(str),
    st.floats().map(str),
    st.sampled_from(VALUES),
    st.sampled_from(["", "\x00", "a\x00b", "\ud800", "\n", "$(date +%Y)", "0.9 0.95", "9" * 5000]),
)
names = st.one_of(st.sampled_from(sorted(SETTINGS)), st.text(max_size=12))


@st.composite
def mistyped(draw: st.DrawFn, name: str) -> str:
    """A name with up to two letters left out, doubled, swapped, replaced or of another case."""
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(1, max(1, len(name) - 2)))
        name = draw(
            st.sampled_from(
                [
                    name[:at] + name[at + 1 :],
                    name[:at] + name[at : at + 1] + name[at:],
                    name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :],
                    name[:at] + draw(st.sampled_from("abcxyz_-")) + name[at + 1 :],
                    name.upper(),
                    name.replace("_", "-"),
                    name.title(),
                ]
            )
        )
    return name


@st.composite
def words(draw: st.DrawFn) -> list[str]:
    name = draw(st.one_of(names, st.sampled_from(sorted(SETTINGS)).flatmap(mistyped)))
    dashes = draw(st.sampled_from(["--", "--", "--", "-", "", "---", "–"]))
    value = draw(anything)
    form = draw(st.sampled_from(["=", "=", " ", "none", "glued"]))
    if form == " ":
        return [dashes + name, value]
    return [dashes + name + {"=": f"={value}", "none": "", "glued": value}[form]]


@st.composite
def secret_words(draw: st.DrawFn) -> list[str]:
    """The secret beside a name that is a secret's, or resembles one."""
    name = draw(
        st.one_of(
            st.just("hf_token_value").flatmap(mistyped),
            st.sampled_from(["hf_token", "token", "secret", "password", "api_key", "hf_secret"]),
            st.sampled_from(["access_token", "HF_TOKEN", "Token", "hf_token_valeu", "htoken"]),
        )
    )
    dashes = draw(st.sampled_from(["--", "--", "-", "---", "", "—", "––"]))
    value = draw(st.sampled_from([SECRET, f"hf_{SECRET}", f"'{SECRET}'", f"{SECRET}=="]))
    forms = ["=", "= ", ":"] + ["glued", " "] * dashes.startswith("-")
    form = draw(st.sampled_from(forms))
    if form == " ":
        return [dashes + name, value]
    return [f"{dashes}{name}{'' if form == 'glued' else form}{value}"]


# ── what is accepted

SOUND: dict[str, st.SearchStrategy[str]] = {
    "alpha": st.floats(0, 1).map(str),
    "T": st.floats(0.1, 1000).map(str),
    "alpha_schedule": st.sampled_from(
        ["", "0:0.7", "0:0.7,400:0.5,800:0.3", " 5:1 , 9:.5 ", "1:0"]
    ),
    "temp_schedule": st.sampled_from(["", "0:1.2", "0:1.2,800:1.0", "7:1e1"]),
    "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map("{0[0]},{0[1]}".format),
    "eval_ctx_lens": st.lists(st.integers(1, 4096), min_size=1).map(
        lambda n: ",".join(map(str, n))
    ),
    "d_model": st.integers(1, 64).map(lambda number: str(64 * number)),
    "n_heads": st.sampled_from("1 2 4 8 16 32".split()),
    "micro_batch": st.integers(1, 64).map(str) | st.just("auto"),
    "hf_secret_name": st.sampled_from(["projects/p/secrets/s", "projects/p/secrets/s/versions/2"]),
    "output_gcs_uri": st.sampled_from(["gs://b/run", "/tmp/x", "a/b", "gs://b/$(date +%Y%m%d)"]),
    "seed": st.integers(0, 2**64 - 1).map(str),
}
"""Values by setting, where the type alone does not tell them."""


def sound_value(name: str) -> st.SearchStrategy[str]:
    spec, kind = SETTINGS[name], str(TYPES[name])
    if name in SOUND:
        return SOUND[name]
    if choices := spec.metadata["choices"]:
        return st.sampled_from(choices)
    if "bool" in kind:
        return st.sampled_from(["true", "1", "yes", "On", "false", "0", "no", "off"])
    if "int" in kind:
        return st.integers(1, 10_000).map(str)
    if "float" in kind:
        return st.floats(1e-6, 0.9).map(str)
    return st.sampled_from(["gpt2", "a/b", "./x", "two words", "größe", "x" * 300])


@st.composite
def sound_settings(draw: st.DrawFn, flags: list[str], needed: tuple[str, ...]) -> dict[str, str]:
    """Settings that go together."""
    optional = sorted({*flags} - {"config", "hf_token_value", *needed})
    chosen = draw(st.lists(st.sampled_from(optional), unique=True, max_size=6))
    values = {name: draw(sound_value(name)) for name in draw(st.permutations([*needed, *chosen]))}
    if "rope_scale" in values:
        values["pos_embedding"] = "rotary"
    if "d_model" in values or ("n_heads" in values and "n_layers" in flags):
        values |= {name: draw(SOUND[name]) for name in ("d_model", "n_heads")}
    for name in [name for name in ("fp32", "fp16", "bf16") if name in values][1:]:
        del values[name]
    if "shard_teacher" in values:
        values.pop("teacher_precision", None)
    return values


@st.composite
def sound_lines(draw: st.DrawFn, door: str) -> list[str]:
    needed = REQUIRED if door == "entrypoint" else ()
    found = draw(sound_settings(FLAGS[door], needed))
    line = ["out"] if door != "entrypoint" else []
    for name, value in found.items():
        apart = draw(st.booleans()) and value and name != "betas"
        line += [f"--{name}", value] if apart else [f"--{name}={value}"]
    return line


@st.composite
def spoilt_lines(draw: st.DrawFn, door: str) -> list[str]:
    """Sound but for one thing."""
    line = draw(sound_lines(door))
    at = draw(st.integers(0, len(line)))
    if draw(st.booleans()) and at < len(line):
        name, sign, _ = line[at].partition("=")
        return [*line[:at], f"{name}{sign}{draw(anything)}", *line[at + 1 :]]
    return [*line[:at], *draw(words()), *line[at:]]


wild_lines = st.lists(words(), max_size=6).map(
    lambda parts: [word for part in parts for word in part]
)


def lines(door: str) -> st.SearchStrategy[list[str]]:
    return st.one_of(sound_lines(door), spoilt_lines(door), wild_lines)


def sound_parameters() -> st.SearchStrategy[str]:
    """``PARAMS`` that are accepted."""
    seen = {"temperature": "T", "best_metric": "save_best_on"}
    kept = ("resume_gcs_uri", "grad_accum", "micro_batch", "eval_ctx_lens", "best_metric")
    pairs = []
    for name, default in parameter_defaults().items():
        _, rest = split_stage(name)
        if rest == "more_settings":
            value = st.sampled_from(
                ["{}", '{"dropout": 0.1}'] if "evaluate" not in name else ["{}"]
            )
        elif rest in kept or (rest not in SETTINGS and rest not in seen):
            value = st.just(str(default))
        else:
            value = sound_value(seen.get(rest, rest))
        pairs.append(value.map(lambda text, name=name: shlex.quote(f"{name}={text}")))
    return st.lists(st.one_of(*pairs), max_size=4).map(" ".join)


SOAK = pytest.param("soak", marks=pytest.mark.soak)


def trying(test: Callable[[Any], int], strategy: st.SearchStrategy[Any], length: str) -> None:
    """Try cases, of which the program accepts a good part and refuses another."""
    seen: Counter[int] = Counter()

    def once(case: Any) -> None:
        seen[test(case)] += 1

    settings(
        max_examples=100 if length == "short" else 20_000,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(once))()
    # Few cases may by chance hold few of a kind
    assert min(seen[0], seen[2]) > (0 if length == "short" else seen.total() / 8), seen


@pytest.mark.parametrize("length", ["short", SOAK])
@pytest.mark.parametrize("name", sorted(DOORS))
def test_any_command_line(name: str, length: str) -> None:
    trying(lambda argv: check(DOORS[name], argv), lines(name), length)


@pytest.mark.parametrize("length", ["short", SOAK])
@pytest.mark.parametrize("name", sorted(DOORS))
def test_no_secret_is_shown(name: str, length: str) -> None:
    given_well = st.sampled_from([["--hf_token_value", SECRET], [f"--hf_token_value={SECRET}"]])
    sound = st.tuples(
        sound_lines(name), given_well if "hf_token_value" in FLAGS[name] else st.just([])
    )
    mistaken = st.tuples(wild_lines, secret_words(), wild_lines)
    nearly = st.tuples(sound_lines(name), secret_words())
    around = st.one_of(sound, nearly, mistaken).map(
        lambda parts: [word for part in parts for word in part]
    )
    trying(lambda argv: check(DOORS[name], argv, secret=True), around, length)


@pytest.mark.parametrize("length", ["short", SOAK])
def test_any_parameters(length: str) -> None:
    """``PARAMS`` of a pipeline."""

    def check_text(text: str) -> int:
        def command(argv: list[str]) -> None:
            check_parameters(parse_parameters(argv[0]))

        return check(command, [text], secret=True)

    name = st.one_of(st.sampled_from(sorted(parameter_defaults())), st.text(max_size=8))
    pair = st.tuples(name, st.sampled_from(["=", " = ", ""]), anything).map("".join)
    secret = st.one_of(
        secret_words().map(" ".join),
        st.sampled_from(["anneal", "continue"]).map(
            lambda stage: f'{stage}_more_settings=\'{{"hf_token_value": "{SECRET}"\''
        ),
        st.just(f"hf_token_value={SECRET} 'open"),
    )
    wild = st.lists(st.one_of(pair, secret), max_size=4).map(" ".join)
    spoilt = st.tuples(sound_parameters(), st.one_of(pair, secret)).map(" ".join)
    trying(check_text, st.one_of(sound_parameters(), spoilt, wild), length)


@pytest.mark.parametrize("length", ["short", SOAK])
def test_any_settings_file(length: str, tmp_path: Path) -> None:
    """A ``--config`` with names and values of all kinds; the secret's own value is never shown."""
    path = tmp_path / "run.yaml"

    def check_text(text: str) -> int:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        return check(entrypoint, [f"--config={path}"], secret=True)

    value = anything.filter(lambda text: "\ud800" not in text)
    pair = st.tuples(st.one_of(names, st.just("lr")), st.sampled_from([": ", ":", " "]), value)
    secret = secret_words().map(lambda parts: parts[0].lstrip("-").replace("=", ": "))
    line = st.one_of(pair.map("".join), secret)
    sound = sound_settings(FLAGS["entrypoint"], REQUIRED).map(
        lambda found: "\n".join(f"{name}: {json.dumps(text)}" for name, text in found.items())
    )
    spoilt = st.tuples(sound, line).map("\n".join)
    wild = st.lists(line, max_size=5).map("\n".join)
    trying(check_text, st.one_of(sound, spoilt, wild), length)


@pytest.mark.parametrize(
    "argv",
    [
        [f"-hf_token_value={SECRET}"],
        [f"--hf_token_value{SECRET}"],
        ["--hf_token_valu", SECRET],
        [f"hf_token_value={SECRET}"],
        ["out", "x", f"hf_token_value:{SECRET}"],
        ["out", "x", f"—hf_token_value={SECRET}"],
        ["out", "x", f"--output_gcs_uri=https://me:{SECRET}@host/x"],
        [f"--block_size=hf_{SECRET}"],
        ["--alpha", "0.5", "--hf_token_value", "x", SECRET],
    ],
)
@pytest.mark.parametrize("name", ["entrypoint", "export_hf", "pick_best"])
def test_whole_processes(name: str, argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"trainer.{name}", *argv],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["severity"] == "ERROR"
    assert SECRET not in done.stderr + done.stdout
