"""LoRA names, order, shapes and scales against a PEFT model, and what bind must refuse."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from reference import hf_model, peft_model, random_lora, tiny_config
from torch import Tensor

from qwen_functional import LoraSpec, init_weights

CONFIG = tiny_config(head_dim=8)  # hidden 24, q 32, kv 16, intermediate 40: no two the same
SPECS = {
    "default": LoraSpec(),
    "rslora": LoraSpec(rank=6, alpha=5, use_rslora=True),
    "attention": LoraSpec(rank=3, alpha=1.5, target_modules=("v_proj", "o_proj", "q_proj")),
    "mlp": LoraSpec(rank=1, alpha=0, target_modules=["down_proj", "up_proj"]),
    "named twice": LoraSpec(rank=2, target_modules=("k_proj", "k_proj")),
    "one layer": LoraSpec(rank=4, layers_to_transform=1),
    "first layer": LoraSpec(rank=4, layers_to_transform=0),
    "layers out of order": LoraSpec(rank=4, layers_to_transform=[2, 0, 2]),
    "ranks by name": LoraSpec(rank=4, rank_pattern={"q_proj": 7, "down_proj": 1}),
    "rank by path": LoraSpec(rank=4, rank_pattern={"model.layers.1.mlp.up_proj": 9}),
    "end of a path": LoraSpec(rank=4, rank_pattern={"layers.2.self_attn.o_proj": 5, "1.mlp.gate_proj": 3}),
    "first fitting pattern": LoraSpec(rank=4, rank_pattern={".*.mlp.*": 2, "up_proj": 9, "q_proj": 3}),
    "no dot before": LoraSpec(rank=4, rank_pattern={".*_proj": 2}, alpha_pattern={"[qk]_proj": 1}),
    "alternatives": LoraSpec(rank=4, alpha=3, alpha_pattern={"q_proj|layers.0.mlp.up_proj": 8}),
    "caret": LoraSpec(rank=4, rank_pattern={r"^model\.layers\.(0|2)\..*v_proj": 11}),
    "alpha by regex": LoraSpec(rank=4, alpha=3, alpha_pattern={r"layers\.[12]\.self_attn\.\w+": -0.5}),
    "both": LoraSpec(rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 64, "k_proj": 1e-3}),
    "both, rslora": LoraSpec(8, use_rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"o_proj": 7}),
    "all at once": LoraSpec(
        rank=5,
        alpha=10,
        target_modules=("o_proj", "gate_proj", "k_proj"),
        rank_pattern={"layers.2.mlp.gate_proj": 1},
        alpha_pattern={"(k|o)_proj": 2},
        layers_to_transform=(1, 2),
    ),
}


@pytest.fixture(params=SPECS)
def pair(request: pytest.FixtureRequest) -> tuple[LoraSpec, peft.PeftModel]:
    """A spec, and PEFT's model with the same fields and random LoRA tensors."""
    spec = SPECS[request.param]
    model = peft_model(hf_model(CONFIG, init_weights(CONFIG)), spec)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    return spec, model


# --- Against PEFT -----------------------------------------------------------------------------------------


def test_names_order_and_shapes_equal_a_peft_state_dict(pair: tuple[LoraSpec, peft.PeftModel]) -> None:
    spec, model = pair
    theirs = peft.get_peft_model_state_dict(model)
    assert list(spec.shapes(CONFIG).items()) == [(name, tuple(t.shape)) for name, t in theirs.items()]
    assert spec.bind(CONFIG, theirs).names() == list(theirs)


def test_scaling_equals_that_of_a_peft_layer(pair: tuple[LoraSpec, peft.PeftModel]) -> None:
    spec, model = pair
    modules = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    theirs = [(name.removeprefix("base_model.model."), m.scaling["default"]) for name, m in modules.items()]
    pairs = spec.bind(CONFIG, peft.get_peft_model_state_dict(model)).pairs
    assert [pair.scaling for pair in pairs.values()] == [scaling for _, scaling in theirs]
    assert [name.split(".")[2] for name, _ in theirs] == [str(layer) for layer, _ in pairs]
    assert [name.split(".")[-1] for name, _ in theirs] == [projection for _, projection in pairs]


def test_the_parameters_of_a_live_peft_model_end_up_in_their_places(
    pair: tuple[LoraSpec, peft.PeftModel],
) -> None:
    spec, model = pair
    live = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    assert all(".default.weight" in name for name in live)
    bound = spec.bind(CONFIG, live).tensors()
    theirs = peft.get_peft_model_state_dict(model)
    assert list(bound) == list(theirs)
    assert all(torch.equal(bound[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("start", ["base_model.model.model.", "model."])
@pytest.mark.parametrize("end", [".weight", ".default.weight"])
def test_every_spelling_of_the_names_is_read(start: str, end: str) -> None:
    spec = SPECS["default"]
    tensors = random_lora(CONFIG, spec)
    spelt = {
        start + name.removeprefix("base_model.model.model.").removesuffix(".weight") + end: tensor
        for name, tensor in tensors.items()
    }
    bound = spec.bind(CONFIG, spelt).tensors()
    assert list(bound) == list(tensors)
    assert all(torch.equal(bound[name], tensors[name]) for name in tensors)


# --- What bind gives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_adapters", [None, 1, 3])
def test_bind_copies_no_tensor_and_gives_back_what_it_was_given(n_adapters: int | None) -> None:
    spec = SPECS["both"]
    tensors = random_lora(CONFIG, spec, n_adapters)
    bound = spec.bind(CONFIG, tensors)
    given = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert {s.untyped_storage().data_ptr() for p in bound.pairs.values() for s in (p.A, p.B)} == given
    assert (bound.n_adapters, bound.batched) == (n_adapters or 1, n_adapters is not None)
    for name, tensor in bound.tensors().items():
        assert tensor.data_ptr() == tensors[name].data_ptr()
        assert tensor.shape == tensors[name].shape


def test_the_order_of_the_given_dict_does_not_change_that_of_the_bound_one() -> None:
    spec = SPECS["default"]
    tensors = random_lora(CONFIG, spec, 2)
    shuffled = dict(sorted(tensors.items(), key=lambda item: item[0][::-1]))
    assert list(shuffled) != list(tensors) == list(spec.bind(CONFIG, shuffled).tensors())


def test_a_slice_of_adapters_holds_these_and_copies_none() -> None:
    spec = LoraSpec(rank=2, target_modules=("q_proj",))
    tensors = random_lora(CONFIG, spec, 5)
    part = spec.bind(CONFIG, tensors)[1:3]
    assert part.n_adapters == 2
    for name, tensor in part.tensors().items():
        assert torch.equal(tensor, tensors[name][1:3])
        assert tensor.data_ptr() == tensors[name][1].data_ptr()


def test_gradients_flow_through_bind() -> None:
    spec = LoraSpec(rank=2)
    for n_adapters in (None, 2):
        tensors = {name: t.requires_grad_() for name, t in random_lora(CONFIG, spec, n_adapters).items()}
        pairs = spec.bind(CONFIG, tensors).pairs.values()
        sum((p.A.sum() + 2 * p.B.sum()) * p.scaling for p in pairs).backward()  # type: ignore[union-attr]
        assert all(t.grad is not None and (t.grad != 0).all() for t in tensors.values())


def test_modules_layers_or_all_of_them_may_be_left_out() -> None:
    spec = LoraSpec(rank=2)
    tensors = random_lora(CONFIG, spec)
    some = {n: t for n, t in tensors.items() if "layers.1." in n and ("k_proj" in n or "down" in n)}
    assert list(spec.bind(CONFIG, some).pairs) == [(1, "k_proj"), (1, "down_proj")]
    nothing = spec.bind(CONFIG, {})
    assert (nothing.names(), nothing.n_adapters, nothing.batched) == ([], 1, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_large_finite_number_is_not_called_infinite(dtype: torch.dtype) -> None:
    spec = LoraSpec(rank=2)
    largest = torch.finfo(dtype).max
    tensors = {name: torch.full(shape, -largest, dtype=dtype) for name, shape in spec.shapes(CONFIG).items()}
    assert len(spec.bind(CONFIG, tensors).names()) == len(tensors)


def test_tensors_of_different_dtypes_keep_their_own() -> None:
    spec = LoraSpec(rank=2)
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32])
    tensors = {name: t.to(next(dtypes)) for name, t in random_lora(CONFIG, spec).items()}
    bound = spec.bind(CONFIG, tensors).tensors()
    assert [t.dtype for t in bound.values()] == [t.dtype for t in tensors.values()]


def test_no_values_are_read_inside_a_transform() -> None:
    spec = LoraSpec(rank=2, target_modules=("q_proj",))

    def total(tensors: dict[str, Tensor]) -> Tensor:
        bound = spec.bind(CONFIG, tensors)
        return torch.stack([pair.A.sum() + pair.B.sum() for pair in bound.pairs.values()]).sum()

    gradients = torch.func.grad(total)(random_lora(CONFIG, spec))
    assert all((gradient == 1).all() for gradient in gradients.values())
    assert torch.func.vmap(total)(random_lora(CONFIG, spec, 4)).shape == (4,)


# --- Bad tensors ------------------------------------------------------------------------------------------

RANK_2 = LoraSpec(rank=2, layers_to_transform=[0, 2])
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"  # (2, 24)
Q_B = Q_A.replace("_A", "_B")  # (32, 2)
DOWN_B = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"  # (24, 2)


@pytest.mark.parametrize(
    "name",
    [
        "q_proj.lora_A.weight",
        "model.layers.1.self_attn.q_proj.lora_A.weight",  # a layer that the spec leaves out
        "model.layers.3.self_attn.q_proj.lora_A.weight",  # one that the config lacks
        "model.layers.-1.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.q_proj.lora_A.weight",
        "model.layers.0.self_attn.gate_proj.lora_A.weight",
        "model.layers.0.self_attn.qkv_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_C.weight",
        "model.layers.0.self_attn.q_proj.lora_A.other.weight",
        "model.layers.0.self_attn.q_proj.lora_A.bias",
        "model.layers.0.self_attn.q_proj.lora_A",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "model.layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.lora_A.weight",
        "model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        Q_A + "\n",
        "",
        7,
        None,
    ],
)
def test_a_name_that_fits_nothing_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="fits nothing; expected names such as") as caught:
        RANK_2.bind(CONFIG, {**random_lora(CONFIG, RANK_2), name: torch.zeros(2, 24)})
    assert f"LoRA tensor {name!r} " in str(caught.value)
    assert repr(Q_A) in str(caught.value)


def test_a_module_that_the_spec_leaves_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight' fits nothing; .*'.*k_proj.lora_A.weight'"):
        replace(RANK_2, target_modules=("k_proj",)).bind(CONFIG, random_lora(CONFIG, RANK_2))


@pytest.mark.parametrize(("left", "lost"), [(Q_A, Q_B), (Q_B, Q_A)])
@pytest.mark.parametrize("alone", [True, False])
def test_an_a_or_b_without_the_other_is_refused(left: str, lost: str, alone: bool) -> None:
    tensors = random_lora(CONFIG, RANK_2)
    tensors = {left: tensors[left]} if alone else {n: t for n, t in tensors.items() if n != lost}
    with pytest.raises(ValueError, match="without") as caught:
        RANK_2.bind(CONFIG, tensors)
    assert str(caught.value) == f"LoRA tensor {left!r} is given without {lost!r}, expected both or neither"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (Q_A, (24, 2), "(2, 24) or (G, 2, 24)"),
        (Q_A, (3, 24), "(2, 24) or (G, 2, 24)"),
        (Q_A, (2, 23), "(2, 24) or (G, 2, 24)"),
        (Q_A, (1, 2, 23), "(2, 24) or (G, 2, 24)"),
        (Q_A, (48,), "(2, 24) or (G, 2, 24)"),
        (Q_A, (), "(2, 24) or (G, 2, 24)"),
        (Q_A, (1, 1, 2, 24), "(2, 24) or (G, 2, 24)"),
        (Q_A, (0, 2, 24), "G of 1 or more"),
        (Q_A, (0,), "(2, 24) or (G, 2, 24)"),
        (Q_B, (24, 2), "(32, 2) or (G, 32, 2)"),
        (DOWN_B, (40, 2), "(24, 2) or (G, 24, 2)"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(name: str, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        RANK_2.bind(CONFIG, {**random_lora(CONFIG, RANK_2), name: torch.zeros(shape)})
    message = str(caught.value)
    assert f"LoRA tensor {name!r} " in message
    assert f"shape {shape}" in message
    assert message.endswith(f"expected {expected}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_tensor_of_integers_or_float8_is_refused(dtype: torch.dtype) -> None:
    tensors = random_lora(CONFIG, RANK_2)
    with pytest.raises(ValueError, match=f"has dtype {dtype}, expected a floating-point dtype") as caught:
        RANK_2.bind(CONFIG, {**tensors, Q_B: tensors[Q_B].to(dtype)})
    assert f"LoRA tensor {Q_B!r} " in str(caught.value)


@pytest.mark.parametrize("value", [[[0.0] * 24] * 2, None, 0.5, (1, 2), torch.zeros(2, 24).numpy()])
def test_something_that_is_no_tensor_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"is a {type(value).__name__}, expected a torch.Tensor") as caught:
        RANK_2.bind(CONFIG, {**random_lora(CONFIG, RANK_2), Q_A: value})
    assert f"LoRA tensor {Q_A!r} " in str(caught.value)
    with pytest.raises(ValueError, match=f"is a {type(value).__name__}, expected a torch.Tensor"):
        RANK_2.bind(CONFIG, {**random_lora(CONFIG, RANK_2), Q_B: value})


@pytest.mark.parametrize("tensors", [[], None, "adapter_model.safetensors", [{Q_A: torch.zeros(2, 24)}]])
def test_something_that_is_no_dict_of_tensors_is_refused(tensors: Any) -> None:
    with pytest.raises(ValueError, match=f"a {type(tensors).__name__}, expected a dict of LoRA tensors"):
        RANK_2.bind(CONFIG, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [Q_A, DOWN_B])
@pytest.mark.parametrize("place", [0, 17, -1])
def test_a_tensor_that_is_not_finite_is_refused(value: float, dtype: torch.dtype, name: str, place: int) -> None:
    for n_adapters in (None, 3):
        tensors = {n: t.to(dtype) for n, t in random_lora(CONFIG, RANK_2, n_adapters).items()}
        tensors[name].view(-1)[place] = value
        with pytest.raises(ValueError, match="is not finite: it holds NaN or infinity") as caught:
            RANK_2.bind(CONFIG, tensors)
        assert f"LoRA tensor {name!r} " in str(caught.value)


@pytest.mark.parametrize("other", [None, 1, 2, 4])
def test_adapters_of_different_g_in_one_dict_are_refused(other: int | None) -> None:
    tensors = random_lora(CONFIG, RANK_2, 3)
    with pytest.raises(ValueError, match=r"have different G.*expected the same G for all") as caught:
        RANK_2.bind(CONFIG, {**tensors, DOWN_B: random_lora(CONFIG, RANK_2, other)[DOWN_B]})
    shape = (24, 2) if other is None else (other, 24, 2)
    assert f"{Q_A!r} has shape (3, 2, 24), {DOWN_B!r} has shape {shape}" in str(caught.value)


@pytest.mark.parametrize("spelling", [Q_B.replace(".weight", ".default.weight"), Q_B.partition(".model.")[2]])
def test_one_tensor_in_two_spellings_is_refused(spelling: str) -> None:
    tensors = random_lora(CONFIG, RANK_2)
    with pytest.raises(ValueError, match="given twice, in two spellings") as caught:
        RANK_2.bind(CONFIG, {**tensors, spelling: tensors[Q_B]})
    assert f"LoRA tensor {spelling!r} " in str(caught.value)


def test_a_tensor_on_another_device_is_refused() -> None:
    tensors = random_lora(CONFIG, RANK_2)
    with pytest.raises(ValueError, match="is on meta, expected cpu") as caught:
        RANK_2.bind(CONFIG, {**tensors, DOWN_B: tensors[DOWN_B].to("meta")})
    assert f"LoRA tensor {DOWN_B!r} " in str(caught.value)


def test_tensors_without_values_can_be_bound() -> None:
    tensors: Mapping[str, Tensor] = {name: t.to("meta") for name, t in random_lora(CONFIG, RANK_2, 2).items()}
    assert list(RANK_2.bind(CONFIG, tensors).tensors()) == list(tensors)


# --- Bad specs --------------------------------------------------------------------------------------------

NO_REGEX = "is not a regular expression"
NO_RANK = "expected a positive integer"
NO_LAYERS = "expected layer numbers, or None for all"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *(("rank", rank, f"rank is {rank!r}, {NO_RANK}") for rank in (0, -1, 2.0, "8", True, None)),
        ("rank_pattern", {"q_proj": 0}, f"rank_pattern['q_proj'] is 0, {NO_RANK}"),
        ("rank_pattern", {"q_proj": 1.5}, f"rank_pattern['q_proj'] is 1.5, {NO_RANK}"),
        ("rank_pattern", {"(q_proj": 2}, f"pattern '(q_proj' {NO_REGEX}: missing )"),
        ("rank_pattern", ["q_proj"], "rank_pattern is a list, expected a dict"),
        ("alpha", float("nan"), "alpha is nan, expected a finite number"),
        ("alpha", float("inf"), "alpha is inf, expected a finite number"),
        ("alpha", "32", "alpha is '32', expected a finite number"),
        ("alpha", None, "alpha is None, expected a finite number"),
        ("alpha_pattern", {"q_proj": -float("inf")}, "alpha_pattern['q_proj'] is -inf, expected a finite"),
        ("alpha_pattern", {"*_proj": 2}, f"pattern '*_proj' {NO_REGEX}"),
        ("alpha_pattern", {"(?i)Q_proj": 2}, f"pattern '(?i)Q_proj' {NO_REGEX}: global flags"),
        ("alpha_pattern", None, "alpha_pattern is a NoneType, expected a dict"),
        ("target_modules", "q_proj", "target_modules is 'q_proj', expected some of ['q_proj', "),
        ("target_modules", (), "target_modules is (), expected some of"),
        ("target_modules", None, "target_modules is None, expected some of"),
        ("target_modules", ("q_proj", "lm_head"), "target_modules names 'lm_head', expected some of"),
        ("target_modules", ["mlp.up_proj"], "target_modules names 'mlp.up_proj', expected some of"),
        ("layers_to_transform", [], f"layers_to_transform is [], {NO_LAYERS}"),
        ("layers_to_transform", "1", f"layers_to_transform is '1', {NO_LAYERS}"),
        ("layers_to_transform", [0, 1.0], f"layers_to_transform is [0, 1.0], {NO_LAYERS}"),
        ("layers_to_transform", True, f"layers_to_transform is True, {NO_LAYERS}"),
    ],
)
def test_a_bad_spec_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LoraSpec(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers_to_transform", 3, "layers_to_transform names layer 3, expected 0 to 2"),
        ("layers_to_transform", [0, -1], "layers_to_transform names layer -1, expected 0 to 2"),
        *(
            (field, {pattern: 2}, f"{field} names {pattern!r}, which matches none of the adapted modules")
            for field in ("rank_pattern", "alpha_pattern")
            for pattern in ("lm_head", "layers.3.mlp.up_proj", "proj", "", "q_proj.lora_A", "layers.0", 3)
        ),
    ],
)
def test_a_spec_that_does_not_fit_the_config_is_refused(field: str, value: Any, message: str) -> None:
    spec = LoraSpec(**{field: value})
    for use in (lambda: spec.shapes(CONFIG), lambda: spec.bind(CONFIG, {})):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()


def test_a_pattern_for_a_module_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha_pattern names 'q_proj', which matches none of the adapted"):
        LoraSpec(alpha_pattern={"q_proj": 2}, target_modules=["k_proj"]).shapes(CONFIG)


def test_a_spec_is_of_rank_16_and_alpha_32_on_all_projections_and_layers_by_default() -> None:
    shapes = LoraSpec().shapes(CONFIG)
    assert len(shapes) == 2 * len(LoraSpec().target_modules) * CONFIG.num_hidden_layers == 14 * CONFIG.num_hidden_layers
    assert {rows if ".lora_A." in name else columns for name, (rows, columns) in shapes.items()} == {16}
    assert LoraSpec().rank_and_scaling(0, "q_proj") == (16, 2.0)
