from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from trainer.runtime.errors import UsageError
from trainer.settings.accumulation import accumulation
from trainer.settings.config import SETTINGS, TrainConfig, check_shapes
from trainer.settings.dates import expand_dates
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.layers import resolve, settings_from_yaml
from trainer.settings.values import parse_value

ANNEALING = (
    "alpha T alpha_schedule temp_schedule eval_ctx_lens reset_optim_on_ctx_change grad_accum"
    " lr_peak rope_scale"
).split()
BASE = (
    "resume_gcs_uri block_size teacher_name dataset_name dataset_config output_gcs_uri"
    " local_workdir config seed global_batch micro_batch lr weight_decay betas eps warmup_steps"
    " train_steps eval_every save_every log_interval fp16 bf16 d_model n_layers n_heads dropout"
    " hf_token_value hf_token_file hf_token_gcs_uri hf_secret_name"
).split()
LATER = "teacher_precision kd_scheme save_best_on pos_embedding pos_resize".split()


def parse(*argv: str) -> dict[str, object]:
    return settings_from_args(build_parser("test", "").parse_args(list(argv)))


def test_help_lists_every_flag_with_its_default() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "trainer.entrypoint", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in [*ANNEALING, *BASE, *LATER, *SETTINGS]:
        assert f"--{name} " in text, name
    for shown in ("[0.5]", "[10000]", "[0.9 0.95]", "[/tmp/liquid_work]", "[0.0003]"):
        assert shown in text


def test_defaults_are_the_designs() -> None:
    config = TrainConfig()
    expected = {
        "alpha": 0.5,
        "T": 1.0,
        "seed": 42,
        "global_batch": 64,
        "micro_batch": 8,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "warmup_steps": 2000,
        "train_steps": 10000,
        "eval_every": 500,
        "save_every": 1000,
        "log_interval": 50,
        "d_model": 768,
        "n_layers": 10,
        "n_heads": 12,
        "dropout": 0.0,
        "local_workdir": "/tmp/liquid_work",
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_both_forms_of_a_flag_and_both_of_a_switch() -> None:
    first = parse("--alpha=0.6", "--betas", "0.8", "0.9", "--reset_optim_on_ctx_change", "--T=2")
    other = parse(
        "--alpha", "0.6", "--betas=0.8,0.9", "--reset_optim_on_ctx_change=true", "--T", "2"
    )
    assert first == other
    assert first == {
        "alpha": 0.6,
        "betas": (0.8, 0.9),
        "reset_optim_on_ctx_change": True,
        "T": 2.0,
    }
    assert parse("--bf16=false") == {"bf16": False}


def test_precedence_and_its_record() -> None:
    resolved = resolve(
        {"alpha": 0.1}, {"alpha": 0.2, "seed": 7}, {"alpha": 0.3, "seed": 8, "lr": 1e-3}
    )
    config = resolved.config
    assert (config.alpha, config.seed, config.lr, config.T) == (0.1, 7, 1e-3, 1.0)
    lines = list(resolved.lines())
    assert "alpha = 0.1 (command line)" in lines
    assert "seed = 7 (--config)" in lines
    assert "lr = 0.001 (checkpoint)" in lines
    assert "T = 1.0 (default)" in lines
    assert len(lines) == len(SETTINGS)
    default = SETTINGS["micro_batch"].default
    differing = list(resolve({"alpha": 0.1, "micro_batch": default}, {"seed": 7}).differing_lines())
    assert sorted(differing) == ["alpha = 0.1 (command line)", "seed = 7 (--config)"]


def test_a_given_rival_beats_what_a_lower_layer_says() -> None:
    metadata = {"grad_accum": 16, "lr_peak": 2.7e-4}
    resolved = resolve({"global_batch": 32, "lr": 1e-3}, {}, metadata)
    assert accumulation(resolved, 1) == 4
    assert resolved.config.peak_lr == 1e-3
    assert accumulation(resolve({}, {}, metadata), 1) == 16


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [({}, 1, 8), ({"micro_batch": 4}, 2, 8), ({"grad_accum": 2}, 1, 2), ({}, 8, 1)],
)
def test_accumulation(given: dict[str, int], world: int, expected: int) -> None:
    assert accumulation(resolve(given, {}), world) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"micro_batch": 7}, "--global_batch=64 is not divisible by micro_batch 7 x 1 process"),
        ({"grad_accum": 2, "global_batch": 64}, "is 16 windows per update, but --global_batch=64"),
    ],
)
def test_batch_sizes_that_do_not_fit(given: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        accumulation(resolve(given, {}), 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--alpha=1.2"], "--alpha=1.2 must be between 0 and 1"),
        (["--alpha=nan"], "--alpha=nan must be between 0 and 1"),
        (["--T=0"], "--T=0 must be above 0"),
        (["--T=-1"], "--T=-1 must be above 0"),
        (["--alpha_schedule=0:0.5,9:1.5"], "the value 1.5 must be between 0 and 1"),
        (["--temp_schedule=0:0"], "the value 0 must be above 0"),
        (["--eval_ctx_lens=512,0"], "'0' is not a positive whole number of tokens"),
        (["--eval_ctx_lens=512,-1"], "'-1' is not a positive whole number"),
        (["--eval_ctx_lens=5.5"], "'5.5' is not a positive whole number"),
        (["--eval_ctx_lens="], "'' is not a positive whole number"),
        (["--block_size=0"], "--block_size=0 must be at least 1"),
        (["--block_size=abc"], "--block_size='abc': a whole number is needed"),
        (["--lr=fast"], "--lr='fast': a number is needed"),
        (["--lr=0"], "--lr=0 must be above 0"),
        (["--d_model=100", "--n_heads=12"], "--d_model=100 is not divisible by --n_heads=12"),
        (["--fp16", "--bf16"], "--fp16 and --bf16 exclude each other"),
        (["--kd_scheme=forward"], "did you mean forward_kl?"),
        (["--betas", "0.9"], "two numbers are needed"),
        (["--betas", "0.9", "1.0"], "below 1"),
        (["--train_steps=-1"], "--train_steps=-1 must be at least 0"),
        (["--save_every=0"], "--save_every=0 must be at least 1 updates"),
        (["--bf16=maybe"], "--bf16='maybe': true or false is needed"),
        (["--alfa=0.5"], "unknown flag --alfa; did you mean --alpha?"),
        (["0.5"], "unexpected argument '0.5'"),
        (["--seed=18446744073709551616"], "must be at most 18446744073709551615"),
        (["--warmup_steps=1" + "0" * 400], "must be at most 2147483647 updates"),
        (["--T=1e308"], "must be above 0 and at most 1000"),
        (["--eval_ctx_lens=32,9999999999999"], "'9999999999999' is not a positive whole number"),
        (["--lr=inf"], "--lr=inf must be above 0 and finite"),
        (["--lr=1e300"], "--lr=1e+300 must be above 0 and finite, from 1e-30 to 1e+18"),
        (["--lr=nan"], "--lr=nan must be above 0 and finite"),
        (["--lr_peak=1e39"], "--lr_peak=1e+39 must be above 0 and finite"),
        (["--eps=1e-60"], "--eps=1e-60 must be above 0 and finite, from 1e-30"),
        (["--weight_decay=1e39"], "--weight_decay=1e+39 must be a number from 0 on, up to 1e+18"),
        (["--grad_clip=1e-300"], "--grad_clip=1e-300 must be above 0 and finite"),
        (["--rope_scale=1e-300"], "--rope_scale=1e-300 must be above 0, from 1e-06 to 1e+06"),
        (["--T=1e-300"], "--T=1e-300 must be above 0 and at most 1000 (1e-06 is the least)"),
        (["--temp_schedule=0:1e-300"], "the value 1e-300 must be above 0 and at most 1000 (1e-06"),
        (["--block_size=" + "9" * 5000], "--block_size has 5000 characters; at most 4096 are"),
        (["--block_size=" + "x" * 4000], "x…: a whole number is needed"),
        (["--alpha_schedule=" + "0:2" * 5000], "…: entry 1 ('0:20:20:2"),
        (["--seed=-" + "9" * 4000], "9… must be at least 0"),
        (["--eval_ctx_lens=" + "9" * 4000], "is not a positive whole number of tokens"),
        (["--local_workdir=a\0b"], "--local_workdir='a\\x00b' holds a NUL or half a character"),
        (["--dataset_name=\ud83d"], "holds a NUL or half a character"),
        (["--cache_dir="], "--cache_dir must not be empty"),
        (["--local_workdir=~nobody-of-that-name/x"], "there is no such home directory"),
        (["--rope_scale=2"], "--rope_scale=2 is for rotary positions"),
        (["--alpha"], "expected one argument"),
        (["--rope_scale=-2"], "--rope_scale=-2 must be above 0"),
        (["--pos_embedding=rotary", "--d_model=36", "--n_heads=12"], "even head width"),
    ],
)
def test_values_that_cannot_work(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_shapes(resolve(parse(*argv), {}).values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(UsageError, match="missing: --block_size, --teacher_name; give them"):
        TrainConfig(dataset_name="x").require("block_size", "teacher_name", "dataset_name")


def test_yaml_gives_any_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "alpha: 0.7\nlr: 3e-4\neval_ctx_lens: [1024, 512]\nbetas: [0.8, 0.9]\nfp16: true\n"
        "alpha_schedule: '0:0.7,400:0.5'\nseed:\n"
    )
    assert settings_from_yaml(str(path)) == {
        "alpha": 0.7,
        "lr": 3e-4,
        "eval_ctx_lens": (512, 1024),
        "betas": (0.8, 0.9),
        "fp16": True,
        "alpha_schedule": "0:0.7,400:0.5",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alpah: 0.5", "unknown setting 'alpah'; did you mean 'alpha'?"),
        ("micro_batch_size: 4", "did you mean 'micro_batch'?"),
        ("- 1\n- 2", "must hold 'setting: value' lines"),
        ("alpha: [1", "is not valid YAML at line"),
        ("alpha: {a: 1}", "one value is needed, not a dict"),
        ("alpha: [0.1, 0.2]", "one value is needed, not a list"),
        ("alpha: high", "--alpha='high': a number is needed"),
        ("x: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        (
            "seed: 1\nlr: 0.1\nseed: 2",
            "is not valid YAML at line 3, column 1: 'seed' is given twice",
        ),
        ("alpha: &a 0.5\nT: *a", "is not valid YAML at line 2, column 4: aliases are not allowed"),
        ("seed: !mine 5", "is not valid YAML at line 1, column 7: the tag '!mine' is not allowed"),
        ("seed: !!int [1]", "the tag 'tag:yaml.org,2002:int' is not allowed here"),
        ("alpha: &a [*a]", "aliases are not allowed here"),
        ("? [1]\n: 2", "found unhashable key"),
        ("betas: [0.8, {a: 1, a: 2}]", "'a' is given twice"),
        ("config: other.yaml", "'config' names a file"),
        ('cache_dir: "a\\0b"', "--cache_dir='a\\x00b' holds a NUL or half a character"),
        ('teacher_name: "\\ud83d"', "holds a NUL or half a character"),
        (
            "seed: " + "[" * 100_000,
            "YAML at line 1, column 26: it is nested more than",
        ),
        ("- " * 100_000, "it is nested more than 20 deep"),
        ("\n".join(f"x{n}: 1" for n in range(40_000)), "it holds more than 10000 names and values"),
        ("\n".join(f"x{n}: 1" for n in range(4000)) + "\nx7: 2", "'x7' is given twice"),
        ("x" * (2 << 20) + ": 1", "bytes; at most 2097152 are expected here"),
        ("dataset_name: " + "x" * 5000, "--dataset_name has 5000 characters; at most 4096"),
        ("? " + "x" * 100_000 + "\n: 1", "unknown setting 'xxxx"),
        ("hf_token_value: [hf_planted]", "--hf_token_value=***: one value is needed"),
    ],
)
def test_yaml_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        settings_from_yaml(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_pipe_is_no_settings_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(UsageError, match="run.yaml' cannot be read: it is a pipe, not a file"):
        settings_from_yaml(str(tmp_path / "run.yaml"))


def test_numbers_at_the_ends_of_their_ranges_make_finite_updates() -> None:
    """Whatever settings are accepted, torch's AdamW takes them in float32."""
    for flags in (
        ("--lr=1e18", "--weight_decay=1e18", "--eps=1e-30", "--grad_clip=1e18"),
        ("--lr=1e-30", "--weight_decay=0", "--eps=1e18", "--grad_clip=1e-30"),
    ):
        config = resolve(parse(*flags, "--betas=0.0,0.999999"), {}).config
        weight = torch.nn.Parameter(torch.tensor([1e-3, -1e-3]))
        optimizer = torch.optim.AdamW(
            [weight],
            lr=config.peak_lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        weight.grad = torch.tensor([1e-3, 2e-3])
        torch.nn.utils.clip_grad_norm_([weight], config.grad_clip)
        optimizer.step()
        assert torch.isfinite(weight).all(), flags


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("alpha_schedule: 0:0.7", {"alpha_schedule": "0:0.7"}),
        ("temp_schedule: 1:2", {"temp_schedule": "1:2"}),
        ("dataset_config: no", {"dataset_config": "no"}),
        ("dataset_revision: 0123", {"dataset_revision": "0123"}),
        ("fp16: on\nbf16: no", {"fp16": True, "bf16": False}),
        ("seed: ~\nlr: null\ndropout:", {}),
        ("dataset_config: 'null'", {"dataset_config": "null"}),
        ("d_model: !!int 64", {"d_model": 64}),
        ("", {}),
    ],
)
def test_yaml_guesses_no_types(tmp_path: Path, content: str, expected: dict[str, object]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert settings_from_yaml(str(path)) == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--hf-token-value=hf_planted"],
        ["--hf_token_valu=hf_planted"],
        ["--hf_token_value", "hf_one", "hf_planted"],
    ],
)
def test_a_mistyped_token_is_not_shown(argv: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert "hf_planted" not in str(caught.value)


def test_empty_values_are_none_given() -> None:
    with pytest.raises(UsageError, match="missing: --teacher_name, --dataset_name"):
        resolve(parse("--teacher_name=", "--dataset_name=", "--block_size=8"), {}).config.require(
            "teacher_name", "dataset_name"
        )


def test_places_in_the_home_directory() -> None:
    config = resolve(parse("--local_workdir=~/a", "--output_gcs_uri=~/b"), {}).config
    assert config.local_workdir == str(Path.home() / "a")
    assert config.output_gcs_uri == str(Path.home() / "b")


def test_shapes_are_left_to_the_checkpoint_that_is_resumed() -> None:
    resolve(parse("--n_heads=5", "--resume_gcs_uri=base.pt"), {})


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent.yaml' cannot be read"):
        settings_from_yaml(str(tmp_path / "absent.yaml"))


def test_the_token_is_not_shown() -> None:
    resolved = resolve({"hf_token_value": "hf_planted"}, {})
    assert "hf_token_value = *** (command line)" in list(resolved.lines())
    assert not any("hf_planted" in line for line in resolved.lines())
    assert "hf_planted" not in f"{resolved} {resolved.config.run_settings()}"


def test_a_setting_survives_its_metadata_form() -> None:
    config = resolve(parse("--betas=0.8,0.9", "--alpha_schedule=0:0.5"), {}).config
    for name, value in config.run_settings().items():
        if value not in (None, []):
            parsed = parse_value(name, value)
            assert parsed == getattr(config, name), name


MOMENT = datetime(2025, 3, 4, 5, 6, 7, tzinfo=UTC)


def test_dates_are_expanded_without_a_shell() -> None:
    local = MOMENT.astimezone()
    expanded = expand_dates("gs://b/run-$(date +%Y%m%d-%H%M%S)/x", flag="f", now=MOMENT)
    assert expanded == f"gs://b/run-{local:%Y%m%d-%H%M%S}/x"
    assert expand_dates("$(date -u +%F_%T)", flag="f", now=MOMENT) == "2025-03-04_05:06:07"
    for quoted in ("+'%Y %m'", '+"%Y %m"', "'+%Y %m'", '"+%Y %m"'):
        assert expand_dates(f"$(date -u {quoted})", flag="f", now=MOMENT) == "2025 03"
    assert expand_dates("$(date +%s)", flag="f", now=MOMENT) == str(int(MOMENT.timestamp()))
    assert expand_dates("gs://b/plain", flag="f") == "gs://b/plain"


@pytest.mark.parametrize(
    "text",
    [
        "gs://b/$(whoami)",
        "$(date +%Y; rm -rf x)",
        "`date`",
        "$(date +%Q)",
        "$(date +$(id))",
        "$(date '+%Y\")",
    ],
)
def test_nothing_else_is_expanded(text: str) -> None:
    with pytest.raises(UsageError, match="--output_gcs_uri"):
        expand_dates(text, flag="output_gcs_uri", now=MOMENT)
