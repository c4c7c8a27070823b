"""Time, memory and machine facts. In a process that has used a GPU, memory is the GPU's, as torch counts it."""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_functional.memory import free_bytes, give_back_freed_memory

_PAGE = 4096
IN_A_ROW = 4  # calls that are timed together on a GPU
_LAUNCH = re.compile("cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")


def resident_bytes() -> int:
    """Resident memory of this process now (its peak so far where the system does not tell)."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return _status_bytes("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Largest resident memory of this process, since :func:`reset_peak` where that is supported.

    VmHWM and not ``ru_maxrss``, which survives an exec and so would count the parent process. On a GPU, what torch
    cannot give back counts too: a CUDA graph's own memory is not among what is allocated.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM") or (most if sys.platform == "darwin" else most * 1024)


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Count the peak anew, where the system can, so that loading does not hide a small step."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def idle_bytes() -> int:
    """What this process withholds from others between steps: on a GPU also what torch keeps for its next step."""
    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else resident_bytes()


def settle(weights: Iterable[Tensor]) -> int:
    """Touch every page of the weights, drop what loading left behind, and return the resident bytes.

    Without this, weights that are mapped from a file become resident during the first step and count as the step's.
    """
    for tensor in weights:
        tensor.detach().flatten()[:: _PAGE // tensor.element_size()].float().sum()
    gc.collect()
    give_back_freed_memory()
    return resident_bytes()


def memory_limit(gib: float | None) -> int:
    """Bytes that all processes together may take: as given, else 0.9 of what is free now."""
    if gib is not None:
        return int(gib * 2**30)
    return int(0.9 * free_bytes(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")))


def synchronize() -> None:
    """Wait until a GPU that this process uses has nothing left to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call. Garbage is collected before it, and its result is dropped after the clock has stopped.

    On a GPU this is the mean of several calls in a row: as in training, none waits for the GPU to finish the last one.
    """
    gc.collect()
    synchronize()
    calls = IN_A_ROW if torch.cuda.is_initialized() else 1
    start = time.perf_counter()
    for _ in range(calls - 1):
        call()
    result = call()
    synchronize()
    seconds = (time.perf_counter() - start) / calls
    del result
    return seconds


@dataclass(frozen=True)
class Activity:
    """What a call makes a GPU do.

    Attributes:
        kernels: how many kernels, copies and fills ran.
        launches: how many calls of the host started them; a CUDA graph is one, whatever is in it.
        busy: seconds in which at least one of them ran.
    """

    kernels: int
    launches: int
    busy: float

    @classmethod
    def of(cls, events: Iterable[Any]) -> Activity:
        """From what torch's profiler recorded."""
        spans, launches, busy, end = [], 0, 0, 0
        for event in events:
            if event.device_type() == torch.autograd.DeviceType.CUDA:
                if not event.is_user_annotation():
                    spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            elif _LAUNCH.match(event.name()):
                launches += 1
        for start, stop in sorted(spans):
            busy += max(0, stop - max(start, end))
            end = max(end, stop)
        return cls(len(spans), launches, busy / 1e9)


def activity(call: Callable[[], object]) -> Activity | None:
    """What a call makes the GPU do; None in a process that uses none. The profiler slows down later launches."""
    if not torch.cuda.is_initialized():
        return None
    gc.collect()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    results: Any = profiler.profiler
    return Activity.of(results.kineto_results.events())


def use_device(device: str) -> None:
    """Let this process see what a GPU is and has free. Its workers start afresh."""
    if torch.device(device).type == "cuda":
        torch.cuda.init()


def set_threads(threads: int) -> None:
    """Fix the number of threads of this process and of the libraries of processes that it starts."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    torch.set_num_threads(threads)


def machine_facts(threads: int) -> dict[str, Any]:
    """What a reader needs to compare two runs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The facts in one line."""
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads on {machine['cpus']} CPUs, "
        f"torch {machine['torch']}"
    )
