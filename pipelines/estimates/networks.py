"""How large student and teacher are, as far as that is known without loading them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainer.models.hugging_face import locate, readable_errors
from trainer.models.local_files import check_sizes
from trainer.models.student import StudentConfig, expected_shapes
from trainer.runtime.errors import LiquidError
from trainer.settings.config import TrainConfig

_GPT2_VOCABULARY, _GPT2_POSITIONS = 50_257, 1024
_GPT2 = {
    "gpt2": (12, 768),
    "gpt2-medium": (24, 1024),
    "gpt2-large": (36, 1280),
    "gpt2-xl": (48, 1600),
    "distilgpt2": (6, 768),
}
"""Layers and width, as published."""
_OWNERS = ("openai-community/", "distilbert/")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Network:
    """A decoder, by what its speed depends on."""

    layers: int
    width: int
    vocabulary: int
    weights: int
    """That multiply every token: the blocks' and the head's, not the embeddings'."""
    parameters: int

    def forward_flops(self, context: int) -> float:
        """Floating-point operations for a token, on average over a window of ``context``.

        Two for each weight; in attention, a position sees half of the window on average, in two
        products of the width.
        """
        return 2.0 * self.weights + 2.0 * self.layers * self.width * context

    def training_flops(self, context: int) -> float:
        """The same for training: the backward pass takes twice the forward pass."""
        return 3.0 * self.forward_flops(context)


def is_gpt2(name: str) -> bool:
    """Whether a hub name is of the family whose sizes and tokenizer are known here."""
    return _short(name) in _GPT2


def _short(name: str) -> str:
    for owner in _OWNERS:
        name = name.removeprefix(owner)
    return name


def student_network(config: TrainConfig, vocabulary: int) -> Network:
    """The student that the settings describe.

    Args:
        config: its settings.
        vocabulary: rows of its head.
    """
    shapes = expected_shapes(
        StudentConfig(
            vocab_size=vocabulary,
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            positions=config.context if config.pos_embedding == "absolute" else 0,
            pos_embedding=config.pos_embedding,
        )
    )
    sizes = {name: _product(shape) for name, shape in shapes.items()}
    weights = sum(
        size
        for name, size in sizes.items()
        if len(shapes[name]) == 2 and not name.startswith(("embed.", "pos."))
    )
    return Network(config.n_layers, config.d_model, vocabulary, weights, sum(sizes.values()))


def teacher_network(name: str) -> Network | str:
    """The teacher's size, or why it is not known.

    A directory of this machine is read (its ``config.json`` alone), nothing is downloaded.
    """
    if is_gpt2(name):
        return _gpt2(*_GPT2[_short(name)])
    if os.path.isdir(os.path.expanduser(name)):
        try:
            return _local(name)
        except LiquidError as error:
            return str(error)
    return f"the size of {name!r} is not known here; give a local directory with its config.json"


def _gpt2(layers: int, width: int) -> Network:
    blocks = 12 * layers * width**2
    head = _GPT2_VOCABULARY * width
    # Biases and norms are 13 widths a block, and two at the end
    small = (13 * layers + 2 + _GPT2_POSITIONS) * width
    return Network(layers, width, _GPT2_VOCABULARY, blocks + head, blocks + head + small)


def _local(name: str) -> Network | str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    location = locate(name, "configuration").path
    check_sizes("teacher", name, location)
    with readable_errors("teacher", name):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        text = config.get_text_config()
        if any((getattr(text, field, None) or 1) > 1 for field in _EXPERTS):
            return f"{name!r} has experts, of which only some work on a token"
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        parameters = dict(model.named_parameters())
        weights = sum(p.numel() for p in parameters.values() if p.ndim >= 2 and id(p) not in tables)
        if head is not None and id(head.weight) in tables:  # tied: it multiplies, too
            weights += head.weight.numel()
        return Network(
            text.num_hidden_layers,
            text.hidden_size,
            text.vocab_size,
            weights,
            sum(p.numel() for p in parameters.values()),
        )


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
