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

    from trainer import prepare_tokens
    from trainer.settings.layers import resolve
    from trainer.settings.values import given
    from trainer.storage.places import place

    output = place(tokens.uri, tokens.path)
    info = prepare_tokens.run(resolve(given(**settings), {}).config, output)
    tokens.metadata["train_tokens"] = info.train_tokens
    tokens.metadata["validation_tokens"] = info.validation_tokens
    tokens.metadata["vocab_size"] = info.vocab_size
    tokens.metadata["fingerprint"] = info.fingerprint
    return info.train_tokens
