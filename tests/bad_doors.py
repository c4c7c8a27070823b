"""Doors that do what none may. The bench of ``fuzz.py`` must notice each, or its verdict on the others means little."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from random import Random

from doors import KINDS, Kind


def _writes_beside(folder: Path, chance: Random) -> None:
    (folder / ".." / "escaped").write_text("")


def _writes_elsewhere(folder: Path, chance: Random) -> None:
    os.close(os.open(folder.parents[1] / "outside" / "new", os.O_CREAT | os.O_WRONLY))


def _runs(folder: Path, chance: Random) -> None:
    os.system("true")


def _connects(folder: Path, chance: Random) -> None:
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))


def _raises(folder: Path, chance: Random) -> None:
    raise KeyError("a")


def _says_nothing(folder: Path, chance: Random) -> None:
    raise ValueError("no")


def _asks_for_too_much(folder: Path, chance: Random) -> None:
    bytearray(3 << 30)


def _swells(folder: Path, chance: Random) -> None:
    bytearray(b"x") * (5 << 27)


def _dies(folder: Path, chance: Random) -> None:
    os.kill(os.getpid(), signal.SIGABRT)


def _hangs(folder: Path, chance: Random) -> None:
    time.sleep(60)


# What the bench reports for each.
BAD = {
    _writes_beside: "outside",
    _writes_elsewhere: "outside",
    _runs: "outside",
    _connects: "outside",
    _raises: "raised",
    _says_nothing: "names nothing",
    _asks_for_too_much: "memory",
    _swells: "memory",
    _dies: "died with -6",
    _hangs: "hangs",
}


def add() -> dict[str, str]:
    """Add them to the kinds; returns {kind: what the bench should report}."""
    for door in BAD:
        KINDS[door.__name__] = Kind((), door, "something", seconds=2.0)
    return {door.__name__: what for door, what in BAD.items()}
