"""The pipeline's parameters: how they are written, and what is found wrong before a run."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipelines.local import DEMO
from pipelines.parameters import (
    check_parameters,
    parameter_defaults,
    parameter_help,
    parse_parameters,
)
from trainer.runtime.errors import UsageError


def test_parameters_given_as_text() -> None:
    text = "continue_train_steps=8000 anneal_lr_peak=3e-4"
    text += """ continue_more_settings='{"dropout": 0.1}'"""
    assert parse_parameters(text) == {
        "continue_train_steps": 8000,
        "anneal_lr_peak": 3e-4,
        "continue_more_settings": {"dropout": 0.1},
    }
    for wrong, message in {
        "continue_train_step=1": "did you mean continue_train_steps?",
        "seed": "'seed' is not name=value",
        f"anneal_more_settings={'[' * 100_000}": "[…: a JSON object is needed",
        "seed=x": "seed='x': a whole number is needed",
        "export=perhaps": "export='perhaps': true or false is needed",
        "seed=9007199254740993": "9007199254740992 is the most",
        "anneal_alpha=nan": "anneal_alpha='nan': a number is needed",
        "continue_more_settings=[1]": "a JSON object is needed",
        """continue_more_settings={"dropout":0.1}""": (
            """quoted as in continue_more_settings='{"dropout": 0.1}'"""
        ),
        """continue_more_settings='{"dropout": NaN}'""": "a JSON object is needed",
        "teacher_name='x": "No closing quotation",
    }.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            parse_parameters(wrong)


def test_a_switch_is_written_in_several_ways() -> None:
    for text, value in {"true": True, "True": True, "1": True, "false": False, "0": False}.items():
        assert parse_parameters(f"export={text}") == {"export": value}


def test_what_is_asked_of_the_export() -> None:
    check_parameters({"lm_eval_tasks": "lambada_openai,piqa", "lm_eval_limit": 100})
    check_parameters({"export": False})
    for values, message in (
        ({"export": False, "lm_eval_tasks": "piqa"}, "lm_eval_tasks='piqa' is for the exported"),
        ({"export": False, "export_license": "mit"}, "export_license='mit' is for the exported"),
        ({"lm_eval_limit": 5}, "lm_eval_limit=5 without lm_eval_tasks does nothing"),
        ({"lm_eval_tasks": "piqa", "lm_eval_limit": -1}, "lm_eval_limit=-1 must be at least 0"),
    ):
        with pytest.raises(UsageError, match=r"^PARAMS: ") as caught:
            check_parameters(values)
        assert message in str(caught.value)


def test_the_defaults_and_the_demonstration_are_right() -> None:
    check_parameters({})
    check_parameters(DEMO)
    check_parameters(
        {
            "anneal_more_settings": {"pos_embedding": "rotary"},
            "continue_more_settings": {"rope_scale": 2.0},
        }
    )


def test_what_a_cached_teacher_takes() -> None:
    check_parameters({"teacher": "cached", "target_workers": 1})
    check_parameters({"teacher": "cached", "continue_block_size": 512})
    reverse = {"anneal_more_settings": {"kd_scheme": "reverse_kl"}}
    check_parameters(reverse)
    for values, message in (
        ({"teacher": "offline"}, "teacher='offline': choose online or cached"),
        ({"target_workers": 0}, "target_workers=0 must be at least 1 and at most 64"),
        ({"target_bytes": 0}, "target_bytes=0 must be at least 1"),
        (
            {"teacher": "cached", "continue_block_size": 768},
            "anneal_block_size=512 and continue_block_size=768 do not",
        ),
        (
            {"teacher": "cached"} | reverse,
            "for stage anneal: kd_scheme='reverse_kl' needs the teacher's whole",
        ),
    ):
        with pytest.raises(UsageError, match=r"^PARAMS") as caught:
            check_parameters(values)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"anneal_alpha": 2.0}, "stage anneal: anneal_alpha=2 must be between 0 and 1"),
        ({"continue_temperature": 0.0}, "stage continue: continue_temperature=0 must be above 0"),
        ({"continue_alpha_schedule": "0:0.5,x:1"}, "stage continue: continue_alpha_schedule="),
        ({"anneal_train_steps": 0}, "stage anneal: anneal_train_steps=0 trains nothing"),
        ({"anneal_block_size": -1}, "stage anneal: anneal_block_size=-1 must be at least 1"),
        ({"anneal_more_settings": {"drop_out": 0.1}}, "did you mean 'dropout'?"),
        ({"continue_more_settings": {"kd_scheme": "kl"}}, "choose one of forward_kl"),
        ({"resize_method": "cubic"}, "anneal: resize_method='cubic': choose one of linear, copy"),
        ({"best_metric": "val_loss_studnt"}, "did you mean val_loss_student?"),
        ({"best_metric": "val_loss_student@64"}, "is not evaluated there"),
        ({"eval_ctx_lens": ""}, "stage evaluate: missing: eval_ctx_lens"),
        (
            {"evaluate_more_settings": {"teacher_precision": "fp8"}},
            "stage evaluate: teacher_precision=fp8 is for training",
        ),
        ({"eval_ctx_lens": "512,0"}, "is not a positive whole number"),
        ({"teacher_name": ""}, "missing: teacher_name"),
        ({"dataset_name": ""}, "missing: dataset_name"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"evaluate_micro_batch": 0}, "stage evaluate: evaluate_micro_batch=0"),
        ({"anneal_micro_batch": 7}, "stage anneal: global_batch=64 is not divisible"),
        ({"continue_more_settings": {"global_batch": 64}}, "leave one of them out"),
        ({"anneal_more_settings": {"hf_token_value": "hf_x"}}, "give hf_secret_name"),
        (
            {"continue_more_settings": {"output_gcs_uri": "gs://b/x"}},
            "output_gcs_uri is not for continue_more_settings: it is where the stage's output",
        ),
        ({"anneal_more_settings": {"save_best_on": "val_loss"}}, "_settings: give best_metric"),
        ({"continue_more_settings": {"block_size": 2048}}, "give continue_block_size"),
        ({"continue_more_settings": {"T": 2.0}}, "give continue_temperature"),
        ({"continue_more_settings": {"resume_gcs_uri": "gs://b/x"}}, "the annealing alone resumes"),
        ({"evaluate_more_settings": {"tokens_dir": "/t"}}, "it is the output of the first stage"),
        ({"evaluate_more_settings": {"seed": 7}}, "give seed"),
        ({"anneal_more_settings": {"teacher_targets": "gs://b/t"}}, "give teacher=cached"),
    ],
)
def test_what_a_stage_would_refuse_is_found_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_parameters(values)
    assert str(caught.value).startswith("PARAMS for stage ")
    assert message in str(caught.value)


def test_the_batch_is_shared_by_the_gpus_asked_for() -> None:
    check_parameters({}, {"anneal": 8})
    with pytest.raises(UsageError, match="not divisible by micro_batch 8 x 16 processes"):
        check_parameters({}, {"anneal": 16})


def test_empty_texts_stand_for_defaults() -> None:
    check_parameters({"best_metric": "", "resize_method": "", "anneal_alpha_schedule": ""})


def test_every_parameter_has_a_description() -> None:
    assert all(parameter_help(name) for name in parameter_defaults())
