"""The list of families with a fast body: how the teacher uses an entry that is new to it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.models import fast_bodies
from trainer.models.fast_bodies import Family, family_of
from trainer.models.teacher import Teacher, TeacherSpec
from trainer.runtime.errors import ModelError


class Body:
    """A Llama's body, and how often it was called and released."""

    def __init__(self, model: Any, *, offset: float) -> None:
        self.body, self.offset = model.base_model, offset
        self.calls = self.releases = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.body(input_ids=ids, use_cache=False).last_hidden_state + self.offset

    def release(self) -> None:
        self.releases += 1


def supports(model: Any) -> bool:
    return type(model) is LlamaForCausalLM


def add(monkeypatch: pytest.MonkeyPatch, **bodies: Any) -> None:
    family = Family("Llama", supports, partial(Body, offset=0.5), **bodies)
    monkeypatch.setattr(fast_bodies, "FAMILIES", (*fast_bodies.FAMILIES, family))


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    return Teacher(LlamaForCausalLM(config).to(torch.bfloat16), TeacherSpec("llama", 64, 96))


IDS = torch.arange(40).view(2, 20)


def test_a_llama_has_no_family_until_one_is_added(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert family_of(teacher.model) is None
    add(monkeypatch)
    family = family_of(teacher.model)
    assert family is not None
    assert family.name == "Llama"


def test_the_teacher_uses_the_fast_body_of_its_family(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch)
    own = teacher.hidden(IDS)
    with monkeypatch.context() as patch:
        # Fast bodies are for GPUs; this one would run on any device
        patch.setattr(Teacher, "device", property(lambda self: torch.device("cuda")))
        teacher.prepare(compiled=True, sharded=False)
    assert torch.equal(teacher.hidden(IDS), own + 0.5)
    body: Any = teacher._fast_body
    assert (body.calls, body.releases) == (1, 0)
    teacher.release()
    assert (body.calls, body.releases) == (1, 1)


def test_the_teacher_uses_and_measures_the_fp8_body_of_its_family(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch, fp8_body=partial(Body, offset=0.75))
    own = teacher.hidden(IDS)
    error = teacher.quantize(IDS)
    assert torch.equal(teacher.hidden(IDS), own + 0.75)
    before, after = (own + 0.5).double(), (own + 0.75).double()
    assert error.hidden == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    log_p, log_q = (
        (hidden.flatten(0, 1) @ teacher.head.double().T).log_softmax(1)
        for hidden in (before, after)
    )
    divergence = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    assert divergence > 1e-3
    assert error.divergence == pytest.approx(divergence, rel=1e-3)


def test_a_family_without_an_fp8_body_is_refused_in_fp8(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no fp8 form, only GPT-2 in bf16"):
        teacher.quantize(IDS)
    monkeypatch.undo()
    add(monkeypatch, fp8_body=partial(Body, offset=0.75))
    with pytest.raises(ModelError, match="only GPT-2 or Llama in bf16 has"):
        Teacher(teacher.model.float(), teacher.spec).quantize(IDS)
