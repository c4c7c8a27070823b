"""What users compile with ``torch.compile`` gives the numbers of eager torch, to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import one_by_one, random_lora, relative_error, tiny_config
from test_delta import gradients, leaves, squared
from torch import Tensor, nn

import qwen_functional.forward
from lora_delta import DifferentiableDeltaCompute
from qwen_functional import Lora, LoraSpec, init_weights, pack

CONFIG = tiny_config(num_hidden_layers=2)
SPEC = LoraSpec(rank=2, target_modules=("q_proj", "up_proj", "down_proj"))
WEIGHTS = init_weights(CONFIG)
PROBES = [[5, 6, 7, 8], [5, 6, 9]]
LORA = random_lora(CONFIG, SPEC, 3, dtype=torch.float32)
Tensors = dict[str, Tensor]

@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_delta(**options: Any) -> DifferentiableDeltaCompute:
    return DifferentiableDeltaCompute(CONFIG, WEIGHTS, PROBES, SPEC, **options)


def of_delta(tensors: Tensors) -> tuple[Tensor, Tensors]:
    value = DELTA(tensors)
    return value, gradients(squared(value), tensors)


def of_delta_in_passes(tensors: Tensors) -> tuple[Tensor, Tensors]:
    value = IN_PASSES(tensors)
    squared(value).backward()
    return value, {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def of_batch(tensors: Tensors) -> tuple[Tensor, Tensors]:
    value = DELTA.forward_batch(one_by_one(tensors))
    return value, gradients(squared(value), tensors)


def of_mean_loss(tensors: Tensors) -> tuple[Tensor, Tensors]:
    loss = IN_PASSES.mean_loss(tensors, lambda deltas, _: deltas.square().mean())
    return loss, gradients(3 * loss, tensors)


def of_bound(tensors: Tensors) -> tuple[Tensor, Tensors]:
    return DELTA.deltas(SPEC.bind(CONFIG, tensors)), {}


def of_engine(tensors: Tensors) -> tuple[Tensor, Tensors]:
    tokens, lora = pack(PROBES), SPEC.bind(CONFIG, tensors)
    value, vjp = qwen_functional.forward.forward_vjp(CONFIG, WEIGHTS, tokens, lora, checkpoint="block", layer=(0, -1))
    return value, vjp(value.square())


DELTA, IN_PASSES = make_delta(), make_delta(adapters_per_pass=2, checkpoint="block")
CALLS: list[Callable[[Tensors], tuple[Tensor, Tensors]]] = [
    of_delta, of_delta_in_passes, of_batch, of_mean_loss, of_bound, of_engine,
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "backend"),
    [(of_delta, "eager"), (of_engine, "eager"), *((call, "aot_eager") for call in CALLS)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_compiled_call_has_the_bits_of_an_eager_one(
    call: Callable[[Tensors], tuple[Tensor, Tensors]], backend: str
) -> None:
    expected, expected_gradients = call(leaves(LORA))
    compiled = torch.compile(call, backend=backend)
    for _ in range(2):  # while it is traced, and afterwards
        value, found = compiled(leaves(LORA))
        assert torch.equal(value, expected)
        assert found.keys() == expected_gradients.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected_gradients[name]), name


def test_a_compiled_training_step_has_the_bits_of_an_eager_one() -> None:
    sizes = {name: rows * cols for name, (rows, cols) in DELTA.lora_shapes.items()}
    targets = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))

    def trained(wrap: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, sum(sizes.values())))
        optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)  # compiled, AdamW itself rounds differently

        def step(conditions: Tensor) -> Tensor:
            parts = generator(conditions).split(list(sizes.values()), dim=1)
            tensors = {n: part.view(3, *DELTA.lora_shapes[n]) for n, part in zip(sizes, parts, strict=True)}
            loss = (DELTA(tensors) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = wrap(step)
        return [*(run(torch.eye(3)) for _ in range(3)), *generator.parameters()]

    expected, found = trained(lambda step: step), trained(lambda step: torch.compile(step, backend="aot_eager"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert expected[2] < expected[0]


def test_a_compiled_forward_has_the_numbers_of_an_eager_one() -> None:
    def call(input_ids: Tensor, mask: Tensor, index: Tensor, lora: Lora) -> Tensor:
        out = qwen_functional.forward.forward(CONFIG, WEIGHTS, input_ids, mask, lora=lora, adapter_index=index)
        return torch.cat((out.logits, out.last_hidden_state), -1)

    ids = torch.tensor([[1, 2, 3, 4], [4, 5, 0, 0]])
    rows = ids, (ids > 0).long(), torch.tensor([2, 0])
    tensors = leaves(LORA)
    lora = SPEC.bind(CONFIG, tensors)
    expected, found = call(*rows, lora), torch.compile(call, backend="aot_eager", fullgraph=True)(*rows, lora)
    assert relative_error(found, expected) < 1e-6
    wanted = gradients(squared(expected), tensors)
    for name, gradient in gradients(squared(found), tensors).items():
        assert relative_error(gradient, wanted[name]) < 1e-5, name


def test_a_graph_without_breaks_is_refused_with_the_reason() -> None:
    with pytest.raises(Exception, match=r"DifferentiableDeltaCompute\.forward is written by hand"):
        torch.compile(of_delta, backend="eager", fullgraph=True)(leaves(LORA))


def test_an_eager_process_imports_no_compiler() -> None:
    code = """
import sys, torch
from lora_delta import DifferentiableDeltaCompute
from qwen_functional import Qwen2Config, init_weights
sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
config = Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, **sizes)
delta = DifferentiableDeltaCompute(config, init_weights(config), [[1, 2]])
tensors = {name: torch.ones(shape, requires_grad=True) for name, shape in delta.lora_shapes.items()}
delta(tensors).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
