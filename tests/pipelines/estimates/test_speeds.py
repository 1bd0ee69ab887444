"""The rule for speeds, against what was measured and against counts that PyTorch makes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipelines.estimates.networks import Network, is_gpt2, student_network, teacher_network
from pipelines.estimates.speeds import (
    ALONE,
    FULL_PASS,
    MAKING,
    MEASURED,
    MEASURED_FACTOR,
    ONLINE,
    OTHER_GPU_FACTOR,
    RULE_FACTOR,
    Row,
    Work,
    by_flops,
    speed,
)
from trainer.models.student import Student, StudentConfig
from trainer.settings.config import TrainConfig


def network(shape: tuple[int, int] | None, vocabulary: int = 50_257) -> Network | None:
    if shape is None:
        return None
    layers, width = shape
    config = TrainConfig(n_layers=layers, d_model=width, n_heads=width // 64, block_size=512)
    return student_network(config, vocabulary)


def work_of(row: Row) -> Work:
    return Work(
        row.work,
        row.context,
        network(row.student),
        network(row.teacher),
        fp8=row.fp8,
        pass_tokens=row.pass_tokens,
    )


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_the_rule_meets_what_was_measured(row: Row) -> None:
    ratio = by_flops(row.gpu, work_of(row)) / row.tokens_per_second
    assert 1 / RULE_FACTOR < ratio < RULE_FACTOR
    found = speed(row.gpu, work_of(row))
    assert (found.tokens_per_second, found.factor) == (row.tokens_per_second, MEASURED_FACTOR)


def test_operations_are_those_that_pytorch_counts() -> None:
    batch, length = 2, 64
    ids = torch.zeros(batch, length, dtype=torch.long)
    student = Student(StudentConfig(500, 32, 3, 4, length)).initialize(0)
    config = TrainConfig(n_layers=3, d_model=32, n_heads=4, block_size=length)
    size = student_network(config, 500)
    # Of PyTorch's ways to compute attention, the one whose products it counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        student.logits(ids).sum()
    # It counts the half that the causal mask leaves out, too
    masked = 2 * 3 * 32 * length
    counted = counter.get_total_flops() / (batch * length)
    assert size.forward_flops(length) == pytest.approx(counted - masked)
    assert size.parameters == sum(p.numel() for p in student.parameters())
    assert size.training_flops(length) == pytest.approx(3 * (counted - masked))


@pytest.mark.parametrize(
    ("name", "published"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-xl", 1_557_611_200)],
)
def test_the_known_teachers_are_as_large_as_published(name: str, published: int) -> None:
    found = teacher_network(f"openai-community/{name}")
    assert isinstance(found, Network)
    assert found.parameters == published
    assert is_gpt2(name)


def test_a_local_teacher_is_measured_by_its_configuration(tmp_path: Path) -> None:
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2))
    tied.config.save_pretrained(tmp_path / "tied")
    found = teacher_network(str(tmp_path / "tied"))
    assert isinstance(found, Network)
    assert (found.layers, found.width, found.vocabulary) == (2, 32, 300)
    assert found.parameters == tied.num_parameters()
    assert found.weights == 12 * 2 * 32**2 + 300 * 32  # the head, though tied
    untied = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    untied.save_pretrained(tmp_path / "untied")
    found = teacher_network(str(tmp_path / "untied"))
    assert isinstance(found, Network)
    model = LlamaForCausalLM(untied)
    embeddings = model.model.embed_tokens.weight.numel()
    small = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert found.weights == model.num_parameters() - embeddings - small


def test_a_teacher_that_is_not_known_says_why(tmp_path: Path) -> None:
    assert "the size of 'owner/model' is not known here" in str(teacher_network("owner/model"))
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in str(teacher_network(str(tmp_path)))
    assert "\n" not in str(teacher_network(str(tmp_path)))


def test_what_was_not_measured_goes_by_the_rule_and_says_so() -> None:
    default, xl = network((10, 768)), network((48, 1600))
    unusual = speed("H100", Work(ALONE, 512, default, usual=False))
    assert (unusual.known, unusual.factor) == ("by FLOPs", RULE_FACTOR)
    other = speed("A100", Work(ONLINE, 512, default, xl))
    assert (other.known, other.factor) == ("by FLOPs, A100 not measured", OTHER_GPU_FACTOR)
    small = speed("H100", Work(ALONE, 512, default, pass_tokens=2048))
    assert small.known == "measured with larger micro-batches"
    assert small.tokens_per_second < 380_500
    large = speed("H100", Work(ALONE, 512, default, pass_tokens=4 * FULL_PASS))
    assert (large.known, large.tokens_per_second) == ("measured", 560_000)
    vocabulary = speed("H100", Work(ALONE, 512, network((10, 768), 1000)))
    assert vocabulary.known == "by FLOPs"
    assert vocabulary.tokens_per_second > 560_000


def test_fp8_gains_only_where_the_gpu_has_it() -> None:
    xl = network((48, 1600))
    for gpu, gains in (("H200", True), ("A100", False)):
        rates = [by_flops(gpu, Work(MAKING, 512, teacher=xl, fp8=fp8)) for fp8 in (False, True)]
        assert (rates[1] > rates[0]) == gains
