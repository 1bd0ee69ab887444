"""A corpus, a tokenizer and a teacher of random weights for runs of the whole command line."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.embedded import build_corpus, build_tokenizer
from trainer.runtime.log import FORMAT, JSON

STARTED = time.perf_counter()
CONTEXT = 512


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes; the defaults are gpt2-xl and the default student."""
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--teacher_layers", type=int, default=48)
    parser.add_argument("--teacher_width", type=int, default=1600)
    parser.add_argument("--teacher_heads", type=int, default=25)
    parser.add_argument("--micro_batch", type=int, default=32, help=f"windows of {CONTEXT} tokens")
    parser.add_argument("--corpus_mb", type=int, default=6)
    parser.add_argument("--timeout", type=float, default=500, help="seconds for each run")
    parser.add_argument("--more", type=shlex.split, default=[], help="more flags of the trainer")
    parser.add_argument("--json", type=Path, help="where the figures go")


def prepare(options: argparse.Namespace) -> list[str]:
    """Make what runs need, once; returns the flags that name it."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(work / "corpus", limit=options.corpus_mb * 1_000_000)
    teacher = work / "teacher"
    if not (teacher / "config.json").exists():
        build_tokenizer(corpus, teacher, vocab_size=2048)
        fill_vocabulary(teacher / "tokenizer.json", options.vocabulary)
        say("corpus and tokenizer are there")
        save_teacher(teacher, options)
        say("teacher is there")
    return [
        f"--teacher_name={teacher}",
        f"--dataset_name={corpus}",
        f"--cache_dir={work / 'cache'}",
        f"--block_size={CONTEXT}",
        f"--micro_batch={options.micro_batch}",
        "--alpha=0.5",
        "--T=2",
    ]


def fill_vocabulary(path: Path, size: int) -> None:
    """Entries that no text uses, so that heads have the size that is asked for."""
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    taken = set(vocabulary.values()) | {token["id"] for token in content["added_tokens"]}
    for place in range(max(taken) + 1, size):
        vocabulary[f"<unused{place}>"] = place
    path.write_text(json.dumps(content), encoding="utf-8")


def save_teacher(directory: Path, options: argparse.Namespace) -> None:
    """A GPT-2 of random weights in bf16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=options.vocabulary,
        n_embd=options.teacher_width,
        n_layer=options.teacher_layers,
        n_head=options.teacher_heads,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = GPT2LMHeadModel(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)


def empty_compiler_caches(work: Path) -> dict[str, str]:
    """Variables that give the compiler caches of its own, with nothing in them yet."""
    places = {"TORCHINDUCTOR_CACHE_DIR": work / "inductor", "TRITON_CACHE_DIR": work / "triton"}
    for place in places.values():
        shutil.rmtree(place, ignore_errors=True)
    return {name: str(place) for name, place in places.items()}


def train(
    flags: list[str], environ: Mapping[str, str], timeout: float
) -> tuple[list[dict[str, Any]], float]:
    """Run the trainer's command line; its log lines, and the seconds it took.

    Raises:
        SystemExit: it failed; its last lines have been printed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.entrypoint", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(environ) | {FORMAT: JSON},
        start_new_session=True,
    )
    # With the workers that it may have started, which would keep the pipe open
    timer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if '"tokens_per_second"' in line or "first update" in line or "val_loss" in line:
            say(str(json.loads(line).get("message"))[:150])
    timer.cancel()
    if process.wait() != 0:
        print("".join(lines[-12:]), file=sys.stderr)
        raise SystemExit(f"the run ended with status {process.returncode}")
    records = [json.loads(line) for line in lines if line.startswith("{")]
    return records, time.perf_counter() - began
