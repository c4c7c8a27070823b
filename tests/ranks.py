"""Processes of one torch.distributed group (gloo), kept alive, for the tests that need several."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("spawn")
_SECONDS = 120


class Ranks:
    """``size`` processes; :meth:`call` runs a function in all of them, which may use collectives."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        pipes = [_CONTEXT.Pipe() for _ in range(size)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            _CONTEXT.Process(target=_serve, args=(rank, size, str(store), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function`` returns on each rank; a spawned process must be able to import it."""
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(_SECONDS):
                raise TimeoutError(f"rank {rank} has not answered in {_SECONDS} s")
            answers.append(connection.recv())
        for rank, (failed, answer) in enumerate(answers):
            assert not failed, f"rank {rank} failed:\n{answer}"
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((False, function(*arguments)))
        except Exception:
            connection.send((True, traceback.format_exc()))
