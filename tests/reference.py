"""transformers and PEFT on a test's weights, LoRA tensors and token sequences, differentiated by autograd.

Everything is moved to the CPU and computed there: one reference for every device. Only rope's cosines and sines are
computed on the weights' device: they are float32 in any dtype, and a GPU's may differ from the CPU's by an ulp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights
from qwen_functional.config import CONFIGS as KINDS

Model: TypeAlias = "PreTrainedModel | PeftModel"


def tiny_fields(**changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a model with a few thousand weights, large enough to be far from linear."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {"model_type": "qwen2", "initializer_range": 0.2, **sizes, **heads, **changes}


def tiny_config(**changes: Any) -> Qwen2Config:
    """:func:`tiny_fields` as our config."""
    fields = tiny_fields(**changes)
    return KINDS[fields["model_type"]].from_dict(fields)


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_ROPE = {"rope_type": "yarn", "rope_theta": 500.0}
_QWEN3 = {"model_type": "qwen3"}  # head_dim is 128 where it is not given
_WINDOWS = {"use_sliding_window": True, "sliding_window": 3}

# Every way in which dense Qwen2 and Qwen3 models differ, as changes to tiny_fields. Windows are shorter than the texts.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "a kv head for every head": {"num_key_value_heads": 4},
    "one kv head for 7": {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1},
    "7 heads for each of 2": {"hidden_size": 28, "num_attention_heads": 14, "num_key_value_heads": 2},
    "head_dim given": {"head_dim": 10},
    "tied": {"tie_word_embeddings": True},
    "another rope_theta": {"rope_theta": 100.0},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "linear rope, older": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **_YARN}},
    "yarn, older": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **_YARN}},
    "windows": {**_WINDOWS, "max_window_layers": 1},
    "windows everywhere": {**_WINDOWS, "max_window_layers": 0, "sliding_window": 1},
    "windows by layer": {
        **_WINDOWS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "windows not used": {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
    "one block": {"num_hidden_layers": 1},
    "qwen3": {**_QWEN3, "head_dim": 10},
    "qwen3, heads as wide as the rest": {**_QWEN3, "head_dim": 6, "num_key_value_heads": 1},
    "qwen3, tied, yarn": {**_QWEN3, "tie_word_embeddings": True, "head_dim": 12, "rope_parameters": {**_ROPE, **_YARN}},
    "qwen3, windows": {**_QWEN3, **_WINDOWS, "max_window_layers": 1, "head_dim": 8},
    "qwen3, one block": {**_QWEN3, "num_hidden_layers": 1},
}

# Every way in which LoRAs differ, on three blocks.
SPECS: dict[str, LoraSpec] = {
    "all projections": LoraSpec(rank=3, alpha=7),
    "some": LoraSpec(rank=2, alpha=3, target_modules=("v_proj", "q_proj", "down_proj")),
    "some layers": LoraSpec(rank=2, layers_to_transform=(0, 2)),
    "one layer": LoraSpec(rank=2, layers_to_transform=1),
    "rsLoRA": LoraSpec(rank=5, alpha=2, use_rslora=True),
    "patterns": LoraSpec(
        rank=2,
        alpha=3.0,
        rank_pattern={"k_proj": 5, r"layers\.1\.mlp\.up_proj": 4, "up_proj": 1},
        alpha_pattern={"o_proj": 7.0, r"2\.self_attn\.q_proj": -1.0, "q_proj": 0.5},
    ),
    "patterns and rsLoRA": LoraSpec(rank=2, rank_pattern={"down_proj": 6}, use_rslora=True),
    "rank above the width": LoraSpec(rank=30, alpha=30, target_modules=("k_proj", "o_proj")),
}


def random_lora(
    config: Qwen2Config,
    spec: LoraSpec,
    n_adapters: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    size: float = 0.3,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Normal A and B, neither zero, so that no gradient vanishes. With ``n_adapters`` None, there is no leading G.

    ``size`` is the standard deviation of B, and that of A times the square root of its input width. The numbers are the
    same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    lead = () if n_adapters is None else (n_adapters,)
    tensors = {}
    for name, shape in spec.shapes(config).items():
        std = size if "lora_B" in name else size * shape[1] ** -0.5
        drawn = torch.randn(*lead, *shape, generator=generator, dtype=torch.float64) * std
        tensors[name] = drawn.to(dtype).to(device)
    return tensors


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error in float64, absolute where ``expected`` is zero. NaN gives NaN, below no bound."""
    assert value.shape == expected.shape, f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
    value, expected = value.cpu(), expected.cpu()
    difference, norm = (value.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / norm if norm else difference


class RMSNormInItsDtype(Qwen2RMSNorm):
    """The norm without transformers' cast to float32, which would limit a float64 reference to 1e-7."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class RotaryOnDevice(Qwen2RotaryEmbedding):
    """transformers' cosines and sines, computed on another device for a model on the CPU."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        device = self.inv_freq.device
        cos, sin = super().forward(x.to(device), position_ids.to(device))
        return cos.cpu(), sin.cpu()


def hf_config(config: Qwen2Config, fields: Mapping[str, Any] | None = None) -> Any:
    """transformers' config of the same family, from the fields that ours writes or from others."""
    fields = dict(fields or config.to_dict())
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def hf_model(
    config: Qwen2Config,
    weights: Qwen2Weights,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    fields: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """transformers' model on the same weights, shared unless ``dtype`` differs.

    Args:
        dtype: of the model; by default that of the weights.
        attn_implementation: not "eager" for float64: its softmax is float32 in any dtype.
        fields: the ``config.json`` that transformers reads; by default what our config writes.
    """
    theirs, dtype = hf_config(config, fields), dtype or weights.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs, attn_implementation=attn_implementation)
    views = {name: view.to("cpu", dtype) for name, view in weights.named_views(config).items()}
    # Tied; or left out, and then the logits mean nothing.
    views.setdefault("lm_head.weight", views["model.embed_tokens.weight"])
    model.load_state_dict(views, assign=True)
    model.model.rotary_emb = RotaryOnDevice(theirs).to(weights.device)  # in no checkpoint; float32 in any dtype
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, (Qwen2RMSNorm, Qwen3RMSNorm)):
                module.__class__ = RMSNormInItsDtype
    return model.requires_grad_(False).eval()


def peft_model(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """``model`` with PEFT's LoRA layers inserted; B is zero unless :func:`call` is given tensors."""
    layers = spec.layers_to_transform
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # annotated as int, but any number works
        target_modules=list(spec.target_modules),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        use_rslora=spec.use_rslora,
        layers_to_transform=layers if layers is None or isinstance(layers, int) else list(layers),
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def call(model: Model, tensors: Mapping[str, Tensor] | None = None, **inputs: Any) -> Any:
    """The model's output under one adapter, {PEFT name: tensor} or none; differentiable in it."""
    parameters = _as_parameters(tensors, "base_model.model.")
    inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return functional_call(_causal_lm(model), parameters, (), {**inputs, "use_cache": False})


def _causal_lm(model: Model) -> Any:
    return model.base_model.model if isinstance(model, PeftModel) else model


def _as_parameters(tensors: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix).replace(".weight", ".default.weight"): tensor.cpu()
        for name, tensor in (tensors or {}).items()
    }


def hidden_states_at_end(
    model: Model, tensors: Mapping[str, Tensor] | None, sequence: Sequence[int], layers: Sequence[int] = (-1,)
) -> Tensor:
    """(layers, H): each block's output for the last token of a sequence; −1 means after the final norm."""
    backbone = _causal_lm(model).model
    seen: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index, block in enumerate(backbone.layers):
            hook = block.register_forward_hook(lambda _m, _i, out, index=index: seen.__setitem__(index, out))
            hooks.callback(hook.remove)
        parameters = _as_parameters(tensors, "base_model.model.model.")
        inputs = {"input_ids": torch.tensor([list(sequence)]), "use_cache": False}
        seen[-1] = functional_call(backbone, parameters, (), inputs).last_hidden_state
    return torch.stack([seen[layer][0, -1] for layer in layers])


def one_by_one(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each adapter, from tensors with a leading G."""
    n_adapters = next(iter(tensors.values())).shape[0]
    return [{name: tensor[g] for name, tensor in tensors.items()} for g in range(n_adapters)]


def reference_values(
    model: Model,
    tensors: Mapping[str, Tensor],
    sequences: Sequence[Sequence[int]],
    layer: int | Sequence[int] = -1,
) -> Tensor:
    """Only the values of :func:`reference_value_and_grads`; without tensors, those of the bare model, with G = 1."""
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    batched = any(tensor.dim() == 3 for tensor in tensors.values())
    with torch.no_grad():
        value = torch.stack(
            [
                torch.stack([hidden_states_at_end(model, adapter, ids, layers) for ids in sequences], dim=1)
                for adapter in (one_by_one(tensors) if batched else [dict(tensors)])
            ]
        )
    return value[:, 0] if isinstance(layer, int) else value


def reference_value_and_grads(
    model: PeftModel,
    tensors: Mapping[str, Tensor],
    sequences: Sequence[Sequence[int]],
    cotangent: Tensor,
    layer: int | Sequence[int] = -1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``forward_vjp`` and its ``vjp(cotangent)`` should give, in the same shapes.

    Every sequence runs alone and unpadded, one adapter at a time, and the gradients are autograd's.

    Args:
        tensors: {PEFT name: (r, in)/(out, r)}, or with a leading G.
        cotangent: (G, P, H), or (G, layers, P, H) for a sequence of layers.
    """
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    batched = next(iter(tensors.values())).dim() == 3
    cotangents = cotangent[:, None] if isinstance(layer, int) else cotangent
    values, gradients = [], []
    for g, adapter in enumerate(one_by_one(tensors) if batched else [dict(tensors)]):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in adapter.items()}
        ends = []
        for p, sequence in enumerate(sequences):
            end = hidden_states_at_end(model, leaves, sequence, layers)
            if end.requires_grad:
                end.backward(cotangents[g, :, p].to(end))
            ends.append(end.detach())
        values.append(torch.stack(ends, dim=1))  # (layers, P, H)
        gradients.append({n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()})
    value = torch.stack(values)
    stacked = {name: torch.stack([adapter[name] for adapter in gradients]) for name in tensors}
    grads = stacked if batched else gradients[0]
    return (value[:, 0] if isinstance(layer, int) else value), grads


def assert_gradients(
    gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-9, negligible: float = 1e-5
) -> None:
    """Names and their order are equal, and every tensor's relative error is within ``tolerance``.

    A gradient that is zero up to rounding, like that of q in a text of one token or of one token repeated, is measured
    against ``negligible`` times the largest gradient norm, or times 1, the size of a cotangent's entries.
    """
    assert list(gradients) == list(expected)
    floor = negligible * max(1.0, *(gradient.norm().item() for gradient in expected.values()))
    for name, gradient in gradients.items():
        assert gradient.shape == expected[name].shape, name
        difference = (gradient.cpu().double() - expected[name].cpu().double()).norm().item()
        assert difference <= tolerance * max(expected[name].norm().item(), floor), f"{name}: {difference}"
