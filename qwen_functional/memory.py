"""How much memory is free, and how the process holds on to it."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``, including those that torch or the C library holds in reserve."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_bytes(), cgroup_bytes()) + _heap_bytes()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor.to(device)``, from the host's memory without waiting for what a GPU has still to do.

    The driver has taken a copy of pageable memory by the time that it returns: the tensor may be changed or freed.
    """
    return tensor.to(device, non_blocking=True)


_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MMAP_THRESHOLD = 32 << 20  # the most that glibc accepts
_TRIM_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for its next allocation: for a process that repeats a step.

    By default glibc gives large freed blocks back to the system at once, and the next step faults every page in
    again. ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` in the environment do the same from the start. It
    affects the whole process, so the library never calls it; the longer commands of ``lora-delta`` and the benchmarks
    do.

    Returns:
        Whether the C library accepted it; False if it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def use_huge_pages() -> None:
    """Let torch ask for huge pages for large tensors on the CPU, unless ``THP_MEM_ALLOC_ENABLE`` says otherwise.

    Where Linux grants them on request, writing a new tensor of hundreds of megabytes takes half as long, but more
    memory is resident, as pages are given whole. Call it before making the first tensor: torch reads the setting then,
    and only once. Like :func:`keep_freed_memory` it affects the whole process, and no other one.
    """
    if _HUGE_PAGES not in os.environ:
        os.environ[_HUGE_PAGES] = "1"
        torch.empty(1)
        del os.environ[_HUGE_PAGES]  # processes that this one starts decide for themselves


def give_back_freed_memory() -> bool:
    """Give the pages of freed blocks back to the system, so that resident memory is memory in use; for measuring.

    Returns:
        Whether there were any; False if the C library is not glibc.
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
    """Freed blocks that glibc has not given back, which the system counts as used; 0 where glibc does not report them.

    Without them a second step, which reuses memory that the first one left in the heap, would seem to have too little.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo2.restype = _Mallinfo2
    return mallinfo2().fordblks


def _system_bytes(root: Path = Path("/")) -> int:
    try:
        # Counts the page cache as free, which sysconf does not.
        return _field(root / "proc/meminfo", "MemAvailable:") * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Controller(NamedTuple):
    """Where a version of Linux's control groups reports memory."""

    mount: str
    limit: str
    used: str
    cached: str  # the field of memory.stat: pages of files that the kernel reclaims when memory runs short


_V1 = _Controller("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Controller("", "memory.max", "memory.current", "inactive_file")
_HYBRID = _V2._replace(mount="unified")
_NO_LIMIT = 1 << 62


def cgroup_bytes(root: Path = Path("/")) -> int:
    """Bytes left by the limits of this process's control groups, versions 1 and 2; a very large number without any.

    The limits of the group itself and of all its ancestors count. A container often sees its own group as the root,
    though ``/proc/self/cgroup`` names it as the host does: groups that do not exist are skipped.

    Args:
        root: that of the file system, for tests.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    left = _NO_LIMIT
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        own = Path(path.lstrip("/"))
        for controller in (_V1,) if controllers else (_V2, _HYBRID):
            mount = root / "sys/fs/cgroup" / controller.mount
            left = min([left, *(_left_in(mount / group, controller) for group in (own, *own.parents))])
    return left


def _left_in(group: Path, controller: _Controller) -> int:
    try:
        limit = int((group / controller.limit).read_text())
        used = int((group / controller.used).read_text())
    except (OSError, ValueError):  # no such group, or a limit of "max"
        return _NO_LIMIT
    with suppress(OSError, ValueError):
        used -= _field(group / "memory.stat", controller.cached)
    return max(0, limit - used)


def _field(file: Path, name: str) -> int:
    """A number from a file whose lines are a name and a number."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    raise ValueError(f"{file} has no {name}")
