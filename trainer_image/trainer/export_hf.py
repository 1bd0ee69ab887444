"""Write a student with learned positions as a stock Hugging Face GPT-2.

    python -m trainer.export_hf gs://BUCKET/run/best.pt OUT_DIR [--tokenizer=NAME_OR_DIR]

``AutoModelForCausalLM.from_pretrained(OUT_DIR)`` then loads it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig, run_command
from trainer.errors import CheckpointError, UsageError
from trainer.hf_token import find_hf_token
from trainer.log import log, quiet_libraries, set_up_logging
from trainer.snapshots import read_from
from trainer.student import StudentConfig
from trainer.teacher import load_tokenizer


def gpt2_weights(weights: Mapping[str, Tensor], positions: int) -> dict[str, Tensor]:
    """A student's weights under the names of `transformers.GPT2LMHeadModel`.

    GPT-2 keeps its projections as ``Conv1D``, that is transposed.
    """
    renamed = {
        "transformer.wte.weight": weights["embed.weight"],
        "transformer.wpe.weight": weights["pos.weight"][:positions],
        "transformer.ln_f.weight": weights["ln_f.weight"],
        "transformer.ln_f.bias": weights["ln_f.bias"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    pairs = {
        "ln1.": "ln_1.",
        "ln2.": "ln_2.",
        "attn.in_proj_": "attn.c_attn.",
        "attn.out_proj.": "attn.c_proj.",
        "mlp.0.": "mlp.c_fc.",
        "mlp.2.": "mlp.c_proj.",
    }
    for name, tensor in weights.items():
        if not name.startswith("blocks."):
            continue
        _, layer, rest = name.split(".", 2)
        ours = next(prefix for prefix in pairs if rest.startswith(prefix))
        target = f"transformer.h.{layer}.{rest.replace(ours, pairs[ours], 1)}"
        renamed[target] = tensor.T if tensor.ndim == 2 else tensor
    return {name: tensor.contiguous().clone() for name, tensor in renamed.items()}


def gpt2_model(weights: Mapping[str, Tensor], config: StudentConfig, positions: int) -> Any:
    """A `transformers.GPT2LMHeadModel` that computes what the student computes.

    Raises:
        UsageError: the student has rotary positions, which GPT-2 lacks.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if config.pos_embedding != "absolute":
        raise UsageError(
            "a rotary student has no stock GPT-2 form; export one with learned positions"
        )
    gpt2 = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=positions,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=4 * config.d_model,
        activation_function="gelu",
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(gpt2)
    model = model.to_empty(device="cpu")
    model.load_state_dict(gpt2_weights(weights, positions), strict=True)
    return model.eval()


def run(
    checkpoint: str,
    output: str,
    *,
    tokenizer: str | None = None,
    n_heads: int | None = None,
    trained_positions: int | None = None,
    workdir: str = "/tmp/liquid_work",  # noqa: S108 - the default of --local_workdir
) -> Path:
    """Export a checkpoint with its tokenizer; the trained positions become the model's maximum.

    Args:
        checkpoint: path or ``gs://`` URI.
        output: a new or empty local directory.
        tokenizer: name or directory; default is what the checkpoint was trained with.
        n_heads: where the metadata does not tell (default 12).
        trained_positions: where neither metadata nor optimizer state tells.
        workdir: scratch directory.

    Raises:
        LiquidError: the checkpoint or the tokenizer cannot be read, or the directory is in use.
    """
    directory = Path(output)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{output} is in use; give a new directory to export to")
    source = read_from(checkpoint, Path(workdir))
    described = source.meta.get("model") or {}
    config = source.student_config(
        n_heads=n_heads or described.get("n_heads") or 12, dropout=described.get("dropout") or 0.0
    )
    if config.pos_embedding == "absolute":
        positions = trained_positions or source.trained_positions() or config.positions
    else:
        positions = 0
    model = gpt2_model(source.weights, config, positions)
    name = tokenizer or source.meta.get("tokenizer")
    if not name:
        raise CheckpointError(f"{checkpoint} does not name its tokenizer; give --tokenizer")
    loaded = load_tokenizer(name, find_hf_token(TrainConfig()))
    _save(model, loaded, source, directory)
    log.info("%s written to %s: %d positions", checkpoint, output, positions)
    return directory


def _save(model: Any, tokenizer: Any, source: Checkpoint, directory: Path) -> None:
    """Write beside the target, then rename, so that the directory is whole or absent."""
    model.config.eos_token_id = model.config.bos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.eos_token_id
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        tokenizer.model_max_length = model.config.n_positions
        model.save_pretrained(str(scratch))
        tokenizer.save_pretrained(str(scratch))
        scratch.chmod(0o755)
        if directory.is_dir():
            directory.rmdir()
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export_hf", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="path or gs:// URI")
    parser.add_argument("output", metavar="OUT_DIR", help="a new or empty directory")
    parser.add_argument("--tokenizer", help="name or directory [the checkpoint's]")
    parser.add_argument("--n_heads", type=int, help="where the metadata does not tell [12]")
    parser.add_argument("--trained_positions", type=int, help="where nothing else tells")
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    run(
        args.checkpoint,
        args.output,
        tokenizer=args.tokenizer,
        n_heads=args.n_heads,
        trained_positions=args.trained_positions,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
