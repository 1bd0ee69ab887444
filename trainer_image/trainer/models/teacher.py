"""The teacher: any Hugging Face causal language model, frozen."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.causal_lm import load_causal_lm
from trainer.models.fast_bodies import FastBody, QuantizationError, family_of, quantize_teacher
from trainer.models.hugging_face import commit_of, locate, readable_errors
from trainer.models.local_files import CONFIG, check_sizes, weight_files
from trainer.models.pretrained import Pretrained
from trainer.runtime.errors import ModelError
from trainer.storage.files import os_errors

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


BY_NAME = "hub name "
"""How the digest of a teacher begins whose commit could not be told; its name follows."""


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher's configuration tells, before its weights are loaded."""

    name: str
    max_context: int | None
    """Longest context in tokens; None where its configuration sets none."""
    vocab_size: int
    """Rows of its output head, padding included."""
    model: Pretrained | None = None
    """What was read, with the revision that was found; None: whatever the name stands for."""


class Teacher:
    """A frozen body and the head that turns its last hidden state into logits.

    Attributes:
        head: ``[V_t, D_t]``, the output embedding, scaled so that hidden · headᵀ are the logits.
        bias: ``[V_t]`` or None.
        spec: name, longest context and vocabulary.
    """

    def __init__(self, model: Any, spec: TeacherSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self.spec = spec
        output = model.get_output_embeddings()
        if output is None or not isinstance(output, nn.Linear):
            raise ModelError(f"teacher {spec.name!r} has no linear output head; use a causal LM")
        scale = _logit_scale(model.config)
        self.head: Tensor = (
            output.weight.detach() * scale if scale != 1.0 else output.weight.detach()
        )
        self.bias: Tensor | None = None if output.bias is None else output.bias.detach() * scale
        self.body: Any = model.base_model
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        """How many there are, before any are spread or quantized."""
        self.sharded = False
        """Whether its weights are spread over the processes of the run."""
        self.compiled = False
        """Whether `torch.compile` or kernels of our own make it fast."""
        self._fast_body: FastBody | None = None
        self._stream: torch.cuda.Stream | None = None
        self._check_decomposition()

    def prepare(self, *, compiled: bool, sharded: bool) -> None:
        """Make the body fast, or spread it over the processes of the run (FSDP2)."""
        self.compiled = compiled
        if sharded:
            from torch.distributed.fsdp import fully_shard

            self.head = self.head.clone()
            for layers in self.model.modules():
                if isinstance(layers, nn.ModuleList):
                    for layer in layers:
                        fully_shard(layer)
            fully_shard(self.model.base_model)
            self.sharded = True
        elif compiled and self.device.type == "cuda" and (family := family_of(self.model)):
            self._fast_body = family.body(self.model)
        elif compiled:
            self.body = torch.compile(self.body, dynamic=False)

    def quantize(self, windows: Tensor) -> QuantizationError:
        """Multiply in fp8 from now on; returns how far that is from bf16 on ``[B, L]`` token ids.

        Raises:
            ModelError: there is no fp8 form of such a model.
        """
        self.compiled = True
        self._fast_body, error = quantize_teacher(self.model, self.head, windows)
        return error

    def release(self) -> None:
        """Give up the buffers kept between calls."""
        if self._fast_body is not None:
            self._fast_body.release()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.device

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """``[B, L]`` token ids to the last hidden state ``[B, L, D_t]``.

        May be called on any stream: a call waits for the call before, whose buffers it uses.
        """
        self._wait_for_last_call()
        if self._fast_body is not None:
            return self._fast_body(ids)
        return self.body(input_ids=ids, use_cache=False).last_hidden_state

    def _wait_for_last_call(self) -> None:
        """Let the current stream wait for the stream of the last call."""
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != current:
            current.wait_stream(self._stream)
        self._stream = current

    @torch.no_grad()
    def _check_decomposition(self) -> None:
        """Refuse a model that changes its logits after the head: hidden · headᵀ would be wrong."""
        if getattr(self.model.config.get_text_config(), "final_logit_softcapping", None):
            # The comparison below misses it in half precision: small logits hardly change
            raise self._no_linear_head()
        ids = torch.arange(1, 9, device=self.head.device)[None] % self.spec.vocab_size
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        linear = torch.nn.functional.linear(self.hidden(ids), self.head, self.bias).float()
        if not bool(torch.isfinite(expected).all()):
            raise ModelError(f"teacher {self.spec.name!r} computes logits that are not finite")
        # The same product of the same operands, rounded once more: a step of bf16 is 0.8 %
        tolerance = 1e-4 if self.head.dtype == torch.float32 else 1e-2
        if linear.shape != expected.shape or not torch.allclose(
            linear, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        ):
            raise self._no_linear_head()

    def _no_linear_head(self) -> ModelError:
        return ModelError(
            f"teacher {self.spec.name!r} does more to its logits than a linear head (soft"
            " capping, for example); such a teacher is not supported"
        )


def _logit_scale(config: Any) -> float:
    """The constant factor that Cohere (logit_scale) and Granite (logits_scaling) models apply."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return float(scale or 1.0) / float(divisor or 1.0)


def read_teacher_spec(
    model: str | Pretrained, token: str | None = None, *, what: str = "teacher"
) -> TeacherSpec:
    """Longest context and vocabulary from a model's configuration alone; messages call it ``what``.

    Raises:
        ModelError: the configuration cannot be loaded, or has no vocabulary size.
        StorageError: its directory cannot be read or fetched.
    """
    from transformers import AutoConfig

    located = locate(model, "configuration", what)
    name = located.model.name
    if os.path.isdir(located.path):
        check_sizes(what, name, located.path)
    with readable_errors(what, name):
        config = AutoConfig.from_pretrained(
            located.path, token=token, trust_remote_code=False, **located.options
        )
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise ModelError(
            f"{what} {name!r} has vocab_size {vocabulary!r:.100} in its configuration; give a"
            " causal LM"
        )
    if not isinstance(longest, int | None):
        raise ModelError(
            f"{what} {name!r} has max_position_embeddings {longest!r:.100} in its configuration;"
            " give a whole number"
        )
    return TeacherSpec(name, longest, vocabulary, located.model)


def teacher_digest(model: str | Pretrained, token: str | None = None) -> str:
    """What tells a teacher's weights and configuration from others, whatever it is called.

    Of a directory it is a digest of the files that would be loaded, all of which are read, so that
    a ``gs://`` directory and a copy of it have the same; of a model on the hub the commit.

    Raises:
        ModelError: the directory, or the configuration on the hub, cannot be read.
        StorageError: the directory cannot be read or fetched.
    """
    located = locate(model, "weights")
    name, directory = located.model.name, Path(located.path)
    if not directory.is_dir():
        commit = commit_of(located, token)
        return f"commit {commit}" if commit else f"{BY_NAME}{name}"
    digest = hashlib.sha256()
    weights = weight_files(f"teacher {name!r}", directory)
    configuration = [CONFIG] if (directory / CONFIG).exists() else []
    for path in (directory / file for file in (*configuration, *weights)):
        with os_errors("reading", path), path.open("rb") as content:
            digest.update(path.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"


def load_teacher(
    spec: TeacherSpec, *, dtype: torch.dtype, device: torch.device, token: str | None = None
) -> Teacher:
    """The teacher on ``device`` in ``dtype``.

    Raises:
        ModelError: the weights cannot be loaded, are of other shapes than the configuration says,
            or are not those of a causal LM that computes finite logits.
        StorageError: its directory cannot be read or fetched, or was changed since its
            configuration was read.
    """
    model = load_causal_lm(
        "teacher", spec.model or spec.name, dtype=dtype, device=device, token=token
    )
    with readable_errors("teacher", spec.name):
        return Teacher(model, spec)
