"""Measures the constants of :mod:`cost` on this machine, in as many processes at once as will work at once.

All on a small model with random weights, so that no checkpoint is needed; what is predicted is other sizes, adapters
and meshes. ``memory`` is what is left of a step when its products are taken off.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cost import Constants, MeshStep
from floor import Floor
from measure import synchronize
from probe_sets import synthetic_probes, tree_tokens
from safetensors import safe_open
from safetensors.torch import save_file
from sizes import named_config
from workload import Workload

import qwen_functional.forward
from qwen_functional import init_weights, pack
from qwen_functional.memory import keep_freed_memory

ADAPTERS, ROUNDS = 4, 5
SUM_ELEMENTS = 1 << 21
DISK_BYTES = 1 << 28


def workload_of(size: str, adapters: int, dtype: torch.dtype, threads: int, device: str) -> Workload:
    """Five generic probes, rank 16 on all projections."""
    probes = synthetic_probes("generic", named_config(size).vocab_size)
    return Workload(None, size, probes, adapters, 16, dtype, threads, device=device)


def mesh_step_of(workload: Workload, **changes: Any) -> MeshStep:
    """The workload as the cost model sees it, on one device."""
    tokens = pack(workload.probes)
    return MeshStep(
        workload.config(),
        workload.spec,
        workload.adapters,
        tree_tokens(workload.probes),
        len(set(tokens.last)),
        workload.compute_dtype.itemsize,
        **changes,
    )


class Step:
    """The engine's step on a rank of a mesh with ``tp`` ranks; of ``dp`` ones each has its own part of the adapters."""

    def __init__(self, workload: Workload, data_parallel: int, tensor_parallel: int, checkpoint: str) -> None:
        self.config, self.checkpoint = workload.config(), checkpoint
        weights = init_weights(self.config, seed=0, dtype=workload.dtype, device=workload.device)
        first = 0
        if data_parallel * tensor_parallel > 1:
            sizes, names = (data_parallel, tensor_parallel), ("dp", "tp")
            mesh = dist.device_mesh.init_device_mesh(torch.device(workload.device).type, sizes, mesh_dim_names=names)
            first = mesh["dp"].get_local_rank()
            weights = weights.shard(self.config, mesh)
        self.weights = weights.prepack() if weights.can_prepack else weights
        each = -(-workload.adapters // data_parallel)
        own = slice(first * each, first * each + each)
        self.lora = {name: tensor[own].clone() for name, tensor in workload.lora(self.config).items()}
        self.cotangent = workload.cotangent(self.config)[own]
        self.spec, self.tokens = workload.spec, pack(workload.probes)

    def __call__(self) -> None:
        with torch.inference_mode():
            lora = self.spec.bind(self.config, self.lora)
            _, vjp = qwen_functional.forward.forward_vjp(
                self.config, self.weights, self.tokens, lora, checkpoint=self.checkpoint
            )
            vjp(self.cotangent)


def measured(processes: int, size: str, dtype: torch.dtype, threads: int, device: str) -> Constants:
    """The constants where so many processes work at once; of the slowest of them."""
    found = in_ranks(processes, device, _measure, size, dtype, threads, device)
    slowest = {}
    for field in dataclasses.fields(Constants):
        values = [getattr(constants, field.name) for constants in found]
        slowest[field.name] = max(values) if field.name == "sum_latency" else min(values)
    return Constants(**slowest)


def step_seconds(
    workload: Workload, data_parallel: int, tensor_parallel: int, checkpoint: str, threads: int
) -> float:
    """What a step takes on a mesh of processes; of the slowest of them."""
    ranks = data_parallel * tensor_parallel
    arguments = (workload, data_parallel, tensor_parallel, checkpoint, threads)
    return max(in_ranks(ranks, workload.device, _time_step, *arguments))


def in_ranks(ranks: int, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns in each of so many processes, which form a group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{Path(folder) / 'store'}"
        with context.Pool(ranks) as pool:
            jobs = [(rank, ranks, address, device, function, arguments) for rank in range(ranks)]
            return pool.starmap(_in_group, jobs, chunksize=1)


def _in_group(
    rank: int, ranks: int, address: str, device: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=address, rank=rank, world_size=ranks)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def _measure(size: str, dtype: torch.dtype, threads: int, device: str) -> Constants:
    torch.set_num_threads(threads)
    keep_freed_memory()
    workload = workload_of(size, ADAPTERS, dtype, threads, device)
    counted, floor = mesh_step_of(workload), Floor(workload)
    floor.step()
    gemm = floor.flop / _median(floor.step)
    del floor
    low_rank = _low_rank_rate(workload)
    step = Step(workload, 1, 1, "none")
    step()
    seconds = _median(step)
    rest = seconds - counted.gemm_flop() / gemm - counted.low_rank_flop() / low_rank
    memory = counted.memory_bytes() / max(rest, 0.01 * seconds)
    del step
    small, large = (torch.ones(n, dtype=torch.float32, device=device) for n in (1, SUM_ELEMENTS))
    latency, whole = _median(lambda: dist.all_reduce(small), 50), _median(lambda: dist.all_reduce(large), 20)
    return Constants(gemm, low_rank, memory, large.nbytes / max(whole - latency, 1e-9), latency, _disk_rate())


def _time_step(
    workload: Workload, data_parallel: int, tensor_parallel: int, checkpoint: str, threads: int
) -> float:
    torch.set_num_threads(threads)
    keep_freed_memory()
    step = Step(workload, data_parallel, tensor_parallel, checkpoint)
    step()
    return _median(step)


def _low_rank_rate(workload: Workload) -> float:
    """Of the two products that an adapter of gate or up takes forwards."""
    config, tokens = workload.config(), tree_tokens(workload.probes)
    n, h, i = workload.adapters, config.hidden_size, config.intermediate_size
    dtype, device = workload.compute_dtype, workload.device
    x, A = (torch.ones(n, *shape, dtype=dtype, device=device) for shape in ((tokens, h), (workload.rank, h)))
    y, B = (torch.ones(n, *shape, dtype=dtype, device=device) for shape in ((tokens, i), (i, workload.rank)))

    def products() -> None:
        y.baddbmm_(torch.bmm(x, A.mT), B.mT)

    products()
    return 2 * n * tokens * workload.rank * (h + i) / _median(products, 20)


def _disk_rate() -> float:
    """Of a file that is in no cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        save_file({"x": torch.zeros(DISK_BYTES // 2, dtype=torch.bfloat16)}, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        start = time.perf_counter()
        with safe_open(path, "pt") as handle:
            handle.get_tensor("x").clone()
        return DISK_BYTES / (time.perf_counter() - start)


def _median(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of a call, which all processes begin together."""
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
