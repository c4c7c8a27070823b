"""What tests of the benchmarks share: a script as a process, a tiny workload, and workers that only pretend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import workload
from safetensors.torch import save_file
from torch import Tensor
from workers import Footprint, Job, WorkerError
from workload import Workload

ROOT = Path(__file__).resolve().parents[1]
K_PROJ_A = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
Finished = tuple[subprocess.CompletedProcess[str], Path]


def finished_run(script: str, folder: Path, *options: str) -> Finished:
    """A run of a script in a process of its own, and the JSON file that it wrote in ``folder``."""
    path = folder / "result.json"
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", str(path)]
    env = {**os.environ, "PYTHONPATH": search}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False), path


def tiny(folder: Path, **changes: Any) -> Workload:
    """A workload of two adapters on random weights of the tiny size, which are made once in ``folder``."""
    if not (folder / "config.json").exists():
        workload.random_checkpoint("tiny", folder)
    probes = workload.synthetic_probes("generic", 1000)
    given: dict[str, Any] = {"probes": probes, "adapters": 2, "rank": 4, "dtype": torch.float32, "threads": 1}
    return Workload(str(folder), **{**given, **changes})


def results() -> dict[str, Tensor]:
    """What a worker writes: large gradients and small ones."""
    generator = torch.Generator().manual_seed(0)
    return {
        "value": torch.randn(2, 5, 64, generator=generator),
        K_PROJ_A: torch.randn(2, 4, 64, generator=generator) * 1e-3,
        K_PROJ_A.replace("lora_A", "lora_B"): torch.randn(2, 32, 4, generator=generator),
    }


class Pretended:
    """In place of :class:`workers.Pool`: no process is started, and a step takes as many seconds as ``seconds`` says.

    Attributes:
        asked: {what: the names, in the order in which they were asked for it}.
    """

    def __init__(
        self,
        written: Callable[[str], dict[str, Tensor] | None] = lambda name: results(),
        footprint: Callable[[str], Footprint] = lambda name: Footprint(1, 1, 1),
        seconds: Callable[[str], float] = lambda name: 1.0,
        failing: Mapping[str, WorkerError] | None = None,
        facts: Callable[[str, str], dict[str, Any]] = lambda name, when: {},
    ) -> None:
        self.written, self.footprint, self.seconds, self.facts = written, footprint, seconds, facts
        self.failing = failing or {}
        self.asked: dict[str, list[str]] = {"check": [], "step": [], "facts": []}

    def __call__(self, jobs: Mapping[str, Job], local: bool = False) -> Pretended:
        return self

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *_: object) -> None: ...

    def only(self, *names: str) -> None: ...

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        self.asked[method].append(name)
        if name in self.failing:
            raise self.failing[name]
        if method == "step":
            return self.seconds(name)
        if method == "facts":
            return self.facts(name, "timed" if name in self.asked["step"] else "checked")
        path, kept = arguments
        tensors = self.written(name)
        if tensors is not None:
            save_file({each: tensor[:kept].contiguous() for each, tensor in tensors.items()}, path)
        return self.footprint(name), tensors is not None
