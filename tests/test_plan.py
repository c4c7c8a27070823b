"""Plans: they are made once for the sizes of a step, reused, filled with other tokens, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from devices import tolerance
from reference import assert_gradients, one_by_one, random_lora, relative_error, tiny_config
from torch import Tensor
from watch import Watch

from qwen_functional import Lora, LoraSpec, PackedTokens, Qwen2Config, Qwen2Weights, init_weights, pack
from qwen_functional.forward import forward, forward_vjp
from qwen_functional.packing import TILE
from qwen_functional.plan import Plan, Plans

CONFIG = tiny_config()
WINDOWS = tiny_config(use_sliding_window=True, sliding_window=2, max_window_layers=1)
SPEC = LoraSpec(rank=3, alpha=5)
# Equal numbers of nodes, sequences, tokens in all sequences and rows that are read, in trees of different shapes.
SEQUENCES = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32], [5, 6]]
OTHERS = [[1, 2, 3], [40, 41], [40, 41, 42, 43, 44], [1, 2, 3, 4]]
OPTIONS: list[dict[str, Any]] = [
    {"checkpoint": "none"},
    {"checkpoint": "block", "layer": (0, 2, -1)},
    {"memory_budget": 60_000, "layer": 1},
    {"read": "all", "layer": (-1, 0)},
    {"wrt": ["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]},
]


def bound(
    config: Qwen2Config = CONFIG, spec: LoraSpec = SPEC, n_adapters: int | None = 2, seed: int = 0, **kind: Any
) -> Lora:
    return spec.bind(config, random_lora(config, spec, n_adapters, seed=seed, **kind))


def both(
    config: Qwen2Config, weights: Qwen2Weights, tokens: PackedTokens, lora: Lora, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and the gradients for a cotangent with distinct entries."""
    value, vjp = forward_vjp(config, weights, tokens, lora, **options)
    cotangent = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return value, vjp(cotangent.to(value.device))


def assert_same_bits(ours: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(ours[0], expected[0])
    assert list(ours[1]) == list(expected[1])
    for name, gradient in ours[1].items():
        assert torch.equal(gradient, expected[1][name]), name


def test_a_vjp_is_refused_once_its_plan_holds_other_tokens() -> None:
    weights, lora = init_weights(CONFIG), bound()
    plan = Plan(CONFIG, weights, pack(SEQUENCES), lora)
    value, vjp = forward_vjp(CONFIG, weights, pack(SEQUENCES), lora, plan=plan)
    plan.fill(pack(OTHERS))
    with pytest.raises(ValueError, match="plan was filled with other tokens since the forward"):
        vjp(torch.ones_like(value))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_plan_used_again_gives_the_bits_of_a_call_without_it(
    dtype: torch.dtype, options: dict[str, Any], device: str
) -> None:
    weights, tokens = init_weights(CONFIG, dtype=dtype, device=device), pack(SEQUENCES)
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    plan = Plan(CONFIG, weights, tokens, bound(**kind), **options)
    for seed in range(4):
        lora = bound(seed=seed, **kind)
        ours = both(CONFIG, weights, tokens, lora, plan=plan)
        assert_same_bits(ours, both(CONFIG, weights, tokens, lora, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("config", [CONFIG, WINDOWS], ids=["full attention", "windows"])
def test_a_filled_plan_gives_the_bits_of_a_new_one(config: Qwen2Config, options: dict[str, Any], device: str) -> None:
    weights = init_weights(config, device=device)
    lora = bound(config, dtype=torch.float32, device=device)
    plan = Plan(config, weights, pack(SEQUENCES), lora, **options)
    for times, sequences in enumerate((SEQUENCES, OTHERS, SEQUENCES, OTHERS)):
        tokens = pack(sequences)
        if times:
            plan.fill(tokens)
        for _ in range(3 - times // 2):  # on a GPU, captured in between
            ours = both(config, weights, tokens, lora, plan=plan)
            assert_same_bits(ours, both(config, weights, tokens, lora, **options))


def test_a_filled_plan_reads_the_tables_that_it_had(device: str) -> None:
    """Otherwise a captured graph would read freed memory."""
    weights, lora = init_weights(CONFIG, device=device), bound(dtype=torch.float32, device=device)
    plan = Plan(CONFIG, weights, pack(SEQUENCES), lora)

    def tables() -> dict[str, int]:
        made = {**vars(plan.tables[0]), "row_of": vars(plan.bound[0])["row_of"]}.items()
        flat = {name: (value,) if isinstance(value, Tensor) else value for name, value in made}
        return {
            f"{name} {index}": tensor.data_ptr()
            for name, value in flat.items()
            if isinstance(value, tuple)
            for index, tensor in enumerate(value)
            if isinstance(tensor, Tensor)
        }

    before, rows = tables(), plan.tables[0].row_at[0]
    assert len(before) >= 10
    plan.fill(pack(OTHERS))
    assert tables() == before
    for name in ("end", "nodes", "positions"):
        assert getattr(plan.tables[0].row_at[0], name) is getattr(rows, name)


@pytest.mark.parametrize(
    ("sequences", "found"),
    [
        ([*OTHERS[:3], [1, 2, 3, 4, 5]], "10 tokens, 4 sequences and 4 rows"),
        ([*OTHERS, [1, 2]], "9 tokens, 5 sequences and 5 rows"),
        ([*OTHERS[1:], [1, 2, 3, 4]], "9 tokens, 4 sequences and 3 rows"),
    ],
)
def test_a_plan_refuses_tokens_of_other_sizes(sequences: list[list[int]], found: str) -> None:
    weights, lora = init_weights(CONFIG, dtype=torch.float64), bound()
    plan = Plan(CONFIG, weights, pack(SEQUENCES), lora)
    expected = both(CONFIG, weights, pack(SEQUENCES), lora)
    with pytest.raises(ValueError, match=found):
        plan.fill(pack(sequences))
    assert_same_bits(both(CONFIG, weights, pack(SEQUENCES), lora, plan=plan), expected)


def test_a_plan_refuses_tokens_that_the_model_cannot_take_and_stays_as_it_was() -> None:
    weights, lora = init_weights(CONFIG, dtype=torch.float64), bound()
    plan = Plan(CONFIG, weights, pack(SEQUENCES), lora)
    expected = both(CONFIG, weights, pack(SEQUENCES), lora)
    with pytest.raises(ValueError, match="token id 61 is outside"):
        plan.fill(pack([*OTHERS[:3], [1, 2, 3, 61]]))
    assert_same_bits(both(CONFIG, weights, pack(SEQUENCES), lora, plan=plan), expected)


@pytest.mark.parametrize("read", ["last", "all"])
@pytest.mark.parametrize("sequences", [SEQUENCES[1:], [*SEQUENCES, [5, 6]], [*SEQUENCES[:3], [5, 50]]], ids=str)
def test_a_call_refuses_a_plan_of_other_tokens(sequences: list[list[int]], read: str) -> None:
    weights, lora = init_weights(CONFIG, dtype=torch.float64), bound()
    plan = Plan(CONFIG, weights, pack(SEQUENCES), lora, read=read)
    with pytest.raises(ValueError, match="plan was made for other"):
        forward_vjp(CONFIG, weights, pack(sequences), lora, plan=plan)


@pytest.mark.parametrize(
    "lora",
    [
        bound(n_adapters=3),
        bound(spec=LoraSpec(rank=4, alpha=5)),
        bound(spec=LoraSpec(rank=3, alpha=6)),
        bound(spec=LoraSpec(rank=3, alpha=5, target_modules=("q_proj", "v_proj"))),
        bound(spec=LoraSpec(rank=3, alpha=5, layers_to_transform=(0, 1))),
        bound(dtype=torch.float32),
        None,
    ],
    ids=["number", "rank", "scaling", "modules", "layers", "dtype", "no adapters"],
)
def test_a_call_refuses_a_plan_of_another_lora(lora: Lora | None) -> None:
    weights, tokens = init_weights(CONFIG, dtype=torch.float64), pack(SEQUENCES)
    plan = Plan(CONFIG, weights, tokens, bound())
    with pytest.raises(ValueError, match="plan was made for other"):
        forward_vjp(CONFIG, weights, tokens, lora, plan=plan)


@pytest.mark.parametrize(("option", "value"), [("read", "first"), ("checkpoint", "some"), ("graph", "always")])
def test_a_plan_refuses_an_option_that_it_does_not_know(option: str, value: str) -> None:
    weights = init_weights(CONFIG, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{option} is '{value}', expected one of"):
        Plan(CONFIG, weights, pack(SEQUENCES), bound(), **{option: value})  # type: ignore[arg-type]


# All tokens


def prefixes(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(one[:end]) for one in sequences for end in range(1, len(one) + 1)]


@pytest.mark.parametrize("layer", [-1, 1, (0, 2, -1), (-1, 0, 0)], ids=str)
@pytest.mark.parametrize("config", [CONFIG, WINDOWS], ids=["full attention", "windows"])
def test_all_tokens_equal_the_last_ones_of_all_prefixes(config: Qwen2Config, layer: Any, device: str) -> None:
    sequences = [*SEQUENCES, SEQUENCES[0]]  # with a duplicate
    weights = init_weights(config, dtype=torch.float64, device=device)
    lora, allowed = bound(config, device=device), tolerance(device, 1e-12)
    value, gradients = both(config, weights, pack(sequences), lora, layer=layer, read="all")
    expected, expected_gradients = both(config, weights, pack(prefixes(sequences)), lora, layer=layer)
    assert value.shape[-2] == sum(map(len, sequences))
    assert relative_error(value, expected) < allowed
    assert_gradients(gradients, expected_gradients, allowed)


def test_all_tokens_equal_those_of_forward_with_gradients_by_autograd(device: str) -> None:
    weights, allowed = init_weights(CONFIG, dtype=torch.float64, device=device), tolerance(device, 1e-9)
    tensors = {name: tensor.requires_grad_() for name, tensor in random_lora(CONFIG, SPEC, 2, device=device).items()}
    value, vjp = forward_vjp(CONFIG, weights, pack(SEQUENCES), SPEC.bind(CONFIG, tensors), layer=(0, 1, -1), read="all")
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    gradients = vjp(cotangent)
    outputs = []
    for adapter in one_by_one(tensors):
        each = [
            forward(
                CONFIG,
                weights,
                torch.tensor([sequence], device=device),
                lora=SPEC.bind(CONFIG, adapter),
                output_hidden_states=True,
            ).hidden_states
            for sequence in SEQUENCES
        ]
        outputs.append(torch.stack([torch.cat([states[index][0] for states in each if states]) for index in (1, 2, 3)]))
    expected = torch.stack(outputs)
    assert relative_error(value, expected.detach()) < allowed
    wanted = torch.autograd.grad(expected, list(tensors.values()), cotangent)
    assert_gradients(gradients, dict(zip(tensors, wanted, strict=True)), allowed)


# Sizes


class Softmaxes(Watch):
    """Also records the shapes of attention's probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket is torch.ops.aten._softmax:
            self.probabilities.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("options", [{}, {"layer": (0, -1)}, {"read": "all", "layer": (0, -1)}], ids=str)
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_thousands_of_read_outs_attend_tile_by_tile(checkpoint: str, options: dict[str, Any]) -> None:
    stem, n_leaves, spec = list(range(10)), 2_000, LoraSpec(rank=1, target_modules=("q_proj", "v_proj"))
    config = tiny_config(vocab_size=2_100, num_hidden_layers=2)
    weights = init_weights(config)
    lora = spec.bind(config, random_lora(config, spec, 2, dtype=torch.float32))
    tokens = pack([[*stem, 20 + leaf] for leaf in range(n_leaves)])
    assert len(tokens) == len(stem) + n_leaves
    with Softmaxes() as watch:
        value, vjp = forward_vjp(config, weights, tokens, lora, checkpoint=checkpoint, **options)
        gradients = vjp(torch.ones_like(value))
    assert value.shape[-2] == n_leaves * (11 if options.get("read") == "all" else 1)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    group = config.num_attention_heads // config.num_key_value_heads
    tiles = -(-n_leaves // TILE)
    assert len(watch.probabilities) >= 2 * tiles
    for _, rows, keys in watch.probabilities:
        assert rows <= TILE * group
        assert keys <= TILE + len(stem)


# Plans


def test_no_more_plans_than_the_most_are_kept_and_the_latest_are() -> None:
    weights, tokens, made = init_weights(CONFIG, dtype=torch.float64), pack(SEQUENCES), []

    def make(lora: Lora | None, wrt: Sequence[str] | None) -> Plan:
        made.append(None if lora is None else lora.n_adapters)
        return Plan(CONFIG, weights, tokens, lora, wrt=wrt)

    plans = Plans(make, most=3)
    loras = {n: bound(n_adapters=n) for n in (1, 2, 3, 4)}
    first = plans(loras[1], None)
    assert plans(bound(n_adapters=1, seed=1), None) is first  # other values
    for n in (2, 3, 1, 4):  # 1 was used after 2
        plans(loras[n], None)
    assert made == [1, 2, 3, 4]
    assert plans(loras[1], None) is first
    plans(loras[2], None)
    assert made == [1, 2, 3, 4, 2]
    names = loras[1].names()
    assert plans(loras[1], names[:2]) is not first
    assert plans(loras[1], names[:2]).wanted != first.wanted
    assert plans(None, ()).n_adapters == 1
    assert made[-2:] == [1, None]
    plans.release()
    assert plans(loras[1], None) is not first


def test_of_captured_plans_no_more_than_the_most_are_kept_captured() -> None:
    weights, tokens = init_weights(CONFIG, dtype=torch.float64), pack(SEQUENCES)
    plans = Plans(lambda lora, wrt: Plan(CONFIG, weights, tokens, lora, wrt=wrt), most=8, most_captured=2)
    made: list[Any] = []
    for n in (1, 2, 3, 4):
        made.append(plans(bound(n_adapters=n), None))
        if n != 3:
            made[-1].captured = object()  # as on a GPU
        kept = [plan.n_adapters for plan in made if plan.captured is not None]
        assert kept == {1: [1], 2: [1, 2], 3: [1, 2], 4: [1, 2, 4]}[n]
    plans(bound(n_adapters=3), None)  # another use captures it, which makes room first
    assert [plan.n_adapters for plan in made if plan.captured is not None] == [2, 4]


def test_one_adapter_and_a_batch_of_one_have_plans_of_their_own() -> None:
    weights, tokens = init_weights(CONFIG, dtype=torch.float64), pack(SEQUENCES)
    plans = Plans(partial(Plan, CONFIG, weights, tokens))
    one, batch = bound(n_adapters=None), bound(n_adapters=1)
    for lora in (one, batch, one):
        _, vjp = forward_vjp(CONFIG, weights, tokens, lora, plan=plans(lora, None))
        gradients = vjp(torch.ones(1, len(SEQUENCES), CONFIG.hidden_size, dtype=torch.float64))
        assert {name: g.shape for name, g in gradients.items()} == {n: t.shape for n, t in lora.tensors().items()}


def test_equal_configs_hash_alike() -> None:
    one, same = tiny_config(), tiny_config()
    assert one == same
    assert one is not same
    assert hash(one) == hash(same)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    others = {one, same, WINDOWS, tiny_config(rope_parameters=rope), tiny_config(rope_parameters=dict(rope))}
    assert len(others) == 3
