"""The connection to open-source Kubeflow Pipelines, and its failures in one line each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import kfp
import kfp_server_api
import requests
import urllib3

from pipelines.settings import DEFAULT_FILE
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.log import hide

REQUEST_SECONDS = 10.0


def token_from_environment() -> str | None:
    """``KFP_TOKEN``, kept out of everything that is logged.

    Raises:
        UsageError: it has characters that no HTTP header takes.
    """
    token = os.environ.get("KFP_TOKEN", "").strip()
    if not token:
        return None
    hide(token)
    if not (token.isascii() and token.isprintable()):
        raise UsageError("KFP_TOKEN holds characters that no token has; copy it again")
    return token


def connect(host: str, token: str | None, namespace: str) -> tuple[kfp.Client, str | None]:
    """Connect, after one quick request: the client alone would retry long before it gives up.

    Args:
        host: URL of the interface.
        token: for its Authorization header.
        namespace: of the user, where the server has several; empty is what the client knows.

    Returns:
        The client, and the namespace to name in its calls: None where the server has one user.

    Raises:
        UsageError: ``host`` is no URL, or has several users and no namespace is known.
        LiquidError: nothing answers there, or something else does.
    """
    if not host.startswith(("http://", "https://")):
        raise UsageError(f"HOST={host!r} must start with http:// or https://")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        url = f"{host.rstrip('/')}/apis/v2beta1/healthz"
        answer = requests.get(url, headers=headers, timeout=REQUEST_SECONDS, allow_redirects=False)
    except requests.exceptions.RequestException as error:
        raise LiquidError(f"{host} cannot be reached: {_one_line(error)}; check HOST") from None
    if answer.is_redirect:
        raise LiquidError(
            f"{host} redirects to {answer.headers['Location'][:100]}, a login perhaps; check HOST"
            " and KFP_TOKEN"
        )
    if not answer.ok:
        raise LiquidError(_refusal(host, answer.status_code, answer.reason, answer.text))
    health = None
    with contextlib.suppress(ValueError):
        health = answer.json()
    if not isinstance(health, dict):
        raise LiquidError(
            f"{host} answers, but not as Kubeflow Pipelines does; check HOST and KFP_TOKEN"
        )
    # kfp logs tracebacks of its own beside the exceptions it raises
    logging.getLogger().setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with readable_errors(host):
        client = kfp.Client(host=host, existing_token=token)
    if not health.get("multi_user"):
        return client, None
    # In a notebook of Kubeflow, the client knows it
    namespace = namespace or client.get_user_namespace()
    if not namespace:
        raise UsageError(
            f"missing: NAMESPACE (your profile's: {host} serves several users). Set it in the"
            f" environment, as make NAMESPACE=…, or in {DEFAULT_FILE}"
        )
    return client, namespace


@contextlib.contextmanager
def readable_errors(host: str) -> Iterator[None]:
    """Turn what the client raises into one line.

    Raises:
        LiquidError: what failed and what to do.
    """
    try:
        yield
    except kfp_server_api.ApiException as error:
        raise LiquidError(_refusal(host, error.status, error.reason, error.body)) from None
    except (urllib3.exceptions.HTTPError, TimeoutError, OSError) as error:
        raise LiquidError(f"{host} cannot be reached: {_one_line(error)}") from None


def _refusal(host: str, status: int, reason: str, body: Any) -> str:
    """What the server says, from its JSON where it sent some."""
    with contextlib.suppress(ValueError, TypeError):
        content = json.loads(body)
        if isinstance(content, dict):
            said = content.get("error_description") or content.get("message")
            said = said or content.get("error")
            if isinstance(said, dict):
                said = said.get("message")
            reason = f"{reason}: {_one_line(said)}" if said else reason
    advice = "; check KFP_TOKEN" if status in (401, 403) else ""
    return f"{host} refused the run: {status} {reason}{advice}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]


def look(client: kfp.Client, host: str, run_id: str) -> tuple[str, dict[str, str]]:
    """The state of a run; the states of its tasks are not looked at.

    Raises:
        LiquidError: it cannot be looked at.
    """
    with readable_errors(host):
        return str(client.get_run(run_id).state or ""), {}
