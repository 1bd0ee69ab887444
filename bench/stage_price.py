"""What a training stage takes beside training, on one GPU: fresh, with compiled code, restarted.

    PYTHONPATH=trainer_image:. python bench/stage_price.py --work /tmp/stage_price

Each start has compilers' caches of its own, empty, as on another machine; tokens are prepared, as
in the pipeline, and everything is local. Python's bytecode is there, as in the image. Prints a
table and needs no network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from run_setup import CONTEXT, add_flags, empty_compiler_caches, prepare, say, train

COMPILE_CACHE = "compile_cache.bin"
ROWS = (
    "imports",
    "to the first batch",
    "first update",
    "first evaluation",
    "later evaluations",
    "training",
    "from the last snapshot to the end",
    "end of the process",
    "anything else",
    "in all",
    "in all but training",
)


def prepared_tokens(flags: list[str], work: Path) -> list[str]:
    """Token streams as the pipeline's first stage leaves them; the flags that name them."""
    target = work / "tokens"
    of_data = [flag for flag in flags if flag.startswith(("--teacher", "--dataset", "--cache"))]
    command = [sys.executable, "-m", "trainer.prepare_tokens", str(target), *of_data]
    subprocess.run(command, check=True)
    kept = [flag for flag in flags if not flag.startswith(("--dataset", "--cache"))]
    return [*kept, f"--tokens_dir={target}"]


def seconds_of(records: list[dict[str, Any]], took: float, tokens: int) -> dict[str, float]:
    """Where the time of a start went.

    Args:
        records: its log.
        took: seconds of the whole process.
        tokens: of an update.
    """

    def value(key: str) -> float:
        return float(next(record[key] for record in records if key in record))

    evaluations = [record["eval_seconds"] for record in records if "eval_seconds" in record]
    trained, before = 0.0, first_step(records)
    for record in records:
        if "tokens_per_second" in record:
            # The first update of a start that compiles is not in the speed
            timed = record["step"] - before - (trained == 0.0)
            trained, before = trained + timed * tokens / record["tokens_per_second"], record["step"]
    found = {
        "imports": value("import_seconds"),
        "to the first batch": value("startup_seconds") - value("import_seconds"),
        "first update": value("first_update_seconds"),
        "first evaluation": evaluations[0],
        "later evaluations": sum(evaluations[1:]),
        "training": trained,
        "from the last snapshot to the end": value("finish_seconds"),
        "end of the process": took - value("run_seconds"),
    }
    found["anything else"] = took - sum(found.values())
    found["in all"] = took
    found["in all but training"] = took - trained
    return found


def first_step(records: list[dict[str, Any]]) -> int:
    """The step that a start goes on from."""
    words = "training from step "
    line = next(r["message"] for r in records if str(r.get("message")).startswith(words))
    return int(line.removeprefix(words).split()[0])


def restartable(output: Path, target: Path, step: int) -> Path:
    """What a kill after a snapshot leaves of a finished run."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in (f"ckpt_step_{step}.pt", f"ckpt_step_{step}.pt.meta.json", COMPILE_CACHE):
        shutil.copy2(output / name, target / name)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    # 305 M parameters
    parser.set_defaults(
        vocabulary=2048, teacher_layers=24, teacher_width=1024, teacher_heads=16, timeout=240
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--short_steps", type=int, default=300, help="of the second start")
    options = parser.parse_args()
    work, quarter = options.work, options.steps // 4
    flags = prepared_tokens(prepare(options), work)
    flags += [f"--global_batch={options.micro_batch}", "--log_interval=50", "--warmup_steps=100"]
    flags += [f"--eval_every={quarter}", f"--save_every={quarter}", "--eval_max_tokens=65536"]
    flags += [f"--eval_ctx_lens={CONTEXT},{2 * CONTEXT}", *options.more]
    first, second = work / "first", work / "second"
    for output in (first, second):
        shutil.rmtree(output, ignore_errors=True)
    earlier = [f"--train_steps={options.short_steps}", f"--compile_cache={first / COMPILE_CACHE}"]
    starts = {
        "fresh": (first, [f"--train_steps={options.steps}"]),
        "with an earlier stage's code": (second, earlier),
        "restarted elsewhere": (work / "again", [f"--train_steps={options.steps}"]),
    }
    bytecode = {"PYTHONPYCACHEPREFIX": str(work / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    warm = [*flags, "--train_steps=2", f"--local_workdir={work / 'warm'}"]
    train(warm, empty_compiler_caches(work) | bytecode, options.timeout)
    report: dict[str, dict[str, float]] = {}
    for name, (output, more) in starts.items():
        if output == work / "again":
            restartable(first, output, 3 * quarter)
        environ = empty_compiler_caches(work) | bytecode
        run = [*flags, *more, f"--local_workdir={output}"]
        records, took = train(run, environ, options.timeout)
        report[name] = seconds_of(records, took, options.micro_batch * CONTEXT)
        said = [r["message"] for r in records if "compiled code" in str(r.get("message"))]
        say(f"{name}: {took:.1f} s; {'; '.join(said)}")
    print(f"\n| seconds | {' | '.join(report)} |")
    print(f"| --- |{' --- |' * len(report)}")
    for row in ROWS:
        print(f"| {row} | {' | '.join(f'{found[row]:.1f}' for found in report.values())} |")
    size = (first / COMPILE_CACHE).stat().st_size if (first / COMPILE_CACHE).exists() else 0
    print(f"\n{COMPILE_CACHE}: {size / 1e6:.1f} MB")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
