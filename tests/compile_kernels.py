"""Compiles every kernel that a step on a GPU launches, without a GPU, and prints what shared memory each takes.

``python tests/compile_kernels.py HEAD_DIM DTYPE RANK [CAPABILITY]``, without ``TRITON_INTERPRET`` in the environment.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from reference import random_lora, tiny_config
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import qwen_functional.plan as plan_module
from qwen_functional import LoraSpec, init_weights, pack
from qwen_functional.backends.cuda import Cuda
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import Hidden, TokenLoss
from qwen_functional.ops.lm_head import StateTargets, Targets

# Qwen2.5-0.5B's sizes; with the other head dims, Qwen3's norms of heads.
SIZES: dict[int, dict[str, Any]] = {
    64: {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    128: {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
    256: {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def shared_memory(head_dim: int, dtype: torch.dtype, rank: int, capability: int) -> dict[str, int]:
    """{kernel: the most bytes of shared memory that a program takes} of a step's launches."""
    found: dict[str, int] = {}

    def launch(kernel: Any, grid: Any) -> Any:
        def compiled(*arguments: Any, **options: Any) -> None:
            made = kernel.run(*arguments, grid=grid, warmup=True, **options)
            name = kernel.fn.__name__
            found[name] = max(found.get(name, 0), made.metadata.shared)

        return compiled

    JITFunction.__getitem__ = launch
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    plan_module.choose = lambda *_: Cuda()
    family = "qwen2" if head_dim == 64 else "qwen3"
    config = tiny_config(model_type=family, head_dim=head_dim, num_hidden_layers=2, **SIZES[head_dim])
    spec, tokens = LoraSpec(rank=rank), pack([[5, 6, 7, 8], [5, 6, 20], [30]])
    lora = spec.bind(config, random_lora(config, spec, 2, dtype=torch.float32))
    # What is computed are numbers that no kernel has written.
    rows, weights = torch.tensor([0, 1]), torch.ones(2)
    states = StateTargets(rows, torch.ones(2, config.hidden_size), weights)
    heads = Hidden(), TokenLoss([Targets.of_tokens(rows, rows, weights)]), TokenLoss([states])
    values, vjp = forward_vjp(config, init_weights(config, dtype=dtype), tokens, lora, heads=heads)
    vjp([torch.ones_like(value) for value in values])
    return found


if __name__ == "__main__":
    head_dim, dtype, rank, capability = (*sys.argv[1:], "86")[:4]
    print(json.dumps(shared_memory(int(head_dim), getattr(torch, dtype), int(rank), int(capability))))
