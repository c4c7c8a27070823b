"""One process per job, or one for all: it loads the weights once, obeys commands, and knows its own peak memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from floor import AdapterProducts, Floor
from measure import Activity, Timing, activity, idle_bytes, peak_bytes, reset_peak, resident_bytes, settle, timed
from rivals import NotCompiledError
from safetensors.torch import save_file
from torch import Tensor
from ways import ADAPTERS, COMPILED, FLOOR, Engine, make_way
from workload import Pass, Workload

from qwen_functional.memory import keep_freed_memory

# Fresh interpreters: a forked one would begin with the parent's memory.
_CONTEXT = multiprocessing.get_context("spawn")
_FLOORS: dict[str, type[Floor] | type[AdapterProducts]] = {FLOOR: Floor, ADAPTERS: AdapterProducts}
LEFT_BEHIND = 2**28  # bytes; libraries hold less
GRAPH_STEPS = 4  # after so many a CUDA graph is there


class WorkerError(RuntimeError):
    """A worker failed or died; the message says which and how."""


class CannotRunError(WorkerError):
    """A worker's way does not fit into memory, or does not compile; ``reason`` says it without the worker's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


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

    def check(self, path: str | None, adapters: int, kept: int | None = None) -> Footprint:
        """One step of ``adapters`` adapters; the value and the gradients go to a safetensors file, if one is named,
        those of the first ``kept`` adapters or of all."""
        return self._call("check", path, adapters, kept)

    def step(self, adapters: int) -> Timing:
        """Time one step."""
        return self._call("step", adapters)

    def steady(self, steps: int, adapters: int) -> list[int]:
        """Take ``steps`` steps; the resident bytes after each."""
        return self._call("steady", steps, adapters)

    def facts(self) -> dict[str, Any]:
        """What a way tells of itself: the floor what it counts, the engine how it checkpointed."""
        return self._call("facts")

    def activity(self, adapters: int) -> Activity | None:
        """What one step makes a GPU do; to be asked when nothing is timed any more."""
        return self._call("activity", adapters)

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
            raise self._failed(*answer)
        return answer

    def _failed(self, reason: str, trace: str) -> WorkerError:
        return CannotRunError(self.name, reason) if reason else WorkerError(f"{self.name} failed:\n{trace}")

    def _died(self) -> WorkerError:
        self._process.join(timeout=10)
        return WorkerError(
            f"the process of {self.name} died with exit code {self._process.exitcode} "
            "(−9 is what running out of memory looks like)"
        )


class LocalWorker(Worker):
    """The same in this process: on a GPU a process takes longer to start than a way to be timed."""

    def __init__(self, name: str, job: Job) -> None:
        self.name, self._job = name, job
        self._server: _Server | None = None

    def wait(self) -> None:
        keep_freed_memory()
        held = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
        if held > LEFT_BEHIND:
            print(f"{held / 1e9:.2f} GB are held already, and count as memory of {self.name}", file=sys.stderr)
        self._server = self._tried(lambda: _Server(self._job))

    def stop(self) -> None:
        self._server = None
        if self._job.way == COMPILED:
            torch.compiler.reset()  # it holds the graphs
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _call(self, *command: Any) -> Any:
        name, *arguments = command
        return self._tried(lambda: getattr(self._server, name)(*arguments))

    def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            answer = _explained(error)
        # Out of the handler, as the error's frames hold what filled the memory.
        raise self._failed(*answer)


class Pool:
    """Processes by name, loaded side by side when they are asked for.

    Args:
        jobs: those that will be asked for.
        keep: load all of them at the first call and keep them to the end, or until one fails, which saves time
            where their weights are too small to matter.
        local: work in this process, each way until another one is asked for.
    """

    def __init__(self, jobs: Mapping[str, Job], keep: bool = False, local: bool = False) -> None:
        self.jobs, self.keep, self.local = jobs, keep and not local, local
        self._alive: dict[str, Worker] = {}

    @contextmanager
    def running(self, names: Sequence[str]) -> Iterator[dict[str, Worker]]:
        """Workers of the given names, the only ones unless all are kept."""
        kept = False
        if not self._alive.keys() <= set(names) and self.local:
            self.stop()
        try:
            new = [name for name in (self.jobs if self.keep else names) if name not in self._alive]
            for name in new:
                self._alive[name] = (LocalWorker if self.local else Worker)(name, self.jobs[name])
            for name in new:
                self._alive[name].wait()
            yield {name: self._alive[name] for name in names}
            kept = self.keep or self.local
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
    except Exception as error:
        connection.send((True, _explained(error)))
    finally:
        connection.close()


def _explained(error: Exception) -> tuple[str, str]:
    """In a few words why a way cannot run, or "" for what should not happen; and the traceback."""
    reason = str(error) if isinstance(error, NotCompiledError) else ""
    # cuBLAS says it in its own way.
    if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
        reason = "out of memory"
    return reason, traceback.format_exc()


class _Server:
    def __init__(self, job: Job) -> None:
        # A GPU's first steps load kernels, and an engine's or a compiler's make graphs.
        self.unmeasured = 0
        if job.workload.on_gpu:
            self.unmeasured = GRAPH_STEPS if job.way.startswith("engine") or job.way == COMPILED else 1
        floor = _FLOORS.get(job.way)
        self.way = make_way(job.way, job.workload) if floor is None else floor(job.workload)
        self.weights = settle([] if isinstance(self.way, (Floor, AdapterProducts)) else self.way.weights())
        reset_peak()

    def check(self, path: str | None, adapters: int, kept: int | None) -> Footprint:
        self._warm_up(adapters)
        reset_peak()
        passes = self._step(adapters)
        peak = peak_bytes()  # before saving, which takes memory of its own
        if passes is not None and path is not None:
            save_file({name: t[:kept] for name, t in _joined(passes).items()}, path)
        del passes
        gc.collect()
        return Footprint(self.weights, peak, idle_bytes())

    def step(self, adapters: int) -> Timing:
        self._warm_up(adapters)
        return timed(lambda: self._step(adapters))

    def steady(self, steps: int, adapters: int) -> list[int]:
        resident = []
        for _ in range(steps):
            self._step(adapters)
            resident.append(resident_bytes())
        return resident

    def facts(self) -> dict[str, Any]:
        return self.way.facts() if isinstance(self.way, (Engine, Floor, AdapterProducts)) else {}

    def activity(self, adapters: int) -> Activity | None:
        self._warm_up(adapters)
        return activity(lambda: self._step(adapters))

    def _warm_up(self, adapters: int) -> None:
        for _ in range(self.unmeasured):
            self._step(adapters)
        self.unmeasured = 0

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
