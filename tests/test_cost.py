"""The predicted multiplications and kept bytes of a step, against the measured ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import random_lora, tiny_config
from torch import Tensor
from watch import Watch

from qwen_functional import LoraSpec, Qwen2Config, init_weights, pack
from qwen_functional.engine import forward_vjp
from qwen_functional.plan import Plan

CONFIG = tiny_config(vocab_size=67, num_hidden_layers=4)
TREE = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32]]
CHAIN = [list(range(5, 5 + n)) for n in range(1, 20) if n != 4]  # most rows are read
SPECS = {
    "thin": LoraSpec(rank=1, target_modules=("q_proj",)),
    "thick": LoraSpec(rank=64, alpha=32),
    "of two layers": LoraSpec(rank=64, layers_to_transform=(1, 2)),
    "of two ranks": LoraSpec(rank=2, rank_pattern={"down_proj": 48, "up_proj": 64}),
}
ADAPTERS = 3


class Step:
    """A step on the CPU, and the costs that its plan predicts."""

    def __init__(
        self,
        spec: LoraSpec,
        probes: list[list[int]] = TREE,
        config: Qwen2Config = CONFIG,
        dtype: torch.dtype = torch.float32,
        lora_dtype: torch.dtype = torch.float32,
        compute: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.config, self.tokens = config, pack(probes)
        self.weights = init_weights(config, dtype=dtype).compute_in(compute or dtype)
        self.lora = spec.bind(config, random_lora(config, spec, ADAPTERS, dtype=lora_dtype))
        self.plan = Plan(config, self.weights, self.tokens, self.lora, **options)
        self.cost = self.plan.cost

    def kept(self) -> int:
        """Bytes alive after the forward, apart from the value."""
        with Watch() as watch:
            value, vjp = forward_vjp(self.config, self.weights, self.tokens, self.lora, plan=self.plan)
        blocks = [tensor for block in self.weights.blocks for tensor in block.tensors().values()]
        tables = [table for table in vars(self.plan).values() if isinstance(table, Tensor)]
        return watch.held([value, *self.lora.tensors().values(), *blocks, *tables]) if vjp else 0

    def multiplied(self) -> tuple[int, int]:
        """FLOP of products with base weights, in the forward and in the vjp."""
        with Watch() as there:
            value, vjp = forward_vjp(self.config, self.weights, self.tokens, self.lora, plan=self.plan)
        with Watch() as back:
            vjp(torch.ones_like(value))
        return 2 * there.work(), 2 * back.work()


WINDOWS = tiny_config(
    vocab_size=200, num_hidden_layers=4, max_position_embeddings=200, use_sliding_window=True, sliding_window=3,
    max_window_layers=2,
)  # fmt: skip
QWEN3 = tiny_config(model_type="qwen3", vocab_size=200, num_hidden_layers=4, head_dim=10, max_position_embeddings=200)
CASES: dict[str, dict[str, Any]] = {
    "tree": {},
    "most rows read": {"probes": CHAIN},
    "all rows read": {"read": "all"},
    "a lower block read": {"layer": 2},
    "bfloat16": {"dtype": torch.bfloat16, "lora_dtype": torch.bfloat16},
    "bfloat16, cast": {"dtype": torch.bfloat16},  # the adapters are float32
    "bfloat16, cast, most rows read": {"dtype": torch.bfloat16, "probes": CHAIN},
    "bfloat16, cast, all rows read": {"dtype": torch.bfloat16, "read": "all"},
    "weights cast": {"dtype": torch.bfloat16, "compute": torch.float32},
    "weights cast, all rows read": {"dtype": torch.bfloat16, "compute": torch.float32, "read": "all"},
    "windows": {"probes": [list(range(200))], "config": WINDOWS},
    "one layer": {"config": tiny_config(vocab_size=67, num_hidden_layers=1)},
    "qwen3": {"config": QWEN3},
    "qwen3, weights cast": {"config": QWEN3, "probes": CHAIN, "dtype": torch.bfloat16, "compute": torch.float32},
    "qwen3, bfloat16, all rows read": {"config": QWEN3, "read": "all", "dtype": torch.bfloat16},
}


def options_of(case: str, spec: LoraSpec) -> dict[str, Any]:
    return {**CASES[case], "spec": replace(spec, layers_to_transform=None) if case == "one layer" else spec}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("case", CASES)
def test_no_more_bytes_are_kept_than_are_counted(case: str, spec: str) -> None:
    options = options_of(case, SPECS[spec])
    inputs = Step(**options, checkpoint="block")
    cost, least = inputs.cost, inputs.kept()
    assert least <= cost.kept_bytes(0)
    for n_keep in range(1, inputs.plan.n_blocks + 1):
        step = Step(**options, checkpoint="auto", memory_budget=cost.kept_bytes(n_keep))
        assert step.plan.n_keep == n_keep
        kept = step.kept()
        assert kept <= cost.kept_bytes(n_keep)
        assert kept - least <= cost.kept_bytes(n_keep) - cost.kept_bytes(0)


@pytest.mark.parametrize("spec", ["thin", "thick"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_keeps_the_bytes_that_are_counted(dtype: torch.dtype, spec: str) -> None:
    """A block between the first, whose input is shared, and the last. float32 adapters are cast to bfloat16."""
    two, three = Step(SPECS[spec], dtype=dtype), Step(SPECS[spec], dtype=dtype)
    two.plan.n_keep, three.plan.n_keep = 2, 3
    assert three.kept() - two.kept() == two.cost.block_bytes()


@pytest.mark.parametrize("case", CASES)
def test_auto_keeps_no_more_than_its_budget(case: str) -> None:
    """Also at a rank at which A and B outweigh the activations of these few tokens."""
    options = options_of(case, SPECS["thick"])
    whole = Step(**options, checkpoint="none")
    most, least = whole.cost.kept_bytes(), whole.cost.kept_bytes(0)
    n_keep = []
    for eighth in range(9):
        budget = least + (most - least) * eighth // 8
        step = Step(**options, checkpoint="auto", memory_budget=budget)
        assert step.kept() <= budget
        n_keep.append(step.plan.n_keep)
    assert n_keep == sorted(n_keep)
    assert (n_keep[0], n_keep[-1]) == (0, whole.plan.n_blocks)


OTHERS = {
    f"of {name}": LoraSpec(rank=2, target_modules=(name,), layers_to_transform=layers)
    for name, layers in (("k_proj", None), ("o_proj", None), ("gate_proj", None), ("down_proj", 1))
}


@pytest.mark.parametrize("spec", [*SPECS, *OTHERS])
@pytest.mark.parametrize("case", [case for case in CASES if "cast" not in case and case != "bfloat16"])
def test_the_engine_multiplies_what_is_counted(case: str, spec: str) -> None:
    options = options_of(case, {**SPECS, **OTHERS}[spec])
    whole, inputs = (Step(**options, checkpoint=checkpoint) for checkpoint in ("none", "block"))
    some = Step(**options, checkpoint="auto", memory_budget=whole.cost.kept_bytes(1))
    for step in (whole, some, inputs):
        n_keep = step.plan.n_keep
        there, back = step.multiplied()
        assert there == step.cost.base_flop(n_keep, backwards=False)
        assert back == step.cost.base_flop(n_keep, forwards=False)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("case", CASES)
def test_a_budget_keeps_a_block_from_the_byte_on_that_it_and_what_is_kept_anyway_take(case: str, spec: str) -> None:
    step = Step(**options_of(case, SPECS[spec]), checkpoint="none")
    for n_keep in range(1, step.plan.n_blocks + 1):
        enough = step.cost.kept_bytes(n_keep)
        assert (step.cost.blocks_within(enough - 1), step.cost.blocks_within(enough)) == (n_keep - 1, n_keep)


@pytest.mark.parametrize("spec", SPECS)
def test_adapters_and_cast_weights_that_are_held_once_more_count_with_all_their_bytes(spec: str) -> None:
    """As on a GPU, in the compute dtype. A block's norms are not cast."""
    step = Step(SPECS[spec], dtype=torch.bfloat16, compute=torch.float32)
    cost = replace(step.cost, copies_adapters=True)
    adapters = sum(tensor.nbytes for tensor in step.lora.tensors().values())
    fields_of = [vars(block) for block in step.weights.blocks]
    cast = sum(2 * value.nbytes for block in fields_of for name, value in block.items() if "norm" not in name)
    assert cost.adapter_bytes() == adapters + cast
    assert replace(cost, casts_weights=False).adapter_bytes() == adapters
    assert replace(cost, copies_adapters=False).adapter_bytes() == 0
