"""Several processes on one job, as ``torchrun`` starts them: their ranks, and what they exchange.

torch.distributed does the work: gloo on CPUs, NCCL on GPUs. Code written for several ranks runs unchanged in a single
process. A mesh has up to two dimensions: ``"dp"`` splits the adapters, ``"tp"`` the base model, by heads and neurons,
with two sums over its ranks per block in each direction. LoRA tensors go in whole, deltas and gradients come out whole,
the same bits on every rank::

    # torchrun --nproc-per-node 2 this_file.py
    import torch
    from lora_delta import DifferentiableDeltaCompute
    from lora_delta.embedded import embedded_checkpoint


    def main():
        mesh = torch.distributed.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        # Each rank reads its part; device is that of the mesh.
        delta = DifferentiableDeltaCompute.from_pretrained(embedded_checkpoint(), mesh=mesh, device="cpu")
        tensors = {name: torch.full((4, *shape), 0.01, requires_grad=True) for name, shape in delta.lora_shapes.items()}
        delta(tensors).square().sum().backward()


    torch.distributed.init_process_group()
    main()
    torch.distributed.destroy_process_group()

A mesh, and a delta on it, must be gone when the script ends, as they are here when ``main`` returns. As long as
something holds a gloo group, its threads keep running, and a thread that releases a Python object while Python shuts
down aborts the process (pytorch/pytorch#190489): with ``mesh`` and ``delta`` global, 12 of 25 runs of this example
aborted; as written, none of 25. DistributedDataParallel never releases its group: :func:`process_group`, in place of
the last lines, gives the threads time at its end, and none of 25 runs aborted with ``mesh`` and ``delta`` global.

**Training.** If the base model and a pass of adapters fit on one GPU, give each GPU its own part of every batch::

    torchrun --nproc-per-node 8 -m lora_delta train run.toml

Losses, parameters and checkpoints are those of one process, and a run can be resumed with any number of processes;
``batch_size`` and ``delta_batch_size`` must be multiples of the number of parts. If the base does not fit, write
``tensor_parallel = 8`` (or 4, or 2) into ``run.toml``: each group of this many processes holds it together, and the
groups share the batch. The number must divide the model's key-value heads: 2 in Qwen2.5 up to 3B, 4 in 7B, 8 from 14B
on. If it still does not fit, ``stream = true`` leaves the base on disk and brings one block at a time to the GPU.
``benchmarks/scale_plan.py`` predicts what a step takes on which mesh.

**Labels.** One process per GPU; on a CPU, each process has ``OMP_NUM_THREADS`` cores, by default one::

    torchrun --nproc-per-node 8 -m lora_delta label --model Qwen/Qwen2.5-7B --out deltas 'teachers/*'

Adapters are handed out one pass at a time, and every pass is on disk when it is done. If one process is killed, or all
of them, the same command resumes the job with any number of processes: only the unfinished passes are lost, and each
delta is, to the bit, that of an uninterrupted run on that machine. A resumed job keeps the number of threads it began
with, as the last bits depend on it. A second job on the same folder says so and stops. With torchrun's ``--nnodes``
several machines share the work, if all of them see the folder.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Told = tuple[str, str]  # an exception's kind and its message
_SAME_KIND: tuple[type[BaseException], ...] = (KeyboardInterrupt, ValueError, ImportError, OSError)


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    Attributes:
        rank: of this process, from 0.
        world_size: how many there are.
        device: the one on which :func:`process_group` has this process compute; None elsewhere.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None

    @classmethod
    def current(cls, device: torch.device | None = None) -> Ranks:
        """Those of torch.distributed's default group; without one this process is alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all ranks: anything that can be pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """The result of a function that only rank 0 calls; an exception there is raised on all ranks."""
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]
        raised = None
        if self.rank == 0:
            try:
                answer = [function(), None]
            except BaseException as error:
                raised, answer = error, [None, told(error)]
        dist.broadcast_object_list(answer)
        if raised is not None:
            raise raised
        if answer[1] is not None:
            raise as_told(0, answer[1])
        return answer[0]

    def counters(self) -> Counters:
        """New counts, at zero, that all ranks share. A collective call; the counts live as long as those of rank 0."""
        if self.world_size == 1:
            return Counters(None)
        store = None
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR") or socket.gethostname()
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        host, port = self.first(lambda: (store.host, store.port))  # type: ignore[union-attr]
        return Counters(store or dist.TCPStore(host, port, is_master=False))


class Counters:
    """Counts by name. Additions are atomic over all ranks and threads."""

    def __init__(self, store: dist.Store | None) -> None:
        self._store, self._own = store, Counter[str]()

    def add(self, name: str, amount: int = 1) -> int:
        """Add to a count, which begins at 0; returns what it is then."""
        if self._store is not None:
            return self._store.add(name, amount)
        self._own[name] += amount
        return self._own[name]


def told(error: BaseException) -> Told:
    """An exception in words that every other rank can read."""
    kind = next((kind for kind in _SAME_KIND if isinstance(error, kind)), None)
    if kind is not None:
        return kind.__name__, str(error)
    return type(error).__name__, f"{type(error).__name__}: {error}"


def as_told(rank: int, words: Told) -> BaseException:
    """The exception of another rank, to be raised here: of the same kind where the exit status depends on it."""
    for kind in _SAME_KIND:
        if kind.__name__ == words[0]:
            return kind(words[1])
    return RuntimeError(f"rank {rank} failed: {words[1]}")


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """torch.distributed's default group for a command that ``torchrun`` has started; destroyed at the end.

    gloo on CPUs; on GPUs NCCL, with gloo for what is not on a GPU. Without ``torchrun`` (RANK and WORLD_SIZE are not
    in the environment) the process is alone, and there is no group.

    Args:
        device: by default a GPU where there is one, else the CPU. A GPU without a number is that of LOCAL_RANK.

    Raises:
        ValueError: not a device, or more processes on this machine than GPUs.
    """
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    ours = under_torchrun and dist.is_available() and not dist.is_initialized()
    device = _own_device(device, under_torchrun)
    if not ours:
        yield Ranks.current(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks.current(device)
    try:
        yield ranks  # after an exception the others may be anywhere: torchrun ends them when this process has ended
        with suppress(RuntimeError):  # a rank that is gone is not waited for
            ranks.gather(None)  # torchrun ends all when one exits with a nonzero status: not before all are done
    finally:
        # A gloo thread releases a collective's tensors after the collective has returned, and needs the interpreter for
        # that: if it has shut down, the thread aborts the process (pytorch/pytorch#190489). Destroying a group waits
        # for its threads only if nothing else holds it, but torch does: DistributedDataParallel holds its group, even
        # when it is itself gone, and DTensor's cached plans hold their mesh. While this thread sleeps, they can end.
        time.sleep(0.1)
        dist.destroy_process_group()


def default_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """A device by its name, by default :func:`default_device`.

    Raises:
        ValueError: neither the CPU nor an existing GPU.
    """
    found = _named_device(device)
    there = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= there:
        what = "GPU(s)" if found.type == "cuda" else "CPU"
        raise ValueError(f"device is {str(device)!r}, and there {'is' if there == 1 else 'are'} {there} {what} here")
    return found


def _named_device(device: torch.device | str | None) -> torch.device:
    found = default_device() if device is None else None
    if isinstance(device, (str, torch.device)):  # torch takes a number for a GPU where it sees one
        with suppress(RuntimeError):
            found = torch.device(device)
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected one such as 'cpu', 'cuda' or 'cuda:1'")
    return found


def _own_device(device: torch.device | str | None, under_torchrun: bool) -> torch.device:
    found = _named_device(device)
    if found.type == "cuda" and found.index is None and under_torchrun:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        ranks = max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 0)))
        gpus = torch.cuda.device_count()
        if ranks > gpus:  # an error on all ranks, or those that have a GPU would wait for the others
            fewer = f"fewer (torchrun --nproc-per-node {gpus}), or all " if gpus else "them "
            raise ValueError(
                f"there are {ranks} processes on this machine and {gpus} GPU{'' if gpus == 1 else 's'}, expected a GPU "
                f"for each: start {fewer}with --device cpu"
            )
        found = torch.device("cuda", rank)
    return usable_device(found)
