"""``$(date +FORMAT)`` in an argument that never met a shell."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from trainer.runtime.errors import UsageError

_DATE = re.compile(
    r"\$\(date(?P<utc> -u)?"
    r"(?: \+(?P<plain>[\w%.:/+-]*)"
    r"| \+(?P<inner>['\"])(?P<part>[^'\"()`$]*)(?P=inner)"
    r"| (?P<outer>['\"])\+(?P<whole>[^'\"()`$]*)(?P=outer))?\)"
)

_ALLOWED = frozenset("YmdHMSsjyFTVuZz%")


def expand_dates(text: str, *, flag: str, now: datetime | None = None) -> str:
    """Replace each ``$(date +FORMAT)`` by the time, in the machine's zone (UTC with ``-u``).

    Jobs on Vertex AI receive their arguments without a shell, so the form that users type reaches
    the program as it stands. No shell is involved, and nothing else is expanded.

    Raises:
        UsageError: another ``$(…)``, backquotes, or a directive that is not supported.
    """
    moment = (now or datetime.now(UTC)).astimezone()

    def expand(match: re.Match[str]) -> str:
        pattern = match["plain"] or match["part"] or match["whole"] or "%Y%m%d-%H%M%S"
        for directive in re.findall(r"%(.?)", pattern):
            if directive not in _ALLOWED or not directive:
                raise UsageError(
                    f"--{flag}={text!r}: %{directive} is not supported; use"
                    " %Y %m %d %H %M %S %s %j %y %F %T %V %u %Z %z"
                )
        when = moment.astimezone(UTC) if match["utc"] else moment
        pattern = pattern.replace("%F", "%Y-%m-%d").replace("%T", "%H:%M:%S")
        return when.strftime(pattern.replace("%s", str(int(when.timestamp()))))

    expanded = _DATE.sub(expand, text)
    if "$(" in expanded or "`" in expanded:
        raise UsageError(f"--{flag}={text!r}: only $(date +FORMAT) is expanded, nothing else")
    return expanded
