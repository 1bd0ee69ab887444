"""Whether the service account of the stages has a right.

The account's own answer counts, where the caller may act as it for that (Service Account Token
Creator). Otherwise the policies are read: they can show that it has a right, and that it has none
only where nothing else could give it one: no folder, group, condition or role that cannot be read.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import requests
from google.api_core import exceptions as api
from google.oauth2.credentials import Credentials

from pipelines.checks.findings import Finding, GarbageError, Verdict
from pipelines.checks.google_cloud import SCOPE, Account
from pipelines.vertex import first_line

Bindings = list[dict[str, Any]]
_REFUSED = (api.GoogleAPICallError, requests.exceptions.RequestException, GarbageError)
_EVERYONE = {"allUsers", "allAuthenticatedUsers"}


@dataclass(frozen=True)
class Resource:
    """Something that the stages need rights on."""

    title: str
    project: str
    """Id or number of the project that it lies in."""
    needed: frozenset[str]
    """Permissions."""
    held: Callable[[Account], Iterable[str]]
    """Which of them an account says that it has."""
    policy: Callable[[Account], Bindings]
    """Its own bindings, as an account sees them."""
    grant: str
    """The command that gives them, up to ``--member``."""
    role: str
    """That gives them all."""


class StageAccount:
    """The account that the stages run as, as far as the caller can speak for it.

    Args:
        caller: who asks.
        email: of the account; empty is what Vertex AI takes then, Compute Engine's default one.
        project: that it is the default one of.
    """

    def __init__(self, caller: Account, email: str, project: str) -> None:
        self.caller = caller
        self._given = email
        self._project = project
        self._lock = threading.RLock()

    @property
    def email(self) -> str:
        """Of the account.

        Raises:
            GoogleAPICallError: the project's number, which a default account is named by, cannot
                be learnt; or as `Account.ask` does.
        """
        with self._lock:
            return self._given or self._default

    @functools.cached_property
    def _default(self) -> str:
        answer = self.caller.ask("cloudresourcemanager", f"v1/projects/{self._project}")
        if "projectNumber" not in answer:
            raise GarbageError("a project without a number")
        return f"{answer['projectNumber']}-compute@developer.gserviceaccount.com"

    @functools.cached_property
    def _token(self) -> Account | Exception:
        """Itself, or why the caller may not act as it."""
        if self.caller.email == self.email:
            return self.caller
        try:
            answer = self.caller.ask(
                "iamcredentials",
                f"v1/projects/-/serviceAccounts/{self.email}:generateAccessToken",
                {"scope": [SCOPE], "lifetime": "600s"},
            )
        except _REFUSED as error:
            return error
        token = answer.get("accessToken")
        if not isinstance(token, str):
            return GarbageError("an answer without an access token")
        return Account(Credentials(token))

    @property
    def itself(self) -> Account | None:
        """Requests as the account; None where the caller may not."""
        with self._lock:
            token = self._token
        return token if isinstance(token, Account) else None

    def finding(self, check: str, resource: Resource, before: str = "") -> Finding:
        """Whether it has what it needs on a resource.

        Args:
            check: its name.
            resource: what is needed, and where.
            before: what was found before.
        """
        account = self.itself
        said: str
        verdict: Verdict
        if account:
            missing = sorted(resource.needed.difference(resource.held(account)))
            verdict = "failed" if missing else "fine"
            said = f"{self.email} may {'not ' if missing else ''}use {resource.title}"
            said += f" (it lacks {', '.join(missing)})" if missing else ""
        else:
            verdict, said = self._by_policies(resource)
        mend = f"{resource.grant} --member=serviceAccount:{self.email} --role={resource.role}"
        return Finding(check, verdict, before + said, "" if verdict == "fine" else mend)

    def _by_policies(self, resource: Resource) -> tuple[Verdict, str]:
        unseen: list[str] = []
        project_id, project = self._policy_of_project(resource.project, unseen)
        try:
            own = resource.policy(self.caller)
        except _REFUSED as error:
            own = []
            unseen.append(f"the policy of {resource.title} ({first_line(error)})")
        members = {f"serviceAccount:{self.email}", *_EVERYONE}
        # Buckets name the holders of the project's basic roles so
        for role in ("owner", "editor", "viewer"):
            if _has(project, f"roles/{role}", members):
                members |= {f"project{role.title()}:{project_id}"}
        left = set(resource.needed)
        for binding in own + project:
            named = members.intersection(binding.get("members", ()))
            groups = [m for m in binding.get("members", ()) if m.startswith(("group:", "domain:"))]
            if not named and not groups:
                continue
            given = self._permissions(str(binding.get("role")), unseen) & left
            if not given:
                continue
            if binding.get("condition"):
                unseen.append("a condition of a binding")
            elif named:
                left -= given
            else:
                unseen.append(f"the members of {groups[0]}")
        if not left:
            return "fine", f"the policies let {self.email} use {resource.title}"
        lacking = f"no policy gives {self.email} {', '.join(sorted(left))} on {resource.title}"
        if unseen:
            return "unchecked", f"{lacking}, but not seen: {', '.join(dict.fromkeys(unseen))}"
        return "failed", lacking

    def _policy_of_project(self, project: str, unseen: list[str]) -> tuple[str, Bindings]:
        """The id of a project and its bindings; adds to ``unseen`` what else may give a right."""
        path, latest = f"v1/projects/{project}", {"options": {"requestedPolicyVersion": 3}}
        try:
            answer = self.caller.ask("cloudresourcemanager", f"{path}:getIamPolicy", latest)
            around = self.caller.ask("cloudresourcemanager", f"{path}:getAncestry", {})
        except _REFUSED as error:
            unseen.append(f"the policy of project {project} ({first_line(error)})")
            return project, []
        ancestors = around.get("ancestor", [])
        if len(ancestors) != 1:
            unseen.append("the policies of the folders above the project")
        # It may have been asked for by its number
        named = ancestors[0].get("resourceId", {}).get("id") if ancestors else None
        return str(named or project), bindings_of(answer)

    def _permissions(self, role: str, unseen: list[str]) -> set[str]:
        try:
            return set(self.caller.ask("iam", f"v1/{role}").get("includedPermissions", ()))
        except _REFUSED as error:
            unseen.append(f"what {role} permits ({first_line(error)})")
            return set()


def bindings_of(policy: dict[str, Any]) -> Bindings:
    """The bindings of a policy as services answer it.

    Raises:
        GarbageError: it is no policy.
    """
    bindings = policy.get("bindings", [])
    if not isinstance(bindings, list) or not all(isinstance(one, dict) for one in bindings):
        raise GarbageError("a policy without bindings")
    return bindings


def _has(bindings: Bindings, role: str, members: set[str]) -> bool:
    return any(
        binding.get("role") == role and members.intersection(binding.get("members", ()))
        for binding in bindings
    )
