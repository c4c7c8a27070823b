"""Bad input to the delta: an error that names it, before the engine runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICES
from reference import one_by_one, random_lora
from test_delta import CONFIG, SPEC, make_delta
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from qwen_functional import LoraSpec
from qwen_functional.engine import Run

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"  # (3, 24)
Q_B = Q_A.replace("_A", "_B")


@pytest.fixture
def delta() -> DifferentiableDeltaCompute:
    return make_delta()


@pytest.fixture
def no_run(delta: DifferentiableDeltaCompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the engine must not run; ``delta`` is made before."""

    def run(*_: Any) -> None:
        pytest.fail("the engine ran")

    monkeypatch.setattr(Run, "forward", run)


def tensors(n_adapters: int | None = None) -> dict[str, Tensor]:
    return random_lora(CONFIG, SPEC, n_adapters)


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": []}, "is empty, expected at least one token sequence"),
        ({"probes": [[1], []]}, "sequence 1 is empty, expected at least one token"),
        ({"probes": [1, 2]}, "sequence 0 is one number, expected a list of token ids"),
        ({"probes": ["a text"]}, "sequence 0 is a str, expected a list of token ids"),
        ({"probes": None}, "is a NoneType, expected a list of token id lists"),
        ({"probes": [[1, 2.5]]}, "sequence 0 holds 2.5, expected integer token ids"),
        ({"probes": [[1], [61]]}, "token id 61 is outside the vocabulary, expected 0 to 60"),
        ({"probes": [[-1]]}, "token id -1 is outside the vocabulary, expected 0 to 60"),
        ({"probes": [[1], [2] * 65]}, "sequence 1 has 65 tokens, expected at most max_position_emb.* = 64"),
        ({"pooling": "max"}, r"pooling is 'max', expected one of \('mean', 'none'\)"),
        ({"pooling": None}, r"pooling is None, expected one of \('mean', 'none'\)"),
        *(
            ({"adapters_per_pass": n}, f"adapters_per_pass is {n!r}, expected 1 or more, or None")
            for n in (0, -1, 1.5, "2", True)
        ),
        ({"layer": 3}, "layer is 3, expected -1 or 0 to 2"),
        ({"layer": -2}, "layer is -2, expected -1 or 0 to 2"),
        ({"layer": [0, 3]}, "layer is 3, expected -1 or 0 to 2"),
        ({"layer": [0.0]}, "layer is 0.0, expected -1 or 0 to 2"),
        ({"layer": []}, "layer is empty, expected at least one layer"),
        ({"layer": None}, "layer is None, expected"),
        ({"layer": 1.0}, "layer is 1.0, expected"),
        ({"checkpoint": "full"}, r"checkpoint is 'full', expected one of \('none', 'block', 'auto'\)"),
        ({"spec": LoraSpec(layers_to_transform=[3])}, "layers_to_transform names layer 3, expected 0 to 2"),
    ],
)
def test_a_bad_argument_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_delta(**options)


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q_A.replace("q_proj", "qkv_proj"): torch.zeros(3, 24)}, "qkv_proj.* fits nothing; expected names"),
        ({Q_A: torch.zeros(24, 3)}, rf"{Q_A}' has shape \(24, 3\), expected \(3, 24\) or \(G, 3, 24\)"),
        ({Q_A: torch.zeros(2, 3, 24)}, rf"have different G: '{Q_A}' has shape \(2, 3, 24\), .*expected the same G"),
        ({Q_A: torch.zeros(3, 24, dtype=torch.int64)}, f"{Q_A}' has dtype torch.int64, expected a floating-"),
        ({Q_A: torch.full((3, 24), float("nan"))}, f"{Q_A}' is not finite: it holds NaN or infinity"),
        ({Q_A: [[0.0] * 24] * 3}, f"{Q_A}' is a list, expected a torch.Tensor"),
        ({Q_A: torch.zeros(3, 24, device="meta")}, f"{Q_A}' is on meta|is on cpu, expected meta like '{Q_A}'"),
    ],
)
def test_a_bad_tensor_is_refused(delta: DifferentiableDeltaCompute, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta({**tensors(), **change})
    with pytest.raises(ValueError, match=message):
        delta.forward_batch([{**tensors(), **change}])


@pytest.mark.usefixtures("no_run")
def test_an_a_without_its_b_is_refused(delta: DifferentiableDeltaCompute) -> None:
    with pytest.raises(ValueError, match=f"'{Q_A}' is given without '{Q_B}', expected both or neither"):
        delta({Q_A: tensors()[Q_A]})


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize("n_adapters", [None, 3])
def test_tensors_on_another_device_than_the_weights_are_refused(
    delta: DifferentiableDeltaCompute, n_adapters: int | None
) -> None:
    elsewhere = {name: tensor.to("meta") for name, tensor in tensors(n_adapters).items()}
    with pytest.raises(ValueError, match=r"LoRA tensors are on meta, expected cpu like the base model; see its device"):
        delta(elsewhere)


@pytest.mark.skipif("cuda" not in DEVICES, reason="there is no GPU")
@pytest.mark.parametrize("n_adapters", [None, 3])
def test_tensors_on_the_cpu_are_refused_by_a_delta_on_a_gpu(n_adapters: int | None) -> None:
    delta = make_delta(device="cuda")
    for call in (delta, lambda tensors: delta.mean_loss(tensors, lambda deltas, _: deltas.mean())):
        if n_adapters is None and call is not delta:
            continue  # it only takes a batch
        with pytest.raises(ValueError, match=r"LoRA tensors are on cpu, expected cuda:\d like the base model"):
            call(tensors(n_adapters))


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "batch is empty, expected at least one adapter"),
        ([tensors(2)], "adapter 0 of the batch has a leading G, expected one adapter each"),
        ([tensors(), tensors(1)], "adapter 1 of the batch has a leading G, expected one adapter each"),
        (
            [tensors(), {n: t for n, t in tensors().items() if "layers.0.self_attn.q_proj" not in n}],
            f"adapters 0 and 1 of the batch differ in '{Q_A}', expected the same tensors",
        ),
        ([{}, tensors()], "adapters 0 and 1 of the batch differ in 'base_model.*', expected the same tensors"),
        ([tensors(), None], "a NoneType, expected a dict of LoRA tensors"),
        (tensors(), "a str, expected a dict of LoRA tensors"),  # a dict iterates over its names
    ],
)
def test_a_bad_batch_is_refused(delta: DifferentiableDeltaCompute, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta.forward_batch(batch)


@pytest.mark.usefixtures("no_run")
def test_a_list_given_where_a_dict_belongs_is_refused(delta: DifferentiableDeltaCompute) -> None:
    with pytest.raises(ValueError, match="a list, expected a dict of LoRA tensors"):
        delta(one_by_one(tensors(2)))


def test_an_error_does_not_spoil_the_next_call(delta: DifferentiableDeltaCompute) -> None:
    expected = make_delta()(tensors())
    with pytest.raises(ValueError, match="is not finite"):
        delta({**tensors(), Q_A: torch.full((3, 24), float("inf"))})
    assert torch.equal(delta(tensors()), expected)
