"""One process per job: it loads the weights once, obeys commands, and knows its own peak memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from floor import AdapterProducts, Floor
from measure import Timing, idle_bytes, peak_bytes, reset_peak, resident_bytes, settle, timed
from safetensors.torch import save_file
from torch import Tensor
from ways import ADAPTERS, FLOOR, Engine, make_way
from workload import Pass, Workload

from qwen_functional.memory import keep_freed_memory

# Fresh interpreters: a forked one would begin with the parent's memory.
_CONTEXT = multiprocessing.get_context("spawn")
_FLOORS: dict[str, type[Floor] | type[AdapterProducts]] = {FLOOR: Floor, ADAPTERS: AdapterProducts}


class WorkerError(RuntimeError):
    """A worker failed or died; the message says which and how."""


@dataclass(frozen=True)
class Job:
    """What a worker is for: a way of doing a workload."""

    way: str
    workload: Workload


@dataclass(frozen=True)
class Footprint:
    """Resident bytes of a worker's process; those on the GPU where it uses one.

    Attributes:
        weights: with the base weights loaded and touched, before any step.
        peak: the largest since then, through a whole step.
        idle: between steps.
    """

    weights: int
    peak: int
    idle: int


class Worker:
    """The parent's end. Commands block: only one worker computes at a time."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Return when the weights are loaded; call it once, before any command."""
        self._receive()

    def check(self, path: str | None, adapters: int) -> Footprint:
        """One step of ``adapters`` adapters; the value and the gradients go to a safetensors file, if one is named."""
        return self._call("check", path, adapters)

    def step(self, adapters: int) -> Timing:
        """Time one step."""
        return self._call("step", adapters)

    def steady(self, steps: int, adapters: int) -> list[int]:
        """Take ``steps`` steps; the resident bytes after each."""
        return self._call("steady", steps, adapters)

    def facts(self) -> dict[str, Any]:
        """What a way tells of itself: the floor what it counts, the engine how it checkpointed."""
        return self._call("facts")

    def stop(self) -> None:
        """End the process, whatever state it is in."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, *command: Any) -> Any:
        try:
            self._connection.send(command)
        except OSError as error:
            raise self._died() from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if failed:
            raise WorkerError(f"{self.name} failed:\n{answer}")
        return answer

    def _died(self) -> WorkerError:
        self._process.join(timeout=10)
        return WorkerError(
            f"the process of {self.name} died with exit code {self._process.exitcode} "
            "(−9 is what running out of memory looks like)"
        )


class Pool:
    """Processes by name, loaded side by side when they are asked for.

    Args:
        jobs: those that will be asked for.
        keep: load all of them at the first call and keep them to the end, or until one fails, which saves time
            where their weights are too small to matter.
    """

    def __init__(self, jobs: Mapping[str, Job], keep: bool = False) -> None:
        self.jobs, self.keep = jobs, keep
        self._alive: dict[str, Worker] = {}

    @contextmanager
    def running(self, names: Sequence[str]) -> Iterator[dict[str, Worker]]:
        """Workers of the given names, the only ones unless all are kept."""
        kept = False
        try:
            new = [name for name in (self.jobs if self.keep else names) if name not in self._alive]
            for name in new:
                self._alive[name] = Worker(name, self.jobs[name])
            for name in new:
                self._alive[name].wait()
            yield {name: self._alive[name] for name in names}
            kept = self.keep
        finally:
            if not kept:
                self.stop()

    def stop(self) -> None:
        """End every process."""
        while self._alive:
            self._alive.popitem()[1].stop()


def _serve(connection: Connection, job: Job) -> None:
    """The worker's end: answer (failed, value) to each command until the parent hangs up."""
    try:
        torch.set_num_threads(job.workload.threads)
        keep_freed_memory()  # for all ways alike
        server = _Server(job)
        connection.send((False, None))
        while True:
            name, *arguments = connection.recv()
            connection.send((False, getattr(server, name)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        connection.send((True, traceback.format_exc()))
    finally:
        connection.close()


class _Server:
    def __init__(self, job: Job) -> None:
        floor = _FLOORS.get(job.way)
        self.way = make_way(job.way, job.workload) if floor is None else floor(job.workload)
        self.weights = settle([] if isinstance(self.way, (Floor, AdapterProducts)) else self.way.weights())
        reset_peak()

    def check(self, path: str | None, adapters: int) -> Footprint:
        passes = self._step(adapters)
        peak = peak_bytes()  # before saving, which takes memory of its own
        if passes is not None and path is not None:
            save_file(_joined(passes), path)
        del passes
        gc.collect()
        return Footprint(self.weights, peak, idle_bytes())

    def step(self, adapters: int) -> Timing:
        return timed(lambda: self._step(adapters))

    def steady(self, steps: int, adapters: int) -> list[int]:
        resident = []
        for _ in range(steps):
            self._step(adapters)
            resident.append(resident_bytes())
        return resident

    def facts(self) -> dict[str, Any]:
        return self.way.facts() if isinstance(self.way, (Engine, Floor, AdapterProducts)) else {}

    def _step(self, adapters: int) -> list[Pass] | None:
        if isinstance(self.way, (Floor, AdapterProducts)):
            self.way.step()
            return None
        return self.way.step(adapters)


def _joined(passes: list[Pass]) -> dict[str, Tensor]:
    """{"value": (G, P, H), PEFT name: gradient (G, …)} of all passes together."""
    gradients = {name: torch.cat([g[name] for _, g in passes]).contiguous() for name in passes[0][1]}
    return {"value": torch.cat([value for value, _ in passes]).contiguous(), **gradients}


def use_device(device: str) -> None:
    """Let this process see what a GPU is and has free. Its workers begin anew."""
    if torch.device(device).type == "cuda":
        torch.cuda.init()


def set_threads(threads: int) -> None:
    """Fix the number of threads of this process and, before they start, of the workers' libraries."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    torch.set_num_threads(threads)
