"""One process at a time in a folder, by a lock of the operating system: it vanishes with its process in any case."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # on some file systems of a network


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be. Where the system has no such locks a warning says so.

    Raises:
        ValueError: another process holds it, which the message names; ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder for labels, or none yet")
    folder.mkdir(parents=True, exist_ok=True)
    handle = _locked(folder)
    if handle is None:
        warnings.warn(f"{folder} cannot be locked on this system: run one job on it at a time", stacklevel=3)
        yield
        return
    with handle:
        handle.truncate(0)
        handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        handle.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it is gone


def _locked(folder: Path) -> TextIO | None:
    if fcntl is None:
        return None
    while True:
        handle = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_ino == (folder / LOCK).stat().st_ino:
                return handle
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another job, {_holder(handle)}: wait until it ends") from None
        except FileNotFoundError:
            pass  # its holder ended between our opening and locking it
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            handle.close()
            return None
        handle.close()


def _holder(handle: TextIO) -> str:
    with handle:
        handle.seek(0)
        try:
            facts = json.loads(handle.read())
            return f"process {facts['pid']} on {facts['host']}"
        except (ValueError, KeyError, TypeError):
            return "a process that has just begun"
