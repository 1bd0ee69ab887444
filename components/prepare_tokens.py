"""Tokenize the data set once; every context trains on the same streams."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_tokens(
    teacher_name: str,
    dataset_name: str,
    tokens: dsl.Output[dsl.Dataset],
    teacher_revision: str = "",
    dataset_config: str = "",
    dataset_revision: str = "",
    text_column: str = "text",
    hf_secret_name: str = "",
) -> int:
    """Token streams of a data set, with its tokenizer; returns the number of training tokens."""
    settings = {name: value for name, value in locals().items() if name != "tokens"}
    from trainer.runtime.commands import start_stage

    start_stage()

    from components.lineage import Lineage
    from trainer import prepare_tokens
    from trainer.data.streams import SOURCE
    from trainer.settings.layers import resolve
    from trainer.settings.values import given
    from trainer.storage.digests import as_sha256
    from trainer.storage.places import place

    output = place(tokens.uri, tokens.path)
    info = prepare_tokens.run(resolve(given(**settings), {}).config, output)
    tokens.metadata["train_tokens"] = info.train_tokens
    tokens.metadata["validation_tokens"] = info.validation_tokens
    tokens.metadata["vocab_size"] = info.vocab_size
    source, tokenizer = str(info.dataset.get(SOURCE, "")), info.tokenizer_fingerprint
    lineage = Lineage(data_set=as_sha256(source), tokenizer=as_sha256(tokenizer))
    lineage.give(tokens, as_sha256(info.fingerprint))
    return info.train_tokens
