"""The Hugging Face token, from five sources, never shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from trainer.runtime.errors import LiquidError, StorageError, UsageError
from trainer.runtime.log import hide, log
from trainer.settings.config import TrainConfig
from trainer.storage.files import in_home, read_regular
from trainer.storage.places import read_bytes

_LIMIT = 4096
"""Bytes of what holds a token."""

ENVIRONMENT_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def find_hf_token(config: TrainConfig, environ: Mapping[str, str] = os.environ) -> str | None:
    """The first token found: environment, value, file, object, Secret Manager; else None.

    Once found it is hidden from everything that is logged.

    Raises:
        LiquidError: a source was named, none before it had a token, and it cannot be read or
            holds something else.
    """
    token, source = next(
        ((environ[name].strip(), name) for name in ENVIRONMENT_NAMES if environ.get(name)), ("", "")
    )
    readers: dict[str, Callable[[str], str]] = {
        "hf_token_value": str.strip,
        "hf_token_file": _from_file,
        "hf_token_gcs_uri": _from_object,
        "hf_secret_name": _from_secret_manager,
    }
    for name, read in readers.items():
        if not token and getattr(config, name):
            token, source = read(getattr(config, name)), f"--{name}"
    if not token:
        return None
    hide(token)
    if not (token.isascii() and token.isprintable() and " " not in token):
        # It fits no HTTP header; quoted in a message, it would not match what is hidden
        raise UsageError(f"{source} holds no token: it has spaces or other such characters")
    log.info("Hugging Face token taken from %s", source)
    return token


def _from_file(path: str) -> str:
    named = f"--hf_token_file={path!r}"
    try:
        token = read_regular(in_home(path, named), limit=_LIMIT).decode("utf-8").strip()
    except StorageError as error:
        raise UsageError(f"--hf_token_file: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(f"{named} cannot be read: {reason}") from None
    return _not_empty(token, named)


def _from_object(uri: str) -> str:
    try:
        token = read_bytes(uri, limit=_LIMIT).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise UsageError(f"--hf_token_gcs_uri={uri!r} does not hold text") from None
    return _not_empty(token, f"--hf_token_gcs_uri={uri!r}")


def _from_secret_manager(name: str) -> str:
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import secretmanager
    except ImportError:
        raise LiquidError(
            "--hf_secret_name needs google-cloud-secret-manager; install liquid-annealing[cloud]"
        ) from None
    version = name if "/versions/" in name else f"{name}/versions/latest"
    try:
        client = secretmanager.SecretManagerServiceClient()
        response = client.access_secret_version(name=version, timeout=30.0)
    except (GoogleAPIError, GoogleAuthError) as error:
        reason = getattr(error, "message", None) or str(error)
        raise LiquidError(f"--hf_secret_name={name!r} cannot be read: {reason}") from None
    return _not_empty(response.payload.data.decode("utf-8").strip(), f"--hf_secret_name={name!r}")


def _not_empty(token: str, source: str) -> str:
    if not token:
        raise UsageError(f"{source} holds no token: it is empty")
    return token
