"""A frozen Qwen2 or Qwen3 as pure functions of (config, weights, tokens, lora), with gradients written by hand.

This package never imports ``lora_delta``::

    import torch
    import qwen_functional.forward
    from qwen_functional import LoraSpec, Plan, Qwen2Config, init_weights, pack

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=300, **sizes)
    weights = init_weights(config)  # or config, weights = load_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.bfloat16)
    spec = LoraSpec(rank=4)
    tensors = {name: torch.randn(8, *shape) for name, shape in spec.shapes(config).items()}  # for eight adapters
    lora = spec.bind(config, tensors)

    tokens = pack([[1, 2, 3, 4], [1, 2, 5]])  # a prefix tree: 5 tokens are computed, not 7
    value, vjp = qwen_functional.forward.forward_vjp(config, weights, tokens, lora)  # (8, 2, 64)
    gradients = vjp(torch.ones_like(value))  # {PEFT name: gradient}

    plan = Plan(config, weights, tokens, lora)  # all that a step depends on besides values, for many steps
    value, vjp = qwen_functional.forward.forward_vjp(config, weights, tokens, lora, plan=plan)

    out = qwen_functional.forward.forward(config, weights, torch.tensor([[1, 2, 3, 4]]))  # plain differentiable torch
    out.logits, out.last_hidden_state

* ``architecture.py``: the table of projections; nothing else names one
* ``config.py``, ``checkpoint.py``, ``weights.py``: a checkpoint's fields, files and tensors
* ``lora.py``, ``stacking.py``: names and scales of LoRA tensors; how the engine stacks them and splits gradients
* ``packing.py``: token sequences as a prefix tree: one for all adapters, or one for each
* ``plan.py``, ``tables.py``, ``cost.py``: all that a step depends on besides values, made once; its bytes and FLOP
* ``parallel.py``, ``streaming.py``: a model split over ranks; weights that are read only when used
* ``ops/``: one operation per file, its formula and its vjp side by side
* ``backends/``: how a chip runs them: a CPU (oneDNN, a few adapters at a time), a GPU (Triton kernels, CUDA graphs)
* ``block.py``, ``engine.py``: a decoder block and the whole model, forward and backward
* ``heads.py``: what is computed from hidden states: the states themselves, cross-entropy, KL; each with its vjp
* ``forward.py``: the same model as plain torch, with the interface that users of transformers know
"""

from .checkpoint import load_pretrained
from .config import Qwen2Config, Qwen3Config, read_config
from .lora import Lora, LoraSpec
from .packing import PackedTokens, pack, pack_each
from .plan import Plan
from .weights import Qwen2Weights, init_weights

__all__ = [
    "Lora",
    "LoraSpec",
    "PackedTokens",
    "Plan",
    "Qwen2Config",
    "Qwen2Weights",
    "Qwen3Config",
    "init_weights",
    "load_pretrained",
    "pack",
    "pack_each",
    "read_config",
]
