"""The fused backend against the plain one. Without a GPU, its kernels run on the CPU, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from reference import assert_gradients, random_lora, relative_error, tiny_config
from torch import Tensor

import qwen_functional.plan as plan_module
from lora_delta import DifferentiableDeltaCompute
from qwen_functional import LoraSpec, Qwen2Config, init_weights, pack, pack_each
from qwen_functional.backends import graph
from qwen_functional.backends.cuda import MAX_HEAD_DIM, MAX_RANK, Cuda, _run_on, can_fuse
from qwen_functional.backends.plain import Plain
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import Hidden, TokenLoss
from qwen_functional.ops.lm_head import StateTargets, Targets
from qwen_functional.plan import Plan

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5
# A shared prefix, a sequence that is a prefix of another, a duplicate, a single token.
TOKENS = pack([[5, 6, 7, 8], [5, 6, 20], [5, 6], [30], [5, 6]])
CONFIG = tiny_config(num_hidden_layers=2)
WINDOWS = tiny_config(use_sliding_window=True, sliding_window=2, max_window_layers=1)
QWEN3 = tiny_config(model_type="qwen3", num_hidden_layers=2, head_dim=6, rms_norm_eps=1e-3)
MANY = LoraSpec(rank=17, rank_pattern={"v_proj": 3})


def only(*modules: str, **changes: Any) -> LoraSpec:
    return LoraSpec(rank=3, target_modules=modules, **changes)


def computed(
    backend: Plain,
    monkeypatch: pytest.MonkeyPatch,
    config: Qwen2Config,
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients computed by a backend."""
    monkeypatch.setattr(plan_module, "choose", lambda *_: backend)
    weights = init_weights(config, device=DEVICE)
    value, vjp = forward_vjp(config, weights, TOKENS, spec.bind(config, tensors), **options)
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return value, vjp(cotangent)


CASES: dict[str, tuple[Qwen2Config, LoraSpec, int | None, dict[str, Any]]] = {
    "all projections": (CONFIG, LoraSpec(rank=3), 2, {"checkpoint": "none"}),
    "layers, checkpointed": (tiny_config(), MANY, 2, {"checkpoint": "block", "layer": (0, 1, -1)}),
    "one adapter": (CONFIG, LoraSpec(rank=2), None, {}),
    "q and v": (CONFIG, only("q_proj", "v_proj"), 2, {}),
    "down": (CONFIG, only("down_proj"), 2, {}),
    "up, o and k": (CONFIG, only("up_proj", "o_proj", "k_proj"), 2, {"checkpoint": "block"}),
    "gate": (CONFIG, only("gate_proj"), 1, {}),
    "windows": (WINDOWS, LoraSpec(rank=3), 2, {"read": "all"}),
    "the upper layers": (tiny_config(), LoraSpec(rank=3, layers_to_transform=(1, 2)), 2, {"layer": (0, -1)}),
    "an inner layer": (tiny_config(), only("k_proj", "gate_proj"), 2, {"layer": 1, "checkpoint": "block"}),
    "inner layers, all tokens": (tiny_config(), only("k_proj", "gate_proj"), 2, {"layer": (0, 1), "read": "all"}),
    "inner layers": (tiny_config(), only("k_proj", "gate_proj"), 2, {"layer": (0, 1)}),
    "qwen3": (QWEN3, LoraSpec(rank=3), 2, {"checkpoint": "none"}),
    "qwen3, checkpointed, windows": (
        tiny_config(model_type="qwen3", head_dim=10, use_sliding_window=True, sliding_window=2, max_window_layers=1),
        MANY,
        2,
        {"checkpoint": "block", "layer": (0, -1)},
    ),
    "qwen3, v and down": (QWEN3, only("v_proj", "down_proj"), 2, {}),
    "a kv head for 7": (
        tiny_config(num_hidden_layers=1, hidden_size=28, num_attention_heads=7, num_key_value_heads=1),
        LoraSpec(rank=16),
        3,
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_those_of_the_plain_backend(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, spec, n_adapters, options = CASES[case]
    tensors = random_lora(config, spec, n_adapters, dtype=torch.float32, device=DEVICE)
    expected, expected_gradients = computed(Plain(), monkeypatch, config, spec, tensors, **options)
    value, gradients = computed(Cuda(), monkeypatch, config, spec, tensors, **options)
    assert value.dtype == torch.float32
    assert relative_error(value, expected) < TOLERANCE
    assert_gradients(gradients, expected_gradients, TOLERANCE)


@pytest.mark.parametrize("case", ["all projections", "layers, checkpointed", "windows", "qwen3"])
def test_own_texts_and_their_loss_equal_those_of_the_plain_backend(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, spec, n_adapters, options = CASES[case]
    tensors = random_lora(config, spec, n_adapters, dtype=torch.float32, device=DEVICE)
    weights, lora = init_weights(config, device=DEVICE), spec.bind(config, tensors)
    texts = pack_each([[[5, 6, 7, 8], [5, 6, 20]], [[30, 31, 32, 33, 34, 35]]])
    rows, wanted, weight = torch.tensor([1, 2, 1]), torch.tensor([7, 8, 9]), torch.tensor([0.5, 2.0, 1.0])
    states = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(2))
    heads = (
        Hidden(options.get("layer", -1)),
        TokenLoss([Targets.of_tokens(rows, wanted, weight)] * 2, label_smoothing=0.1, temperature=1.5),
        TokenLoss([StateTargets(rows, states, weight)] * 2, temperature=0.5),
    )
    found = []
    for backend in (Plain(), Cuda()):
        monkeypatch.setattr(plan_module, "choose", lambda *_, backend=backend: backend)
        values, vjp = forward_vjp(config, weights, texts, lora, options.get("checkpoint", "auto"), heads=heads)
        chance = torch.Generator().manual_seed(1)
        gradients = vjp([torch.randn(value.shape, generator=chance).to(DEVICE) for value in values])
        found.append((values, gradients))
    (expected, expected_gradients), (values, gradients) = found
    assert all(relative_error(one, other) < TOLERANCE for one, other in zip(values, expected, strict=True))
    assert_gradients(gradients, expected_gradients, TOLERANCE)


@pytest.mark.parametrize("wanted", ["lora_A", "v_proj.lora_B", "1.mlp.down_proj.lora_A", "layers.1.self_attn.o_proj"])
def test_gradients_asked_for_alone_equal_those_of_the_plain_backend(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LoraSpec(rank=3)
    tensors = random_lora(CONFIG, spec, 2, dtype=torch.float32, device=DEVICE)
    wrt = [name for name in tensors if wanted in name]
    _, expected = computed(Plain(), monkeypatch, CONFIG, spec, tensors, wrt=wrt)
    _, gradients = computed(Cuda(), monkeypatch, CONFIG, spec, tensors, wrt=wrt)
    assert list(gradients) == wrt
    assert_gradients(gradients, expected, TOLERANCE)


def test_the_bare_models_value_equals_that_of_the_plain_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = computed(Plain(), monkeypatch, CONFIG, LoraSpec(), {}, layer=(0, -1))
    value, gradients = computed(Cuda(), monkeypatch, CONFIG, LoraSpec(), {}, layer=(0, -1))
    assert relative_error(value, expected) < TOLERANCE
    assert gradients == {}


def test_lora_tensors_of_any_strides_and_dtype_give_what_contiguous_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = only("k_proj", "down_proj")
    tensors = random_lora(CONFIG, spec, 2, dtype=torch.float64, device=DEVICE)
    strided = {name: tensor.mT.contiguous().mT for name, tensor in tensors.items()}
    single = {name: tensor.float() for name, tensor in tensors.items()}
    expected, expected_gradients = computed(Cuda(), monkeypatch, CONFIG, spec, single)
    value, gradients = computed(Cuda(), monkeypatch, CONFIG, spec, strided)
    assert torch.equal(value, expected)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float64}
    assert_gradients(gradients, expected_gradients, 1e-6)


@pytest.mark.parametrize("rank", [3, 17, 64])
def test_a_lora_of_zeros_has_a_delta_of_exactly_zero(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("qwen_functional.plan", "lora_delta.passes"):
        monkeypatch.setattr(f"{module}.choose", lambda *_: Cuda())
    spec = LoraSpec(rank=rank, rank_pattern={"k_proj": 2, "down_proj": 2})
    config = tiny_config(num_hidden_layers=2, hidden_size=300, head_dim=8)  # several tiles of columns
    weights = init_weights(config, device=DEVICE)
    delta = DifferentiableDeltaCompute(config, weights, [[1, 2, 3], [1, 2, 9]], spec, prepack=False, graph=False)
    tensors = random_lora(config, spec, 2, dtype=torch.float32, device=DEVICE)
    value = delta({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()})
    assert torch.equal(value, torch.zeros_like(value)), f"up to {value.abs().max():.1e}"


@pytest.mark.parametrize(
    ("changes", "rank", "dtype", "fits"),
    [
        ({}, 64, torch.float32, True),
        ({}, 3, torch.bfloat16, True),
        ({"head_dim": MAX_HEAD_DIM}, 3, torch.float32, True),
        ({}, MAX_RANK + 1, torch.float32, False),
        ({"model_type": "qwen3", "head_dim": 8}, 3, torch.float32, True),
        ({}, 3, torch.float64, False),
        ({"head_dim": MAX_HEAD_DIM + 2}, 3, torch.float32, False),
    ],
)
def test_what_the_kernels_do_not_hold_is_left_to_torch(
    changes: dict[str, Any], rank: int, dtype: torch.dtype, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_functional.backends.cuda._run_on", lambda device: True)
    config, spec = tiny_config(num_hidden_layers=1, **changes), LoraSpec(rank=rank, target_modules=("q_proj",))
    lora = spec.bind(config, random_lora(config, spec, dtype=torch.float32))
    assert can_fuse(config, init_weights(config, dtype=dtype), lora) is fits


@pytest.mark.parametrize(("capability", "hip"), [((7, 5), None), ((9, 4), "6.4")])
def test_a_gpu_whose_shared_memory_is_too_small_is_left_to_torch(
    capability: tuple[int, int], hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.warns(UserWarning, match=rf"several times as long: a GPU is of compute capability \({capability[0]}"):
        assert not _run_on.__wrapped__(torch.device("cuda:0"))


def test_a_step_whose_graphs_have_no_memory_runs_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory for graphs")

    monkeypatch.setattr(plan_module, "choose", lambda *_: Cuda())
    monkeypatch.setattr(graph, "Captured", captured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    spec, weights = only("q_proj", "down_proj"), init_weights(CONFIG, device=DEVICE)
    lora = spec.bind(CONFIG, random_lora(CONFIG, spec, 2, dtype=torch.float32, device=DEVICE))
    plan = Plan(CONFIG, weights, TOKENS, lora)
    values = [forward_vjp(CONFIG, weights, TOKENS, lora, plan=plan)[0] for _ in range(3)]
    assert plan.graph is False
    assert all(torch.equal(value, values[0]) for value in values)


def test_a_plan_on_this_device_has_its_backend() -> None:
    config, spec = CONFIG, LoraSpec(rank=3)
    weights = init_weights(config, device=DEVICE)
    lora = spec.bind(config, random_lora(config, spec, dtype=torch.float32, device=DEVICE))
    assert type(Plan(config, weights, TOKENS, lora).backend).__name__ == ("Cuda" if DEVICE == "cuda" else "Cpu")
