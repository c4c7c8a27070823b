"""What ``forward_vjp`` computes and keeps: only the GEMMs that are needed, no logits, no tape, as much as requested."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import assert_gradients, random_lora, tiny_config
from torch import Tensor
from watch import Watch

from qwen_functional import LoraSpec, PackedTokens, init_weights, pack
from qwen_functional.forward import Vjp, forward_vjp
from qwen_functional.plan import Plan

CONFIG = tiny_config(vocab_size=67, num_hidden_layers=4)
SPEC = LoraSpec(rank=2)
TOKENS = pack([[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32], [5, 6]])
WEIGHTS = init_weights(CONFIG)


def run(
    n_adapters: int | None = 3, spec: LoraSpec = SPEC, tokens: PackedTokens = TOKENS, **options: Any
) -> tuple[Tensor, Vjp]:
    tensors = random_lora(CONFIG, spec, n_adapters, dtype=torch.float32)
    return forward_vjp(CONFIG, WEIGHTS, tokens, spec.bind(CONFIG, tensors), **options)


def block_bytes() -> int:
    """The bytes that "auto" counts for keeping a whole block, with three adapters."""
    tensors = random_lora(CONFIG, SPEC, 3, dtype=torch.float32)
    return Plan(CONFIG, WEIGHTS, TOKENS, SPEC.bind(CONFIG, tensors)).cost.block_bytes()


def watched(**options: Any) -> tuple[Watch, Watch, dict[str, Tensor]]:
    """The operations of the forward, those of the vjp, and the gradients."""
    with Watch() as there:
        value, vjp = run(**options)
    with Watch() as back:
        gradients = vjp(torch.ones_like(value))
    return there, back, gradients


def names(*parts: str, spec: LoraSpec = SPEC) -> list[str]:
    return [name for name in spec.shapes(CONFIG) if any(part in name for part in parts)]


# GEMMs


def test_the_number_of_base_gemms_does_not_grow_with_the_adapters() -> None:
    one, many = watched(n_adapters=1), watched(n_adapters=9)
    for few, more in zip(one[:2], many[:2], strict=True):
        assert len(few.gemms) == len(more.gemms) > 0
    # A block has q|k|v, o, gate, up and down; the last one has separate q and k|v. The first one's q|k|v have no dx.
    assert len(one[0].gemms) == 5 * CONFIG.num_hidden_layers + 1


def test_a_block_does_no_work_that_nothing_needs() -> None:
    n_adapters, tokens, read, blocks = 3, len(TOKENS), len(set(TOKENS.last)), CONFIG.num_hidden_layers
    h, q, kv, i = CONFIG.hidden_size, CONFIG.q_size, CONFIG.kv_size, CONFIG.intermediate_size
    rest = h * q + 3 * h * i  # o, gate, up, down
    qkv = h * (q + 2 * kv)
    top = n_adapters * (tokens * 2 * h * kv + read * (h * q + rest))
    forwards = tokens * qkv + n_adapters * tokens * rest  # all adapters share the first block's input
    forwards += (blocks - 2) * n_adapters * tokens * (qkv + rest) + top
    backwards = n_adapters * tokens * rest + (blocks - 2) * n_adapters * tokens * (qkv + rest) + top
    there, back, _ = watched(n_adapters=n_adapters, checkpoint="none")
    assert there.work() <= forwards
    assert back.work() <= backwards
    _, again, _ = watched(n_adapters=n_adapters, checkpoint="block")
    assert again.work() <= forwards + backwards


def test_adapters_share_the_work_below_the_first_adapted_block() -> None:
    upper = LoraSpec(rank=2, layers_to_transform=(2, 3))
    one, many = watched(n_adapters=1, spec=upper), watched(n_adapters=8, spec=upper)
    below = 2 * 5 + 1  # GEMMs of two blocks, and the next one's q|k|v
    assert one[0].gemms[:below] == many[0].gemms[:below]
    assert many[0].gemms[below][0] == 8 * len(TOKENS)


def test_blocks_above_the_one_that_is_read_are_not_computed() -> None:
    works = [watched(layer=layer)[0].work() for layer in range(CONFIG.num_hidden_layers)]
    assert works == sorted(set(works))
    assert len(watched(layer=0)[0].gemms) == 6
    _, vjp = run(layer=1)
    assert vjp.n_blocks == 2


def test_no_logits_are_computed() -> None:
    there, back, _ = watched()
    assert CONFIG.vocab_size not in there.shapes | back.shapes


# wrt


def test_gradients_that_nobody_wants_cost_nothing() -> None:
    for layer in range(CONFIG.num_hidden_layers):
        _, vjp = run(wrt=names(f"layers.{layer}."))
        assert vjp.n_blocks == CONFIG.num_hidden_layers - layer
    full = watched(checkpoint="none")[1].work()
    works = [
        watched(checkpoint="none", wrt=names(*wanted))[1].work()
        for wanted in (
            ["layers.0.", "layers.3."],
            ["layers.1."],
            ["layers.2.self_attn.o_proj"],
            ["layers.3.self_attn.q_proj"],
            ["layers.3.self_attn.o_proj"],
            ["layers.3.mlp.up_proj"],
            ["layers.3.mlp.down_proj"],
        )
    ]
    assert works == sorted(set(works), reverse=True)
    assert works[0] == full
    assert works[-1] == 0, "the last projection's own gradient needs no GEMM with a base weight"


def test_the_other_half_of_an_adapter_costs_nothing() -> None:
    products = [watched(wrt=names(f"layers.3.mlp.down_proj{side}"))[1].batched for side in ("", ".lora_A", ".lora_B")]
    assert products == [3, 2, 1]  # t, dA and dB


def test_the_adapter_beside_the_wanted_one_costs_nothing() -> None:
    wanted = (["gate_proj.lora_A"], ["up_proj.lora_A"], ["gate_proj.lora_B"], ["gate_proj.lora_A", "up_proj.lora_A"])
    products = [watched(wrt=names(*(f"layers.3.mlp.{part}" for part in parts)))[1].batched for parts in wanted]
    assert products == [4, 4, 3, 5]  # two for down_proj's dx; then t and dA, only dB, or two t and a joint dA


@pytest.mark.parametrize("nothing", [{"wrt": ()}, {"n_adapters": None, "wrt": []}], ids=["batch", "one"])
def test_a_vjp_of_no_gradients_costs_nothing(nothing: dict[str, Any]) -> None:
    value, vjp = run(checkpoint="none", **nothing)
    assert vjp.n_blocks == vjp.n_kept == 0
    with Watch() as back:
        assert vjp(torch.ones_like(value)) == {}
    assert back.gemms == []


def test_the_rest_of_a_stack_does_not_spoil_a_gradient() -> None:
    _, _, full = watched()
    for wanted in ("q_proj.lora_A", "k_proj.lora_B", "v_proj", "gate_proj.lora_B", "up_proj.lora_A"):
        _, _, some = watched(wrt=names(wanted))
        assert_gradients(some, {name: full[name] for name in names(wanted)}, 1e-6)


# checkpoint


def test_checkpointing_changes_no_bit() -> None:
    _, _, expected = watched(checkpoint="none")
    each = block_bytes()
    budgets: list[dict[str, Any]] = [{"memory_budget": each * n} for n in range(6)]
    for options in ({"checkpoint": "block"}, *budgets, {}):
        for layer in (-1, 2):
            _, _, gradients = watched(layer=layer, **options)
            same = expected if layer == -1 else watched(checkpoint="none", layer=layer)[2]
            assert all(torch.equal(gradients[name], same[name]) for name in same), options


THIN = LoraSpec(rank=1, target_modules=("q_proj",))  # the budget does not count the low-rank parts


def held_after(checkpoint: str, memory_budget: int | None = None) -> tuple[int, Vjp]:
    """Bytes kept for the vjp, beyond what a run without gradients leaves."""
    lora = THIN.bind(CONFIG, random_lora(CONFIG, THIN, 3, dtype=torch.float32))

    def held(wrt: tuple[()] | None) -> tuple[Watch, Tensor, Vjp]:
        options = {"checkpoint": checkpoint, "memory_budget": memory_budget, "wrt": wrt}
        with Watch() as watch:
            value, vjp = forward_vjp(CONFIG, WEIGHTS, TOKENS, lora, **options)  # type: ignore[arg-type]
        return watch, value, vjp

    nothing, _, _without = held(())
    watch, value, vjp = held(None)
    kept = watch.held() - nothing.held()
    vjp(torch.ones_like(value))
    assert watch.held() < nothing.held() + 0.1 * kept, "vjp kept what it no longer needs"
    return kept, vjp


def test_as_much_is_kept_as_was_asked_for_and_no_more() -> None:
    blocks = CONFIG.num_hidden_layers
    whole, vjp = held_after("none")
    assert (vjp.checkpoint, vjp.n_kept, vjp.n_blocks) == ("none", blocks, blocks)
    inputs, vjp = held_after("block")
    assert (vjp.checkpoint, vjp.n_kept, vjp.n_blocks) == ("block", 0, blocks)
    assert inputs <= 2 * blocks * 3 * len(TOKENS) * CONFIG.hidden_size * 4  # the input of each half of a block
    assert inputs < 0.25 * whole
    kept = set()
    for budget in range(0, 2 * whole, whole // 8):
        held, vjp = held_after("auto", budget)
        kept.add(vjp.n_kept)
        assert held <= max(1.05 * budget, inputs), "more was kept than the budget allows"
        expected = {0: "block", blocks: "none"}.get(vjp.n_kept, f"{vjp.n_kept} of {blocks} blocks kept")
        assert vjp.checkpoint == expected
        # A budget with room for another block is used.
        assert vjp.n_kept == blocks or held + 1.5 * (whole - inputs) / (blocks - 1) > budget
    assert kept == set(range(blocks + 1))


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_a_block_is_let_go_after_its_vjp(checkpoint: str) -> None:
    held: list[int] = []
    with Watch() as nothing:
        without = run(checkpoint=checkpoint, wrt=())
    with Watch() as there:
        value, vjp = run(checkpoint=checkpoint)
    with Watch(before_gemm=lambda: held.append(there.held() - nothing.held())):
        vjp(torch.ones_like(value))
    assert without
    assert held == sorted(held, reverse=True)
    # The last block keeps least, since it computes few rows: of three others, one is left.
    assert held[-1] < 0.4 * held[0], held


def test_half_of_the_free_memory_is_used_to_keep_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run()[1].checkpoint == "none"
    monkeypatch.setattr("qwen_functional.plan.free_bytes", lambda device: 0)
    assert run()[1].checkpoint == "block"
    # Half of the free memory.
    each = block_bytes()
    inputs = 2 * CONFIG.num_hidden_layers * 3 * len(TOKENS) * CONFIG.hidden_size * 4
    monkeypatch.setattr("qwen_functional.plan.free_bytes", lambda device: 2 * (inputs + 2 * each))
    assert run()[1].checkpoint == "2 of 4 blocks kept"
