"""Writing files so that nothing is lost, and folders that one job holds at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"
UNFINISHED = ".unfinished"


@contextmanager
def replaces(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """A name next to ``path`` to write to: at the end that file becomes ``path``, whole; after an error, it is removed.

    The folder is made if needed. Without ``sync``, for what can be made again and is checked when it is read, a power
    cut may leave an incomplete file.

    Raises:
        OSError: it cannot be written, such as on a full disk, also where torch and safetensors raise other errors.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        if sync:
            with unfinished.open("rb") as handle:
                os.fsync(handle.fileno())  # or a power cut could leave an empty file under the new name
        unfinished.replace(path)
        if sync:
            sync_folder(path.parent)
    except BaseException as error:
        cause = error
        if isinstance(error, Exception) and not isinstance(error, (OSError, ValueError)):
            cause = _not_written(unfinished, error) or error
        with suppress(OSError):  # the first error is the one that counts
            unfinished.unlink(missing_ok=True)
        if isinstance(cause, OSError) and cause.errno and cause.filename in (None, str(unfinished)):
            cause.filename = str(path)
        if cause is error:
            raise
        raise cause from error


def _not_written(path: Path, error: Exception) -> OSError | None:
    """The system's error if a file cannot be written: safetensors passes its number on, torch does not."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    try:
        with path.open("ab") as handle:
            handle.write(bytes(1 << 16))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as cause:
        return cause
    return None


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: until then a power cut may undo a rename. Does nothing if this fails."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as readable JSON, with :func:`replaces`."""
    with replaces(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold a folder, which is made if needed, and remove what killed jobs have left half written in it.

    The lock is the operating system's: it always ends with its process. Where there are no locks, a warning says so.

    Raises:
        ValueError: another process holds it, which the message names; ``folder`` is a file.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder, or none yet")
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK, timeout=0), folder / LOCK
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder} is in use by another job, {_holder(holder)}: wait until it ends") from None
    except NotImplementedError:  # some network file systems
        warnings.warn(f"{folder} cannot be locked on this system: run one job on it at a time", stacklevel=3)
        yield
        return
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        clear_unfinished(folder)
        yield
    finally:
        with suppress(OSError):
            holder.unlink()  # while it is held: a filelock that locks a file which is gone notices, and starts over
        lock.release()


def clear_unfinished(folder: Path, name: str = "") -> None:
    """Remove the files and folders that a killed process was writing by :func:`replaces` in ``folder``; with a name,
    only those of that name.

    The caller holds the folder, or the right to write that name: nothing that is being written now is removed.
    """
    for path in folder.iterdir():
        if path.name.endswith(UNFINISHED) and path.name.startswith(f"{name}." if name else ""):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _holder(lock: Path) -> str:
    try:
        facts = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just started"
