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

_STATUS = Path("/proc/self/status")
_PAGE = 4096


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes, None where there is no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def resident_bytes() -> int:
    """Resident memory of this process now (its peak so far where the system does not tell)."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return _status_bytes("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Largest resident memory of this process, since :func:`reset_peak` where that is supported.

    VmHWM and not ``ru_maxrss``: the latter survives an exec, and so would count the parent process. On a GPU what torch
    cannot give back counts too, since a CUDA graph's own memory is not among what is allocated.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved())
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Start counting the peak anew, so that loading does not hide a small step; False if not supported."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def idle_bytes() -> int:
    """What this process withholds from others between steps: on a GPU also what torch keeps for its next step."""
    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else resident_bytes()


def settle(weights: Iterable[Tensor]) -> int:
    """Touch every page of the weights, drop what loading left behind, and return the resident bytes.

    Without this, weights that are mapped from a file become resident during the first step and would be
    counted as the step's own.
    """
    for tensor in weights:
        tensor.detach().flatten()[:: _PAGE // tensor.element_size()].float().sum()
    gc.collect()
    trim()
    return resident_bytes()


def trim() -> None:
    """Give freed heap back to the system, where the C library can."""
    if sys.platform == "linux":
        import ctypes

        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            return  # a C library without malloc_trim


def available_bytes() -> int | None:
    """Memory that new processes can take, None where the system does not tell."""
    if torch.cuda.is_initialized():
        return torch.cuda.mem_get_info()[0]
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free  # no control group, or one without a limit
    return min(free, max(limit, 0))


def memory_limit(gib: float | None) -> int | None:
    """Bytes that all processes together may take: as said, else 0.9 of what is free now, where that can be told."""
    if gib is not None:
        return int(gib * 2**30)
    free = available_bytes()
    return None if free is None else int(0.9 * free)


IN_A_ROW = 4  # calls that are timed together on a GPU


@dataclass(frozen=True)
class Timing:
    """One timed call.

    Attributes:
        seconds: wall-clock time.
        others: the mean number of CPUs that other processes kept busy meanwhile; None where it cannot be told.
    """

    seconds: float
    others: float | None


def timed(call: Callable[[], object]) -> Timing:
    """Time a call. Garbage is collected before it, and what it returns is dropped after the clock has stopped.

    On a GPU it is the mean of several in a row: as in training, none waits until the GPU has done the one before.
    """
    gc.collect()
    synchronize()
    calls = IN_A_ROW if torch.cuda.is_initialized() else 1
    busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    for _ in range(calls - 1):
        call()
    result = call()
    synchronize()
    seconds = (time.perf_counter() - start) / calls
    busy_after, own_after = _busy_seconds(), _own_seconds()
    del result
    if busy is None or busy_after is None or torch.cuda.is_initialized():  # a GPU's steps are too short to tell
        return Timing(seconds, None)
    # The machine's clock ticks a hundred times a second: short steps give nonsense outside of the possible.
    others = ((busy_after - busy) - (own_after - own)) / seconds
    return Timing(seconds, min(max(others, 0.0), float(os.cpu_count() or 1)))


def synchronize() -> None:
    """Wait until a GPU that this process uses has nothing left to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Activity:
    """What a call makes a GPU do.

    Attributes:
        kernels: how many kernels, copies and fills ran.
        launches: by how many calls of the host; a CUDA graph is one, whatever is in it.
        busy: seconds in which one of them ran, or several.
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


_LAUNCH = re.compile("cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")


def activity(call: Callable[[], object]) -> Activity | None:
    """What a call makes the GPU do; None in a process that uses none.

    The profiler leaves something behind that slows down later launches: time first.
    """
    if not torch.cuda.is_initialized():
        return None
    gc.collect()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    results: Any = profiler.profiler
    return Activity.of(results.kineto_results.events())


def _own_seconds() -> float:
    """CPU time of this process, all threads."""
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float | None:
    """CPU time that was not idle on the whole machine, what a hypervisor took included."""
    try:
        first, *_ = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, first.split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine_facts(threads: int) -> dict[str, Any]:
    """What a reader needs to compare two runs."""
    return {
        "cpu": _cpu_name(),
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
