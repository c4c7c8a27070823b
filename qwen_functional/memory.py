"""How much memory is free, and how the process holds on to it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``, those that torch or the C library holds in reserve included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_bytes(), _cgroup_bytes()) + _heap_bytes()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MMAP_THRESHOLD = 32 << 20  # the most that glibc takes
_TRIM_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocation: for a process that repeats a step.

    By default glibc gives large freed blocks back to the system at once, and the next step faults every page in
    again. What ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` in the environment do from the start. It
    changes the whole process, so the library never calls it; the longer commands of ``lora-delta`` and the benchmarks
    do.

    Returns:
        Whether the C library took it; False where it is another than glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def give_back_freed_memory() -> bool:
    """Give the pages of freed blocks back to the system, so that what is resident is what is in use; for measuring.

    Returns:
        Whether there were any; False where the C library is another than glibc.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of mallinfo(3), glibc 2.33 or later."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _heap_bytes() -> int:
    """Freed blocks that glibc has not given back, which the system counts as used; 0 where it does not tell.

    Without them a second step, whose memory the first one has left in the heap, would seem to have less than it had.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo2.restype = _Mallinfo2
    return mallinfo2().fordblks


def _system_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts the page cache as free, which sysconf does not
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_bytes() -> int:
    """What a container's limit leaves (cgroup v2); a very large number where there is no limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return max(0, int(limit) - used) if limit != "max" else 1 << 62
    except (OSError, ValueError):
        return 1 << 62
