"""``forward`` against transformers and PEFT: values for every config, mask and position; bad inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import tolerance
from reference import (
    CONFIGS,
    SPECS,
    call,
    hf_model,
    one_by_one,
    peft_model,
    random_lora,
    relative_error,
    tiny_config,
    tiny_fields,
)
from torch import Tensor

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, init_weights
from qwen_functional.forward import ForwardOutput, forward

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
N_ROWS, N_TOKENS = 3, 7


def random_ids(rows: int = N_ROWS, n_tokens: int = N_TOKENS, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randint(61, (rows, n_tokens), generator=torch.Generator().manual_seed(seed)).to(device)


def assert_same(ours: ForwardOutput, theirs: Any, real: Tensor | None = None, on_cpu: float = 1e-13) -> None:
    """Logits and all hidden states are equal at the tokens where ``real`` (N, T) is true."""
    real = (torch.ones(ours.logits.shape[:2]) if real is None else real).bool().cpu()
    assert ours.hidden_states is not None
    pairs = [*zip(ours.hidden_states, theirs.hidden_states, strict=True), (ours.logits, theirs.logits)]
    pairs.append((ours.last_hidden_state, theirs.hidden_states[-1]))
    assert {mine.device for mine, _ in pairs} == {ours.logits.device}
    errors = [relative_error(mine.cpu()[real], other[real]) for mine, other in pairs]
    assert max(errors) < tolerance(ours.logits.device.type, on_cpu), errors
    assert all(tensor.isfinite().all() for tensor in (ours.logits, *ours.hidden_states)), "padding is not finite"


MASKS: dict[str, list[list[int]] | None] = {
    "no mask": None,
    "nothing padded": [[1] * 7] * 3,
    "right": [[1, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]],
    "both sides": [[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]],
    "a hole": [[1, 1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0]],
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_equal_transformers(changes: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    config, ids = tiny_config(**changes), random_ids(device=device)
    weights = init_weights(config, dtype=dtype, device=device)
    model = hf_model(config, weights, fields=tiny_fields(**changes))
    for mask in MASKS.values():
        attention_mask = None if mask is None else torch.tensor(mask, device=device)
        ours = forward(config, weights, ids, attention_mask, output_hidden_states=True)
        theirs = call(model, input_ids=ids, attention_mask=attention_mask, output_hidden_states=True)
        assert_same(ours, theirs, attention_mask, TOLERANCE[dtype])


def test_outputs_equal_eager_attention_in_transformers() -> None:
    config, ids, mask = tiny_config(), random_ids(), torch.tensor(MASKS["both sides"])
    weights = init_weights(config)
    model = hf_model(config, weights, attn_implementation="eager")
    theirs = call(model, input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert_same(forward(config, weights, ids, mask, output_hidden_states=True), theirs, mask, 3e-6)


POSITIONS: dict[str, list[list[int]]] = {
    "as by default": [[0, 1, 2, 3, 4, 5, 6]],
    "for all rows": [[5, 6, 7, 8, 9, 10, 11]],
    "by row": [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4, 40]],
    "packed": [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6], [3, 4, 0, 1, 2, 3, 4]],
    "packed, all rows": [[0, 1, 2, 3, 0, 1, 2]],
    "with a gap": [[0, 1, 2, 5, 6, 7, 8], [0, 2, 4, 6, 8, 10, 12], [0, 0, 1, 1, 2, 2, 3]],
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("changes", [{}, CONFIGS["windows"], CONFIGS["yarn"]], ids=["full", "windows", "yarn"])
def test_position_ids_mean_what_they_do_in_transformers(
    positions: list[list[int]], changes: dict[str, Any], device: str
) -> None:
    config, ids = tiny_config(**changes), random_ids(device=device)
    weights = init_weights(config, dtype=torch.float64, device=device)
    model = hf_model(config, weights)
    for name in (None, "nothing padded", "left"):
        mask = None if name is None else torch.tensor(MASKS[name], device=device)
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": torch.tensor(positions, device=device)}
        theirs = call(model, input_ids=ids, **inputs, output_hidden_states=True)
        assert_same(forward(config, weights, ids, **inputs, output_hidden_states=True), theirs, mask)


def test_neither_padding_nor_the_kind_of_mask_changes_a_text(device: str) -> None:
    config, ids = tiny_config(), random_ids(1, device=device)
    weights = init_weights(config, dtype=torch.float64, device=device)
    alone = forward(config, weights, ids).logits
    padded = torch.cat((random_ids(1, 2, seed=1, device=device), ids, random_ids(1, 3, seed=2, device=device)), 1)
    mask = torch.tensor([[0, 0, *[1] * N_TOKENS, 0, 0, 0]], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for kind in (mask, mask.bool(), mask.double(), mask.int() * 7):
        logits = forward(config, weights, padded, kind, positions).logits
        assert relative_error(logits[:, 2:-3], alone) < 1e-13


def test_outputs_come_in_the_dtype_that_they_have_in_transformers(device: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        config = tiny_config()
        weights = init_weights(config, dtype=dtype, device=device)
        ours = forward(config, weights, random_ids(device=device), output_hidden_states=True)
        theirs = call(hf_model(config, weights), input_ids=random_ids(), output_hidden_states=True)
        assert ours.hidden_states is not None
        assert ours.logits.dtype == ours.last_hidden_state.dtype == theirs.logits.dtype == dtype
        assert {h.dtype for h in ours.hidden_states} == {h.dtype for h in theirs.hidden_states} == {dtype}
        # Tests on real weights bound the error in half precision; here it should just not be wrong.
        assert relative_error(ours.logits, theirs.logits) < 0.1
    assert forward(config, weights, random_ids(device=device)).hidden_states is None


# LoRA


def bare_peft(config: Qwen2Config, weights: Qwen2Weights, spec: LoraSpec) -> Any:
    return peft_model(hf_model(config, weights), spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("changes", [{}, CONFIGS["one kv head for 7"]], ids=["2 of 4", "1 of 7"])
def test_one_adapter_equals_peft(spec: LoraSpec, changes: dict[str, Any], device: str) -> None:
    config, ids = tiny_config(**changes), random_ids(device=device)
    mask = torch.tensor(MASKS["both sides"], device=device)
    weights = init_weights(config, dtype=torch.float64, device=device)
    tensors = random_lora(config, spec, device=device)
    lora = spec.bind(config, tensors)
    ours = forward(config, weights, ids, mask, lora=lora, output_hidden_states=True)
    model = bare_peft(config, weights, spec)
    theirs = call(model, tensors, input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert_same(ours, theirs, mask)
    without = forward(config, weights, ids, mask)
    assert relative_error(ours.logits, without.logits) > 1e-3, "the adapter does nothing"


@pytest.mark.parametrize(
    ("n_adapters", "index"),
    [(3, None), (2, [1, 0, 1]), (4, [3, 3, 0]), (1, None), (1, [0, 0, 0])],
    ids=["one each", "shared", "some unused", "one for all", "one, by index"],
)
def test_each_row_uses_its_own_adapter(n_adapters: int, index: list[int] | None, device: str) -> None:
    config, spec, ids = tiny_config(), SPECS["patterns"], random_ids(device=device)
    mask = torch.tensor(MASKS["left"], device=device)
    weights = init_weights(config, dtype=torch.float64, device=device)
    tensors = random_lora(config, spec, n_adapters, device=device)
    lora, model = spec.bind(config, tensors), bare_peft(config, weights, spec)
    adapter_index = None if index is None else torch.tensor(index, device=device)
    ours = forward(config, weights, ids, mask, lora=lora, adapter_index=adapter_index)
    own = index or (range(N_ROWS) if n_adapters == N_ROWS else [0] * N_ROWS)
    for row, adapter in enumerate(own):
        inputs = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        theirs = call(model, one_by_one(tensors)[adapter], **inputs)
        real = mask[row].bool()
        assert relative_error(ours.logits[row][real], theirs.logits[0][real.cpu()]) < tolerance(device, 1e-13)


def test_modules_without_tensors_are_bare(device: str) -> None:
    config, spec, ids = tiny_config(), LoraSpec(rank=3), random_ids(device=device)
    weights = init_weights(config, dtype=torch.float64, device=device)
    every = random_lora(config, spec, device=device)
    tensors = {name: tensor for name, tensor in every.items() if "layers.1" in name or "up_proj" in name}
    theirs = call(bare_peft(config, weights, spec), tensors, input_ids=ids, output_hidden_states=True)
    ours = forward(config, weights, ids, lora=spec.bind(config, tensors), output_hidden_states=True)
    assert_same(ours, theirs)


# Bad input


CONFIG = tiny_config()
WEIGHTS = init_weights(CONFIG)
TWO = LoraSpec(rank=2).bind(CONFIG, random_lora(CONFIG, LoraSpec(rank=2), 2, dtype=torch.float32))
IDS = random_ids(3, 5)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an id too high": ({"input_ids": IDS.clone().fill_(61)}, "input_ids holds 61, .* expected 0 to 60"),
    "an id below 0": ({"input_ids": IDS - 62}, "input_ids holds -.*, outside .* expected 0 to 60"),
    "too many tokens": (
        {"input_ids": random_ids(1, 65)},
        "input_ids has 65 tokens a row, expected at most max_position_embeddings = 64",
    ),
    "one row": ({"input_ids": IDS[0]}, r"input_ids has shape \(5,\), expected \(N, T\)"),
    "no rows": ({"input_ids": IDS[:0]}, r"input_ids has shape \(0, 5\), expected \(N, T\), neither zero"),
    "no tokens": ({"input_ids": IDS[:, :0]}, r"input_ids has shape \(3, 0\), expected \(N, T\)"),
    "ids that are no integers": (
        {"input_ids": IDS.float()},
        "input_ids has dtype torch.float32, expected torch.int64",
    ),
    "a mask of another shape": (
        {"attention_mask": torch.ones(3, 6)},
        r"attention_mask has shape \(3, 6\), expected \(3, 5\)",
    ),
    "a mask of one row": (
        {"attention_mask": torch.ones(1, 5)},
        r"attention_mask has shape \(1, 5\), expected \(3, 5\)",
    ),
    "a mask with an empty row": (
        {"attention_mask": torch.tensor([[1] * 5, [0] * 5, [1] * 5])},
        "attention_mask has no token in row 1, expected at least one",
    ),
    "positions of another shape": (
        {"position_ids": torch.arange(5)},
        r"position_ids has shape \(5,\), expected \(3, 5\) or \(1, 5\)",
    ),
    "an index without adapters": (
        {"adapter_index": torch.tensor([0, 0, 0])},
        "adapter_index is given without lora, expected both or neither",
    ),
    "adapters that are neither 1 nor N": ({"lora": TWO}, "2 adapters for 3 rows .*, expected 1 or 3 adapters"),
    "an index of another shape": (
        {"lora": TWO, "adapter_index": torch.tensor([0, 1])},
        r"adapter_index has shape \(2,\) .*, expected \(3,\) integers",
    ),
    "an index that is no integer": (
        {"lora": TWO, "adapter_index": torch.tensor([0.0, 1.0, 1.0])},
        r"adapter_index has .* dtype torch.float32, expected \(3,\) integers",
    ),
    "an adapter that is not there": (
        {"lora": TWO, "adapter_index": torch.tensor([0, 1, 2])},
        "adapter_index holds 2, expected 0 to 1",
    ),
    "an adapter below 0": (
        {"lora": TWO, "adapter_index": torch.tensor([0, -1, 1])},
        "adapter_index holds -1, expected 0 to 1",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(CONFIG, WEIGHTS, **{"input_ids": IDS, **inputs})


def test_weights_without_an_lm_head_are_refused() -> None:
    without = replace(WEIGHTS, lm_head=None)
    with pytest.raises(ValueError, match="weights have no lm_head, which logits need; expected load_pretrained with"):
        forward(CONFIG, without, IDS)
