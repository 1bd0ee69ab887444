"""Training time lost to checkpoints that travel over a slow link in the background.

    PYTHONPATH=trainer_image:. python bench/upload_cost.py

Trains the same steps with snapshots sent to an object server behind a throttled link, and with
none, in turn, and compares the seconds between the first and the last log line. On the CPU, with
training on one thread: as beside a GPU, the upload has a core of its own, which here it shares with
the server and the link. `--threads` changes that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from pipelines.embedded import build_corpus, build_tokenizer
from tests.faults.proxy import FaultProxy
from tests.faults.server import ObjectServer
from trainer.runtime.log import FORMAT, JSON

BANDWIDTH = 5_000_000
"""Bytes a second."""
STEPS, EVERY, ROUNDS = 100, 25, 3


def throttle(url: str, address: multiprocessing.Queue[str]) -> None:
    """A link of its own process, so that its work is not the trainer's."""
    with FaultProxy(url, bandwidth=BANDWIDTH) as proxy:
        address.put(proxy.url)
        multiprocessing.Event().wait()


def seconds(output: str, save_every: int, common: list[str], environment: dict[str, str]) -> float:
    """Training time from the first to the last log line."""
    flags = [f"--output_gcs_uri={output}", f"--save_every={save_every}", *common]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.entrypoint", *flags],
        capture_output=True,
        text=True,
        env=os.environ | environment | {FORMAT: JSON},
        check=True,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    steps = [line["time"] for line in lines if "tokens_per_second" in line]
    first, last = (datetime.fromisoformat(steps[i]) for i in (0, -1))
    return (last - first).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of the trainer's products")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "server").mkdir()
        corpus = build_corpus(work / "corpus", limit=1_000_000)
        tokenizer = build_tokenizer(corpus, work / "tokenizer", vocab_size=1024)
        server = ObjectServer(work / "server")
        server.make_bucket("bench")
        address: multiprocessing.Queue[str] = multiprocessing.Queue()
        link = multiprocessing.Process(target=throttle, args=(server.url, address), daemon=True)
        link.start()
        environment = {
            "STORAGE_EMULATOR_HOST": address.get(),
            "OMP_NUM_THREADS": str(options.threads),
        }
        common = [
            f"--teacher_name={tokenizer}",
            f"--dataset_name={corpus}",
            f"--cache_dir={work / 'cache'}",
            *("--alpha=0", "--block_size=128", "--d_model=256", "--n_layers=4", "--n_heads=8"),
            *(f"--train_steps={STEPS}", "--warmup_steps=10", "--micro_batch=16"),
            *("--global_batch=16", "--log_interval=4", "--eval_every=100000"),
            "--eval_max_tokens=100",
        ]
        times: dict[str, list[float]] = {"none": [], "snapshots": []}
        for number in range(ROUNDS):
            for kind, every in (("none", 10**6), ("snapshots", EVERY)):
                place = f"gs://bench/{kind}-{number}"
                local = [*common, f"--local_workdir={work / f'{kind}-{number}'}"]
                times[kind].append(seconds(place, every, local, environment))
                print(f"{kind:10} {times[kind][-1]:7.2f} s", flush=True)
        link.terminate()
        server.close()
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    lost = medians["snapshots"] / medians["none"] - 1
    print(f"a snapshot every {EVERY} steps over {BANDWIDTH / 1e6:g} MB/s costs {lost:+.1%}")


if __name__ == "__main__":
    main()
