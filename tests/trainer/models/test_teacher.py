"""Teachers of several architectures, as stock `transformers` saves them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trainer.models.hugging_face import load_tokenizer
from trainer.models.local_files import check_sizes
from trainer.models.teacher import TeacherSpec, load_teacher, read_teacher_spec
from trainer.runtime.errors import ModelError, StorageError

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(str(directory))
    return directory


def llama(directory: Path) -> Path:
    return saved(LlamaForCausalLM(LlamaConfig(**SMALL)), directory)


def configure(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    spec = read_teacher_spec(str(directory))
    return load_teacher(spec, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SMALL)),
        CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=128, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["llama", "cohere with a logit scale", "gpt2, tied"],
)
def test_hidden_state_and_head_give_the_models_logits(model: Any, tmp_path: Path) -> None:
    directory = saved(model, tmp_path / "teacher")
    teacher = load(directory)
    assert teacher.spec.max_context == 128
    assert teacher.spec.vocab_size == 96
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    found = F.linear(teacher.hidden(ids), teacher.head, teacher.bias)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_teacher_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)
    directory = saved(Gemma2ForCausalLM(config), tmp_path / "gemma")
    with pytest.raises(ModelError, match="does more to its logits than a linear head"):
        load(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_too_small_for_their_cap_to_show_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0)
    directory = saved(Gemma2ForCausalLM(config), tmp_path / "gemma")
    with pytest.raises(ModelError, match="does more to its logits than a linear head"):
        load(directory, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_a_linear_head_passes_in_half_precision(
    dtype: torch.dtype, scale: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=scale))
    with torch.no_grad():
        model.lm_head.weight *= 20.0
    load(saved(model, tmp_path / "teacher"), dtype)


def test_precision_is_the_one_asked_for(tmp_path: Path) -> None:
    directory = saved(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "teacher")
    teacher = load(directory, torch.bfloat16)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.hidden(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.bfloat16


def test_missing_weights_are_not_filled_in_silently(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = saved(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "teacher")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, .*layers.1.mlp.up_proj.weight"):
        load(directory)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="computes logits that are not finite"):
        load(saved(model, tmp_path / "teacher"))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    tokenizer.save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(str(tmp_path / "bare"))


@pytest.mark.parametrize("name", ["/no/such/place", "no-such-owner/no-such-model", "bad name!", ""])
def test_names_that_lead_nowhere_are_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_teacher_spec(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    if "/no-such" not in name:  # the hub's client tries an unreachable hub for a minute
        with pytest.raises(ModelError):
            load_tokenizer(name)


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no", "no/such/place"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    for read in (read_teacher_spec, load_tokenizer):
        with pytest.raises(ModelError, match=f"{name}' cannot be loaded: no such directory$"):
            read(name)


def test_a_file_is_not_a_teacher(tmp_path: Path) -> None:
    path = llama(tmp_path / "teacher") / "model.safetensors"
    with pytest.raises(ModelError, match="it is a file; give the directory"):
        read_teacher_spec(str(path))


def test_home_is_expanded(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tokenizer_dir, llama(tmp_path / "teacher"), dirs_exist_ok=True)
    assert load(Path("~/teacher")).spec.vocab_size == 96
    assert len(load_tokenizer("~/teacher")) == 512


def test_shapes_that_contradict_the_configuration_are_named(tmp_path: Path) -> None:
    directory = llama(tmp_path / "teacher")
    configure(directory, vocab_size=100)
    with pytest.raises(
        ModelError,
        match=r"lm_head.weight has shape \[96, 32\], but its config.json needs \[100, 32\]",
    ):
        load(directory)


def test_a_model_that_cannot_compute_is_one_line(tmp_path: Path) -> None:
    small = GPT2Config(vocab_size=96, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    directory = saved(GPT2LMHeadModel(small), tmp_path / "teacher")
    configure(directory, n_head=-1)
    with pytest.raises(ModelError, match="cannot be loaded: invalid shape dimension"):
        load(directory)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "32x"}, "'hidden_size' expected int, got str .value: '32x'"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads .5."),
        ({"vocab_size": 0}, "has vocab_size 0 in its configuration"),
        ({"hidden_act": "nope"}, "unknown or missing key 'nope'"),
        ({"model_type": "nope"}, "has model type `nope`"),
    ],
)
def test_a_damaged_configuration_is_one_line(
    values: dict[str, object], message: str, tmp_path: Path
) -> None:
    directory = llama(tmp_path / "teacher")
    configure(directory, **values)
    with pytest.raises(ModelError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_weights_that_carry_code_are_refused_and_do_not_run(tmp_path: Path) -> None:
    directory, canary = llama(tmp_path / "teacher"), tmp_path / "canary"
    (directory / "model.safetensors").unlink()
    weights = directory / "pytorch_model.bin"
    torch.save({"lm_head.weight": torch.zeros(96, 32), "more": Payload(canary)}, weights)
    with pytest.raises(ModelError, match="refers to posix.mkdir, which could run code") as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    assert not canary.exists()
    torch.load(weights, weights_only=False)
    assert canary.exists(), "the payload was live"


def pickled(model: Any, directory: Path, name: str = "pytorch_model.bin") -> Path:
    """A teacher whose weights `torch.save` has written; returns their file."""
    saved(model, directory)
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / name)
    return directory / name


def test_pickled_weights_are_walked_through_first(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    weights = pickled(model, tmp_path / "teacher")
    found = load(tmp_path / "teacher").head
    assert torch.equal(found, model.lm_head.weight)
    # What torch's own reader takes: a group of groups of references, each of a few bytes
    value: Any = ["x" * 1000]
    for _ in range(20):
        value = [value] * 10
    torch.save(model.state_dict() | {"more": value}, weights)
    with pytest.raises(
        ModelError, match=r"pytorch_model.bin is refused: .*; save its weights anew"
    ):
        load(tmp_path / "teacher")
    torch.save(model.state_dict(), weights, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="is not a checkpoint of torch.save.* as safetensors$"):
        load(tmp_path / "teacher")


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_pickles_that_an_index_names_are_walked_through(index: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    weights = pickled(model, tmp_path / "teacher", "shard.pt")
    content = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "shard.pt")}
    (tmp_path / "teacher" / index).write_text(json.dumps(content))
    load(tmp_path / "teacher")
    torch.save(model.state_dict() | {"more": [10**300]}, weights)
    with pytest.raises(ModelError, match=r"cannot be loaded: shard.pt is refused: "):
        load(tmp_path / "teacher")


@pytest.mark.parametrize("named", ["adapter_model.bin", "../x.bin", ["x"], 7])
def test_a_configuration_may_not_name_pickles(named: object, tmp_path: Path) -> None:
    directory = llama(tmp_path / "teacher")
    configure(directory, transformers_weights=named)
    with pytest.raises(ModelError, match="its config.json names weights in .*; give safetensors"):
        load(directory)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_damaged_weights_are_one_line(content: bytes, tmp_path: Path) -> None:
    directory = llama(tmp_path / "teacher")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded: ") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def with_code(directory: Path, tokenizer_dir: Path, canary: Path) -> Path:
    """A teacher whose files ask for classes of its own; importing them creates a directory."""
    llama(directory)
    (directory / "odd.py").write_text(
        f"import os\nos.mkdir({str(canary)!r})\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\nT = None\n"
    )
    configure(
        directory,
        model_type="odd",
        auto_map={"AutoConfig": "odd.C", "AutoModelForCausalLM": "odd.M"},
    )
    shutil.copy(tokenizer_dir / "tokenizer.json", directory)
    described = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.T", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    return directory


@pytest.mark.parametrize(
    "read",
    [
        read_teacher_spec,
        load_tokenizer,
        lambda name: load_teacher(
            TeacherSpec(name, 128, 96), dtype=torch.float32, device=torch.device("cpu")
        ),
    ],
    ids=["configuration", "tokenizer", "weights"],
)
def test_remote_code_does_not_run(
    read: Callable[[str], object], tmp_path: Path, tokenizer_dir: Path
) -> None:
    canary = tmp_path / "canary"
    directory = with_code(tmp_path / "teacher", tokenizer_dir, canary)
    with pytest.raises(ModelError, match="remote code is not run") as caught:
        read(str(directory))
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    "config", [GPT2Config(), LlamaConfig(), CohereConfig()], ids=["gpt2", "llama", "cohere"]
)
def test_a_teacher_without_tokenizer_files_is_refused(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(str(tmp_path / "teacher"))
    with pytest.raises(ModelError, match="teacher' has no tokenizer files"):
        load_tokenizer(str(tmp_path / "teacher"))


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ModelError, match="has an empty vocabulary"):
        load_tokenizer(str(tmp_path))


def sharded(directory: Path) -> Path:
    """A teacher whose weights are in several files."""
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(str(directory), max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").exists()
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update(x="absent.safetensors"), "names 'absent.safe"),
        (lambda index: index["weight_map"].update(x="../x.safetensors"), "names '../x.safeten"),
        (lambda index: index["weight_map"].update(x=5), "has no weight_map from names to files"),
        (lambda index: index.pop("weight_map"), "has no weight_map from names to files"),
        (lambda index: index.pop("metadata"), "cannot be loaded: "),
        (lambda index: index.update(metadata=5), "cannot be loaded: "),
        (lambda index: index["weight_map"].clear(), "cannot be loaded: |lacks"),
    ],
)
def test_an_index_that_does_not_fit_is_one_line(
    change: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    directory = sharded(tmp_path / "teacher")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [-1, 10**30, "many", None, [1]])
def test_what_an_index_says_of_sizes_is_not_relied_on(size: object, tmp_path: Path) -> None:
    directory = sharded(tmp_path / "teacher")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] = size
    path.write_text(json.dumps(index))
    assert load(directory).spec.vocab_size == 96


def change_header(path: Path, change: Callable[[Any], object]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + length])
    change(described)
    text = json.dumps(described).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["lm_head.weight"].update(shape=[10**9, 10**6]),
        lambda tensors: tensors["lm_head.weight"].update(shape=[2**63, 2]),
        lambda tensors: tensors["lm_head.weight"].update(shape=[-1, 32]),
        lambda tensors: tensors["lm_head.weight"].update(data_offsets=[0, 10**15]),
        lambda tensors: tensors["lm_head.weight"].update(dtype="F1024"),
        lambda tensors: tensors.update(x={"dtype": "F32", "shape": [], "data_offsets": [5, 2]}),
    ],
)
def test_a_header_that_claims_the_impossible_is_one_line(
    change: Callable[[Any], object], tmp_path: Path
) -> None:
    directory = llama(tmp_path / "teacher")
    change_header(directory / "model.safetensors", change)
    with pytest.raises(ModelError, match="cannot be loaded: ") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [b"\xff" * 8, (10**8).to_bytes(8, "little"), b"\0" * 8, b"x"])
def test_a_header_of_an_impossible_length_is_one_line(start: bytes, tmp_path: Path) -> None:
    directory = llama(tmp_path / "teacher")
    path = directory / "model.safetensors"
    path.write_bytes(start + path.read_bytes()[len(start) : 5000])
    with pytest.raises(ModelError, match="cannot be loaded: "):
        load(directory)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "size", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "n_positions"]
)
@pytest.mark.parametrize("value", [10**6, 10**9, 2**63])
def test_a_configuration_of_a_huge_model_takes_no_memory(
    kind: str, size: str, value: int, tmp_path: Path
) -> None:
    if kind == "llama":
        directory = llama(tmp_path / "teacher")
    else:
        small = GPT2Config(vocab_size=96, n_positions=128, n_embd=32, n_layer=2, n_head=4)
        directory = saved(GPT2LMHeadModel(small), tmp_path / "teacher")
        named = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}
        size = named.get(size, "n_inner" if size == "intermediate_size" else size)
    configure(directory, **{size: value})
    if (kind, size) == ("llama", "n_positions"):
        load(directory)  # it has no such setting
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="its config.json (describes|has)|cannot be") as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19, "KiB"


def split_at(pattern: str) -> dict[str, object]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def replaced(content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split_at(r"(?:a|aa|a?a)+$")},
        {"pre_tokenizer": split_at("(")},
        {"pre_tokenizer": split_at("(?:" * 50_000 + ")" * 50_000)},
        {"normalizer": replaced("a" * 30_000_000)},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
        {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"model": None},
        {"added_tokens": 5},
        {"version": "9.0"},
    ],
    ids=lambda parts: str(parts)[:60],
)
def test_a_hostile_tokenizer_is_one_line(
    parts: dict[str, object], tmp_path: Path, tokenizer_dir: Path
) -> None:
    directory = tmp_path / "teacher"
    shutil.copytree(tokenizer_dir, directory)
    described = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(described | parts))
    with pytest.raises(ModelError, match="tokenizer of '.*/teacher' ") as caught:
        load_tokenizer(str(directory))
    assert "\n" not in str(caught.value)


def in_hub_cache(directory: Path, cache: Path, name: str) -> None:
    """Lay a model's files out as `huggingface_hub` keeps those that it has fetched."""
    kept = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)


def test_a_hostile_tokenizer_of_the_hub_is_one_line(tmp_path: Path, tokenizer_dir: Path) -> None:
    """It ends the child process that loads it first, and not this one."""
    hostile = llama(tmp_path / "teacher")
    shutil.copytree(tokenizer_dir, hostile, dirs_exist_ok=True)
    in_hub_cache(hostile, tmp_path, "o/whole")
    described = json.loads((hostile / "tokenizer.json").read_text())
    described["pre_tokenizer"] = split_at("(?:" * 50_000 + ")" * 50_000)
    (hostile / "tokenizer.json").write_text(json.dumps(described))
    in_hub_cache(hostile, tmp_path, "o/hostile")
    code = (
        "import sys; from trainer.models.hugging_face import load_tokenizer as load\n"
        "from trainer.runtime.errors import ModelError\n"
        "print(len(load('o/whole')))\n"
        "for name in ('o/hostile', 'o/absent'):\n"
        "    try: load(name)\n"
        "    except ModelError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    whole, refused, absent = done.stdout.splitlines()
    assert whole == "512"
    assert refused.startswith("tokenizer of 'o/hostile' cannot be loaded: tokenizer.json: ")
    assert absent.startswith("tokenizer of 'o/absent' cannot be loaded: ")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("depth", [5000, 100_000])
def test_json_nested_deeply_is_one_line(
    name: str, depth: int, tmp_path: Path, tokenizer_dir: Path
) -> None:
    directory = llama(tmp_path / "teacher")
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    path = directory / name
    path.write_text(path.read_text().rstrip()[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ModelError) as caught:
        (read_teacher_spec if name == "config.json" else load_tokenizer)(str(directory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_pipe_among_a_teachers_files_is_refused(
    name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    directory = llama(tmp_path / "teacher")
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    (directory / name).unlink()
    os.mkfifo(directory / name)
    for read in (read_teacher_spec, load_tokenizer):
        with pytest.raises(StorageError, match=f"{name}' failed: it is a pipe, not a file"):
            read(str(directory))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.bpe"]
)
def test_a_huge_description_is_refused(name: str, tmp_path: Path) -> None:
    directory = llama(tmp_path / "teacher")
    with (directory / name).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(StorageError, match=f"{name}' failed: most of its 1099511627776 bytes"):
        read_teacher_spec(str(directory))
    with pytest.raises(ModelError, match=f"{name} has 1099511627776 bytes; at most"):
        check_sizes("teacher", "x", str(directory))  # as if it had no holes
