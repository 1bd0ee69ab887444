"""The whole pipeline at a tiny scale, run once in the kfp local runner; a platform's service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.local import LocalRun, run_pipeline
from tests.pipelines.loopback import Loopback


@pytest.fixture(scope="session")
def parameters(teacher_dir: Path, corpus: Path) -> dict[str, Any]:
    small = {"eval_max_tokens": 600, "global_batch": 4}
    return {
        "teacher_name": str(teacher_dir),
        "dataset_name": str(corpus),
        "dataset_config": "",
        "eval_ctx_lens": "32,64",
        "anneal_block_size": 32,
        "anneal_train_steps": 6,
        "anneal_warmup_steps": 2,
        "anneal_lr_peak": 1e-3,
        "anneal_alpha_schedule": "0:0.7,2:0.5,4:0.3",
        "anneal_temp_schedule": "0:1.2,4:1.0",
        "anneal_eval_every": 2,
        "anneal_save_every": 3,
        "anneal_micro_batch": 4,
        "anneal_more_settings": small | {"d_model": 32, "n_layers": 2, "n_heads": 4},
        "continue_block_size": 64,
        "continue_train_steps": 4,
        "continue_warmup_steps": 1,
        "continue_lr_peak": 1e-3,
        "continue_alpha_schedule": "0:0.5,2:0.4",
        "continue_grad_accum": 2,
        "continue_eval_every": 2,
        "continue_save_every": 2,
        "continue_micro_batch": 2,
        "continue_more_settings": {"eval_max_tokens": 600},
        "evaluate_more_settings": {"eval_max_tokens": 600},
    }


@pytest.fixture
def kubeflow(tmp_path: Path) -> Iterator[Loopback]:
    """The API of open-source Kubeflow Pipelines, at a loopback address."""
    server = Loopback(tmp_path, tls=False)
    yield server
    server.close()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="session")
def first_run(work: Path, parameters: dict[str, Any]) -> LocalRun:
    return run_pipeline(work, parameters)
