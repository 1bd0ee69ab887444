"""A whole run of the command line against its own bare step, on one GPU.

    PYTHONPATH=trainer_image:. python bench/whole_run.py --work /tmp/whole_run

The run loads data, logs every 50 updates, evaluates at two contexts every 500 and writes
checkpoints; the bare step is `gpu_step.py`'s. See bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from run_setup import CONTEXT, add_flags, empty_compiler_caches, prepare, say, train


def bare_step(options: argparse.Namespace) -> dict[str, float]:
    """The step without anything around it, in a process of its own."""
    target = options.work / "gpu_step.json"
    command = [sys.executable, str(Path(__file__).parent / "gpu_step.py")]
    command += ["--contexts", str(CONTEXT), "--no_loss", "--no_fp8", "--peers", "none"]
    command += ["--runs", "100", "--tokens", str(options.micro_batch * CONTEXT)]
    command += ["--teacher_layers", str(options.teacher_layers), "--json", str(target)]
    subprocess.run(command, check=True, timeout=options.timeout, stdout=subprocess.DEVNULL)
    found = json.loads(target.read_text())[f"step at context {CONTEXT}"]["this trainer"]
    return {
        "median tokens/s": found["tokens/s"],
        "mean tokens/s": found["mean tokens/s"],
        "peak GiB": found["peak GiB"],
    }


def training_rate(records: list[dict[str, Any]], tokens_per_update: int) -> dict[str, float]:
    """Tokens a second from the first log line to the last, evaluations left out."""
    steps = [record for record in records if "tokens_per_second" in record]
    first, last = steps[0], steps[-1]
    wall = seconds_between(first, last)
    inside = [r for r in records if "eval_seconds" in r and first["step"] <= r["step"]]
    # The last evaluation follows the last log line
    evaluating = sum(r["eval_seconds"] for r in inside if r["step"] < last["step"])
    trained = (last["step"] - first["step"]) * tokens_per_update
    return {
        "tokens/s, snapshots and logging included": trained / (wall - evaluating),
        "tokens/s as logged, median": sorted(r["tokens_per_second"] for r in steps)[
            len(steps) // 2
        ],
        "seconds": wall,
        "of them evaluating": evaluating,
    }


def seconds_between(first: dict[str, Any], last: dict[str, Any]) -> float:
    began, ended = (datetime.fromisoformat(record["time"]) for record in (first, last))
    return (ended - began).total_seconds()


def start_up(records: list[dict[str, Any]]) -> dict[str, float]:
    line = next(record for record in records if "startup_seconds" in record)
    return {key: round(line[key], 1) for key in ("startup_seconds", "first_update_seconds")}


def short_run(
    flags: list[str], options: argparse.Namespace, environ: dict[str, str]
) -> dict[str, float]:
    """Start-up and first update of a run of three."""
    output = options.work / "run"
    shutil.rmtree(output, ignore_errors=True)
    short = [*flags, "--train_steps=3", "--eval_max_tokens=1000", *options.more]
    records, _ = train([*short, f"--local_workdir={output}"], environ, options.timeout)
    return start_up(records)


def lengthen_validation(corpus: Path, tokens: int) -> None:
    """Repeat the validation text, which is short, until there is enough to evaluate on."""
    path = corpus / "validation.jsonl"
    text = path.read_text(encoding="utf-8")
    # No more than 8 bytes a token with any vocabulary
    path.write_text(text * -(-8 * tokens // len(text)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--eval_tokens", type=int, default=262_144)
    parser.add_argument("--no_bare", action="store_true", help="leave out the bare step")
    parser.add_argument("--no_starts", action="store_true", help="leave out the further starts")
    options = parser.parse_args()
    common = [*prepare(options), f"--global_batch={options.micro_batch}"]
    report: dict[str, Any] = {}
    lengthen_validation(options.work / "corpus", options.eval_tokens)
    caches = empty_compiler_caches(options.work)
    if not options.no_bare:
        report["bare step, before"] = bare_step(options)
        say(f"bare step: {report['bare step, before']}")
    run = [*common, f"--train_steps={options.steps}", f"--warmup_steps={options.steps // 10}"]
    run += ["--log_interval=50", "--eval_every=500", "--save_every=250"]
    run += [
        f"--eval_ctx_lens={CONTEXT},{2 * CONTEXT}",
        f"--eval_max_tokens={options.eval_tokens}",
        *options.more,
    ]
    output = options.work / "run"
    shutil.rmtree(output, ignore_errors=True)
    records, took = train([*run, f"--local_workdir={output}"], caches, options.timeout)
    report["run"] = training_rate(records, options.micro_batch * CONTEXT) | {"in all": took}
    report["start, nothing cached"] = start_up(records)
    evaluations = [record["eval_seconds"] for record in records if "eval_seconds" in record]
    report["evaluations, s (the first with the teacher's)"] = evaluations
    if not options.no_starts:
        report["start, tokens and kernels cached"] = short_run(common, options, caches)
        eager = [*common, "--compile=off"]
        report["start, eager, tokens cached"] = short_run(eager, options, caches)
    shutil.rmtree(output, ignore_errors=True)
    if not options.no_bare:
        report["bare step, after"] = bare_step(options)
        bare = [report[f"bare step, {when}"]["mean tokens/s"] for when in ("before", "after")]
        rate = report["run"]["tokens/s, snapshots and logging included"]
        report["run / bare step (means)"] = rate / statistics.mean(bare)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
