"""Prepacked weights: they give the numbers of the weights themselves; and when weights are packed."""

import os
import subprocess
import sys

import pytest
import torch
from reference import random_lora, relative_error, tiny_config
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from qwen_functional import LoraSpec, Qwen2Weights, init_weights, pack
from qwen_functional.backends import onednn
from qwen_functional.backends.onednn import can_pack
from qwen_functional.forward import forward_vjp

SEQUENCES = [[1, 2, 3, 4, 5], [1, 2, 6], [7, 8]]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 0.05}
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def packing_pays_wherever_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack on every processor that can, even if it is faster without."""
    monkeypatch.setattr("qwen_functional.weights.packing_pays", can_pack)


def value_and_gradients(weights: Qwen2Weights, layer: int, checkpoint: str) -> tuple[Tensor, dict[str, Tensor]]:
    config, spec = tiny_config(), LoraSpec(rank=3)
    lora = spec.bind(config, {name: tensor.float() for name, tensor in random_lora(config, spec, 3).items()})
    value, vjp = forward_vjp(config, weights, pack(SEQUENCES), lora, layer=layer, checkpoint=checkpoint)
    return value, vjp(torch.ones_like(value))


@needs_onednn
@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("checkpoint", ["none", "block"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packing_changes_neither_a_value_nor_a_gradient(dtype: torch.dtype, checkpoint: str, layer: int) -> None:
    weights = init_weights(tiny_config(), dtype=dtype)
    if not weights.can_prepack:
        pytest.skip(f"{dtype} is multiplied as it is on this processor")
    expected, expected_gradients = value_and_gradients(weights, layer, checkpoint)
    value, gradients = value_and_gradients(weights.prepack(), layer, checkpoint)
    assert relative_error(value, expected) < TOLERANCE[dtype]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < TOLERANCE[dtype], name


def test_weights_that_onednn_cannot_multiply_are_not_packed() -> None:
    weights = init_weights(tiny_config(), dtype=torch.float64)
    assert not weights.can_prepack
    with pytest.raises(ValueError, match="weights are float64 on cpu, expected weights on a CPU that mult"):
        weights.prepack()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_packed_copies_take_the_size_that_is_said(dtype: torch.dtype) -> None:
    weights = init_weights(tiny_config(), dtype=dtype)
    packed = weights.prepack().packed
    assert packed is not None
    matrices = [matrix for block in packed for stack in block.values() for matrix in stack]
    held = [t for m in matrices for t in ([m] if isinstance(m, Tensor) else vars(m).values()) if isinstance(t, Tensor)]
    assert weights.prepack_nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in held)


@needs_onednn
@pytest.mark.parametrize(("prepack", "free", "packed"), [
    (True, 0, True), (False, 1 << 40, False), ("auto", 1 << 40, True), ("auto", 1000, False),
])  # fmt: skip
def test_a_delta_packs_as_its_argument_says(
    prepack: bool | str, free: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_delta.passes.free_bytes", lambda device: free)
    config = tiny_config()
    delta = DifferentiableDeltaCompute(config, init_weights(config), SEQUENCES, prepack=prepack)
    assert (delta.weights.packed is not None) is packed


def test_an_unknown_prepack_is_refused() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="prepack is 'always', expected True, False or 'auto'"):
        DifferentiableDeltaCompute(config, init_weights(config), SEQUENCES, prepack="always")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_kept_memory_does_not_go_back_to_the_system() -> None:
    program = """
import torch
from pathlib import Path
from qwen_functional.memory import keep_freed_memory
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
print(keep_freed_memory())
before = resident()
tensors = [torch.ones(6 << 20) for _ in range(12)]  # 24 MiB each, below the largest threshold that glibc takes
during = resident()
del tensors
print(during - before > 200 << 20, resident() - before > 200 << 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ}
    )
    took, grew, kept = done.stdout.split()
    if took == "False":
        pytest.skip("the C library is not glibc")
    assert (grew, kept) == ("True", "True")


def test_memory_that_this_process_has_freed_is_free() -> None:
    # In a separate process, as above.
    program = """
import torch
from qwen_functional.memory import free_bytes, keep_freed_memory
took = keep_freed_memory()
cpu = torch.device("cpu")
tensors = [torch.ones(6 << 20) for _ in range(40)]  # 960 MiB
during = free_bytes(cpu)
del tensors
print(took, free_bytes(cpu) - during > 800 << 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ}
    )
    took, free_again = done.stdout.split()
    if took == "False":
        pytest.skip("the C library is not glibc")
    assert free_again == "True"


@needs_onednn
@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_product_that_is_written_somewhere_is_given_back(one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_one_by_one", lambda left, right: one_by_one)
    left, right, out = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.empty(2, 3, 5)
    assert onednn.product(left, right, out=out) is out
    assert relative_error(out, left @ right) <= 1e-6


@needs_onednn
def test_auto_packs_where_it_takes_a_quarter_of_the_free_memory_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights = init_weights(config)
    for free, packed in ((4 * weights.prepack_nbytes(), True), (4 * weights.prepack_nbytes() - 4, False)):
        monkeypatch.setattr("lora_delta.passes.free_bytes", lambda device, free=free: free)
        assert (DifferentiableDeltaCompute(config, weights, SEQUENCES).weights.packed is not None) == packed
