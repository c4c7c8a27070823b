"""All contenders have the same weights and compute the same; the floor multiplies as much as it counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import contenders
import floor
import pytest
import torch
import workload
from bench import tiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def test_rounded_workload_holds_the_narrow_numbers(tmp_path: Path) -> None:
    narrow = tiny(tmp_path, dtype=torch.bfloat16)
    wide = dataclasses.replace(narrow, dtype=torch.float32, rounded_to=torch.bfloat16)
    config = narrow.config()
    for name, tensor in wide.lora(config).items():
        assert torch.equal(tensor, narrow.lora(config)[name].float())
    expected = dict(narrow.hf_model(with_lm_head=False).named_parameters())
    for name, parameter in wide.hf_model(with_lm_head=False).named_parameters():
        assert torch.equal(parameter, expected[name].float())


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_the_same_in_every_way(
    tied: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workload.SIZES, "tiny", (*workload.SIZES["tiny"][:-1], tied))
    work = tiny(tmp_path, device=device)
    config, weights = work.engine_weights()
    views = weights.named_views(config)
    for prefix, with_lm_head in (("", True), ("model.", False)):
        model = work.hf_model(with_lm_head)
        parameters = dict(model.named_parameters())
        shared = {name.removeprefix(prefix) for name in views if name.startswith(prefix)}
        assert parameters.keys() == shared
        for name in shared:
            assert torch.equal(parameters[name], views[prefix + name]), name
        assert {tensor.device for tensor in (*parameters.values(), *model.buffers())} == {weights.device}
    for one, other in zip(work.lora(config).values(), work.lora(config).values(), strict=True):
        assert torch.equal(one, other)
        assert one.device == work.cotangent(config).device == weights.device


def assert_same_step(step: Any, expected: Any) -> None:
    ((value, gradients),), ((expected_value, expected_gradients),) = step, expected
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert not gradient.requires_grad
        assert float((gradient - expected_gradients[name]).norm()) <= 1e-4 * float(gradient.norm()), name


def made(way: str, work: workload.Workload) -> Any:
    return contenders.DELTA[way](work)


def test_the_engine_is_called_as_training_calls_it_and_gives_what_hooks_do(device: str, tmp_path: Path) -> None:
    work = tiny(tmp_path, device=device)
    engine, hooks = made("engine", work), made("hooks-batch", work)
    for _ in range(3):  # on a GPU the second makes a CUDA graph, the third takes it
        assert_same_step(engine.step(2), hooks.step(2))
    torch.testing.assert_close(engine.step(1)[0][0], hooks.step(1)[0][0], rtol=1e-5, atol=1e-5)


def test_what_is_compiled_computes_what_the_hooks_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    work = tiny(tmp_path)
    way = made("hooks-batch-compiled", work)
    assert_same_step(way.step(2), made("hooks-batch", work).step(2))
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]
    with pytest.raises(ValueError, match="adapters is 1, expected the 2"):
        way.step(1)


@pytest.mark.parametrize("backwards", [True, False])
def test_the_floor_multiplies_as_much_as_it_counts(
    backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "mm into a buffer"  # the counter does not know oneDNN's products
    monkeypatch.setattr(floor, "LAYOUTS", {plain: floor.LAYOUTS[plain]})
    products = floor.Floor(tiny(tmp_path), backwards)
    products.step(2)  # picks a layout per shape
    with FlopCounterMode(display=False) as counter:
        products.step(2)
    forward = 2 * (2 * 155) * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert counter.get_total_flops() == products.flop == (2 if backwards else 1) * forward


def test_the_adapters_products_multiply_as_much_as_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("the counter does not know oneDNN's products")

    monkeypatch.setattr(floor, "_packed", refused)
    products = floor.AdapterProducts(tiny(tmp_path))
    products.step(2)
    with FlopCounterMode(display=False) as counter:
        products.step(2)
    # It does not know products that are added in place either: two of six, one with A and one with B.
    assert counter.get_total_flops() == products.flop * 2 / 3 > 0
