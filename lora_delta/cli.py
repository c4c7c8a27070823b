"""The command line, ``lora-delta SUBCOMMAND``, and the one place where every command ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch

from .commands import check, demo, evaluate, generate, label, plot, teach, train

_EXIT_STATUS = """exit status:
  0    success
  1    it ran, but a check failed, or an adapter could not be labelled
  2    it could not run as asked: one line says why
  3    unexpected error: one line names a file with the traceback
  130  interrupted by Ctrl-C
  143  terminated by SIGTERM
"""
_FAILED, _UNFORESEEN, _INTERRUPTED, _PIPE_CLOSED, _TERMINATED = 2, 3, 130, 141, 143
_HALF_A_LINE = 1000  # characters
_FORESEEN = (ValueError, ImportError, OSError, MemoryError, torch.OutOfMemoryError)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a preempted job receives it: whatever handles Ctrl-C handles it too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status, see ``lora-delta --help``. An error is one line on stderr."""
    options = _parser().parse_args(arguments)
    with _terminated_by_exception(), _warnings_in_a_line(options.subcommand):
        try:
            status = options.run(options)
            print(end="", flush=True)
            return status
        except BrokenPipeError:  # the reader of the output has gone: `lora-delta … | head`
            _drop_stdout()
            return _PIPE_CLOSED
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            words = [str(error) or ("terminated" if terminated else "interrupted"), *getattr(error, "__notes__", ())]
            _say(options.subcommand, "; ".join(words))
            return _TERMINATED if terminated else _INTERRUPTED
        except _FORESEEN as error:
            _say(options.subcommand, _words(error))
            _drop_stdout(flush=True)
            return _FAILED
        except Exception as error:
            kind = type(error).__name__
            _say(options.subcommand, f"unexpected error, {kind}: {_words(error)}; the traceback is {_kept_traceback()}")
            return _UNFORESEEN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-delta",
        description="The behaviour of LoRA adapters as vectors, differentiable in their weights.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for command in (demo, check, label, teach, train, generate, evaluate, plot):
        command.add(subcommands)
    return parser


def _say(subcommand: str, message: str) -> None:
    rank = os.environ.get("RANK", "0")
    where = f"{subcommand} (rank {rank})" if rank != "0" else subcommand
    with suppress(OSError):  # stderr may be closed
        print(f"lora-delta {where}: {_one_line(message)}", file=sys.stderr, flush=True)


def _words(error: BaseException) -> str:
    if isinstance(error, MemoryError) and not error.args:
        return "not enough memory"
    return str(error) or type(error).__name__


def _one_line(message: str) -> str:
    """A message on one line, without control characters, and without the middle if it is very long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    return line if len(line) <= 2 * _HALF_A_LINE else f"{line[:_HALF_A_LINE]} … {line[-_HALF_A_LINE:]}"


def _kept_traceback() -> str:
    """Write the traceback of the current exception to a file; says where it is."""
    text = traceback.format_exc()
    for folder in (tempfile.gettempdir(), Path.cwd()):
        with suppress(OSError):
            handle, name = tempfile.mkstemp(prefix="lora-delta-", suffix=".txt", dir=folder)
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return f"in {name}"
    with suppress(OSError):
        print(text, file=sys.stderr)
    return "above, since no file could be written"


def _drop_stdout(flush: bool = False) -> None:
    """Keep the interpreter's last flush of stdout from failing if nobody reads it or its disk is full."""
    with suppress(OSError, ValueError):
        if flush:
            with suppress(OSError):
                sys.stdout.flush()
                return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` in the main thread, once: a second one does not disturb the cleanup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextmanager
def _warnings_in_a_line(subcommand: str) -> Iterator[None]:
    """Print warnings without the line of code that raised them, which does not help a user."""

    def in_a_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"lora-delta {subcommand}: warning: {_one_line(str(message))}\n"

    before = warnings.formatwarning
    warnings.formatwarning = in_a_line
    try:
        yield
    finally:
        warnings.formatwarning = before
