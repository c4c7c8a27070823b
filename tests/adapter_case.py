"""What tests of adapter folders share: a base model, adapters that PEFT writes, and the comparison with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from reference import hf_model, relative_error, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_functional import LoraSpec, init_weights
from qwen_functional.forward import forward
from qwen_functional.lora import peft_name

CONFIG = tiny_config(head_dim=8)  # hidden 24, q 32, kv 16, intermediate 40: no two the same
WEIGHTS = init_weights(CONFIG, dtype=torch.float64)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [53, 58, 9, 7, 9, 3, 2, 38]])
JSON, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q_A = peft_name(0, "q_proj", "A")
QV = ["q_proj", "v_proj"]


def base() -> Any:
    return hf_model(CONFIG, WEIGHTS)


def by_peft(folder: Path, model: Any = None, **fields: Any) -> PeftModel:
    """PEFT's model with random A and B, which PEFT saves to ``folder``."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(model or base(), config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def logits(spec: LoraSpec, tensors: dict[str, Tensor]) -> Tensor:
    return forward(CONFIG, WEIGHTS, IDS, lora=spec.bind(CONFIG, tensors)).logits


def assert_same(spec: LoraSpec, tensors: dict[str, Tensor], model: PeftModel) -> None:
    """Logits, scales, tensors and their order are PEFT's, and the adapter has an effect."""
    with torch.no_grad():
        theirs = model(IDS).logits
        with model.disable_adapter():
            assert relative_error(model(IDS).logits, theirs) > 1e-3
    assert relative_error(logits(spec, tensors), theirs) < 1e-9
    saved = get_peft_model_state_dict(model)
    assert list(tensors) == [name for name in spec.shapes(CONFIG) if name in saved]
    assert len(tensors) == len(saved)
    for name, tensor in tensors.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name
    scales = [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)]
    assert [pair.scaling for pair in spec.bind(CONFIG, tensors).pairs.values()] == scales


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
