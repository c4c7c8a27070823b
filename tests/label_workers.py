"""Processes that label the tests' tiny adapters as the ranks of a job, and that die or fail on command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from reference import random_lora, tiny_config

from lora_delta import DifferentiableDeltaCompute
from lora_delta.distributed import process_group
from lora_delta.labelling import labels, log
from lora_delta.peft.adapters import save_peft_adapter
from qwen_functional import LoraSpec, init_weights

CONFIG = tiny_config()
PROBES = [[5, 6, 7, 8], [5, 6, 9], [1]]
PER_PASS = 2
EXCEPTIONS = {kind.__name__: kind for kind in (KeyboardInterrupt, ValueError, RuntimeError)}


def save_adapters(folder: Path, names: str) -> Path:
    """An adapter for each letter; their ranks differ, so that the bits reveal which adapters share a pass."""
    for index, name in enumerate(names):
        spec = LoraSpec(rank=1 + index % 3, alpha=5)
        tensors = random_lora(CONFIG, spec, seed=index, dtype=torch.float32)
        save_peft_adapter(folder / name, spec, tensors, base_model="a/base", config=CONFIG)
    return folder


def delta(**options: Any) -> DifferentiableDeltaCompute:
    return DifferentiableDeltaCompute(CONFIG, init_weights(CONFIG, 0, torch.float32), PROBES, **options)


@dataclass(frozen=True)
class Orders:
    """What the processes are told to do.

    Attributes:
        log: a file that gets a line "rank unit" when a pass begins.
        pass_seconds: the least time that a pass takes, by rank.
        file_seconds: the pause before and after each write, rename or removal, so that a kill can come in between.
        dies_at: the file operation, counted from 0, at which the process kills itself; of a write, half gets written.
        raises: a rank, and what it raises in its first pass, once another rank has begun one too.
    """

    log: Path
    pass_seconds: dict[int, float] = field(default_factory=dict)
    file_seconds: float = 0
    dies_at: int | None = None
    raises: tuple[int, str] | None = None


def label(rank: int, world_size: int, port: int, adapters: Path, out: Path, orders: Orders) -> None:
    """One rank. The exit status is the command's: 2 after a ValueError, 130 after Ctrl-C; 3 after anything else."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank)
    )
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    _watch(rank, orders)
    try:
        with process_group("cpu"):
            labels.compute_labels(delta(), [adapters], out, adapters_per_pass=PER_PASS, progress=False)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit({ValueError: 2, KeyboardInterrupt: 130}.get(type(error), 3))


def _watch(rank: int, orders: Orders) -> None:
    finish, end_of, operations = labels._finished, log._end_of, 0

    def finished(unit: Any, *arguments: Any) -> Any:
        if unit.waiting:
            with orders.log.open("a") as file:
                file.write(f"{rank} {unit.index}\n")
            if orders.raises and orders.raises[0] == rank:
                while len({line.split()[0] for line in orders.log.read_text().splitlines()}) == 1:
                    time.sleep(0.01)
                raise EXCEPTIONS[orders.raises[1]]("on purpose")
            time.sleep(orders.pass_seconds.get(rank, 0))
        return finish(unit, *arguments)

    def slowed(operation: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def slow(*arguments: Any, **options: Any) -> Any:
            nonlocal operations
            if operations == orders.dies_at:
                if half is not None:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1
            time.sleep(orders.file_seconds)
            result = operation(*arguments, **options)
            time.sleep(orders.file_seconds)
            return result

        return slow

    @contextmanager
    def opened(path: Path, size: int) -> Iterator[Any]:
        with end_of(path, size) as file:

            def half(content: Any) -> None:
                whole = bytes(content) if isinstance(content, memoryview) else b"".join(content)
                file.write(whole[: len(whole) // 2])
                file.flush()

            yield SimpleNamespace(write=slowed(file.write, half), writelines=slowed(file.writelines, half))

    labels._finished = finished  # type: ignore[assignment]
    log._end_of = opened
    for name in ("replace", "unlink"):
        setattr(Path, name, slowed(getattr(Path, name)))


def start(n: int, adapters: Path, out: Path, orders: Orders) -> list[Any]:
    """Start the processes of a job of ``n`` ranks, forked from a server that has imported this module."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path + (os.pathsep + before if before else "")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["label_workers"])
    port = free_port()
    ranks = [context.Process(target=label, args=(rank, n, port, adapters, out, orders)) for rank in range(n)]
    try:
        for process in ranks:
            process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return ranks


def finished(ranks: list[Any], seconds: float = 60) -> list[int]:
    """The exit statuses; a process that is still running after ``seconds`` is killed, with status -9."""
    until = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0, until - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
