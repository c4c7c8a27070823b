"""Contenders in processes of their own, or one after the other in this one: what a worker does when it is asked."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from contenders import Contender, NotCompiledError, Pass
from measure import Activity, activity, idle_bytes, peak_bytes, reset_peak, resident_bytes, settle, timed
from report import report
from safetensors.torch import save_file
from workload import Workload

from qwen_functional.memory import keep_freed_memory

# Fresh interpreters: a forked one would begin with the parent's memory.
_SPAWN = multiprocessing.get_context("spawn")
LEFT_BEHIND = 2**28  # bytes; libraries hold less


class WorkerError(RuntimeError):
    """A worker failed or died; ``reason`` says how in a line, without the worker's name."""

    def __init__(self, name: str, reason: str, trace: str = "") -> None:
        super().__init__(f"{name}: {reason}\n{trace}".rstrip())
        self.reason = reason


@dataclass(frozen=True)
class Job:
    """What a worker is for.

    Attributes:
        make: the contender, of the workload; it goes to the process by its name.
        adapters: how many a step is timed on; its seconds are scaled up to the workload's.
        rounds: in how many it takes part, the first ones. The first job of 0 rounds is the reference of all others, and
            the errors of a second one widen their tolerance.
    """

    make: Callable[[Workload], Contender]
    workload: Workload
    adapters: int
    rounds: int


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


class _Server:
    """The worker's end."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.workload.threads)
        keep_freed_memory()  # for all contenders alike
        self.contender, self.adapters = job.make(job.workload), job.adapters
        # A GPU's first steps load kernels, and an engine's or a compiler's make graphs.
        self.unmeasured = getattr(self.contender, "warm_up", 1) if job.workload.on_gpu else 0
        self.weights = settle(self.contender.weights())

    def check(self, path: str, kept: int | None) -> tuple[Footprint, bool]:
        """One step; value and gradients, of the first ``kept`` adapters or of all, go to a safetensors file."""
        self._warm_up()
        reset_peak()
        passes = self._step()
        footprint = Footprint(self.weights, peak_bytes(), 0)  # before saving, which takes memory of its own
        written = passes is not None
        if passes is not None:
            joined = {name: torch.cat([g[name] for _, g in passes]) for name in passes[0][1]}
            joined["value"] = torch.cat([value for value, _ in passes])
            save_file({name: tensor[:kept].contiguous() for name, tensor in joined.items()}, path)
            del joined
        del passes
        gc.collect()
        return dataclasses.replace(footprint, idle=idle_bytes()), written

    def step(self) -> float:
        self._warm_up()
        return timed(self._step)

    def steady(self, steps: int) -> list[int]:
        """The resident bytes after each of so many steps."""
        return [(self._step(), resident_bytes())[1] for _ in range(steps)]

    def facts(self) -> dict[str, Any]:
        facts: Callable[[], dict[str, Any]] = getattr(self.contender, "facts", dict)
        return facts()

    def activity(self) -> Activity | None:
        """What one step makes a GPU do; only when nothing is timed any more."""
        self._warm_up()
        return activity(self._step)

    def _warm_up(self) -> None:
        for _ in range(self.unmeasured):
            self._step()
        self.unmeasured = 0

    def _step(self) -> list[Pass] | None:
        return self.contender.step(self.adapters)


_server: _Server | None = None  # of this process


def _load(job: Job | None) -> None:
    global _server
    _server = None
    gc.collect()
    _server = _Server(job) if job else None


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_server, method)(*arguments)


class Pool:
    """A process for each job, as far as they are asked for. Calls block: only one of them computes at a time.

    Args:
        local: work in this process, one job at a time: on a GPU a process takes longer to start than a contender to be
            timed.
    """

    def __init__(self, jobs: Mapping[str, Job], local: bool = False) -> None:
        self.jobs, self.local = jobs, local
        self.keep = not local and all(job.workload.is_small for job in jobs.values())
        self._alive: dict[str, ProcessPoolExecutor | None] = {}

    def only(self, *names: str) -> None:
        """End all others, but for models that are smaller than a process, and load these."""
        for name in [name for name in self._alive if name not in names and not self.keep]:
            self._stop(name)
        for name in [name for name in names if name not in self._alive]:
            held = torch.cuda.memory_reserved() if self.local and torch.cuda.is_initialized() else 0
            if held > LEFT_BEHIND:
                report(f"{held / 1e9:.2f} GB are held already, and count as memory of {name}")
            self._alive[name] = None if self.local else ProcessPoolExecutor(1, _SPAWN)
            self._run(name, _load, self.jobs[name])

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """What a method of :class:`_Server` returns.

        Raises:
            WorkerError: it failed; its process has ended.
        """
        return self._run(name, _call, method, *arguments)

    def _run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        pool = self._alive[name]
        try:
            return pool.submit(function, *arguments).result() if pool else function(*arguments)
        except Exception as error:
            failure = _failure(name, error)
        self._stop(name)
        raise failure  # out here, where the other one's frames, and all the memory that they hold, are gone

    def _stop(self, name: str) -> None:
        pool = self._alive.pop(name)
        if pool is not None:
            pool.shutdown(cancel_futures=True)
            return
        _load(None)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # it holds the graphs
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._alive):
            self._stop(name)


def _failure(name: str, error: Exception) -> WorkerError:
    # cuBLAS says it in its own way.
    if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
        return WorkerError(name, "out of memory")
    if isinstance(error, BrokenProcessPool):
        return WorkerError(name, "its process died, as one does that the system has no memory for")
    if isinstance(error, NotCompiledError):
        return WorkerError(name, str(error))
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return WorkerError(name, reason, "".join(traceback.format_exception(error)))
