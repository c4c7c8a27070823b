"""The kernels compile for the GPUs with the least shared memory, and take no more than those have. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

GEFORCE_30 = 86  # its compute capability, without the dot
SHARED_MEMORY = 99 << 10  # bytes of a program there; of the 40 and 50 series as well


@pytest.mark.parametrize(
    ("head_dim", "dtype", "rank"),
    [(64, "bfloat16", 16), (128, "bfloat16", 32), (256, "bfloat16", 64), (64, "float32", 16), (256, "float32", 64)],
)
def test_kernels_compile_and_fit_into_the_smallest_shared_memory(
    head_dim: int, dtype: str, rank: int, tmp_path: Path
) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(head_dim), dtype, str(rank), str(GEFORCE_30)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    taken = json.loads(ended.stdout.splitlines()[-1])
    block = {"_add_norm", "_attend", "_gate", "_gate_vjp", "_vjp_q", "_vjp_kv", "_norm_vjp", "_outer"}
    assert block | {"_softmax", "_divergence"} <= taken.keys()
    assert {kernel: n for kernel, n in taken.items() if n > SHARED_MEMORY} == {}
