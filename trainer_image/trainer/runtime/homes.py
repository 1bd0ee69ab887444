"""A home directory and a user's name for processes that have none, as OpenShift starts them.

There a container runs under any user id, without an entry in /etc/passwd, and its root file system
may be read-only. Libraries keep caches in the home directory, and name some by the user.
"""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from pathlib import Path

from trainer.runtime.errors import UsageError


def find_home() -> None:
    """Name a home directory that can be written, and a user, where the process has none.

    Both go into the environment, for its children too. Called before libraries that look for their
    caches are imported.

    Raises:
        UsageError: no directory for temporary files can be written either.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"
    home = Path(os.path.expanduser("~"))
    if not (home.is_absolute() and home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        os.environ["HOME"] = str(_temporary_home())


def _temporary_home() -> Path:
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise UsageError(
            "no directory for temporary files can be written; mount one and name it by TMPDIR"
        ) from None
    home = parent / f"liquid-home-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    status = home.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    # Whoever else may write there could put code into the caches
    if ours and not status.st_mode & 0o022:
        return home
    return Path(tempfile.mkdtemp(prefix="liquid-home-"))
