"""A model or adapters split over ranks give the numbers of one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import rank_jobs as jobs
import torch
from checkpoints import save_checkpoint
from ranks import Ranks
from reference import CONFIGS, SPECS, random_lora, relative_error, tiny_config
from torch import Tensor

from lora_delta.labelling.settings import model_fingerprint
from qwen_functional import LoraSpec, Qwen2Config, read_config

PROBES = [[1, 2, 3, 4, 5], [1, 2, 6], [7, 8]]
TOLERANCE = 1e-11


EXAMPLES = [
    [([3, 1, 4], [1, 5, 9]), ([3, 1, 4], [2, 6])],
    [([1], [2, 3, 4, 5, 6, 7, 8])],
    [([5, 5, 5], [5, 5]), ([5, 5, 5, 5], [1]), ([2], [2])],
]


def case_of(config: Qwen2Config, spec: LoraSpec | None = None, n: int | None = 3, **fields: Any) -> jobs.Case:
    spec = LoraSpec(rank=3, alpha=7) if spec is None else spec
    return jobs.Case(config, spec, random_lora(config, spec, n), PROBES, **fields)


def assert_same(found: list[jobs.Values], expected: jobs.Values, tolerance: float = TOLERANCE) -> None:
    """The first rank is within the tolerance, and all ranks have the same bits."""
    (value, gradients), (wanted, wanted_gradients) = found[0], expected
    assert relative_error(value, wanted) <= tolerance
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        assert gradients[name].dtype == gradient.dtype
        assert relative_error(gradients[name], gradient) <= tolerance, name
    for other, other_gradients in found[1:]:
        assert torch.equal(other, value)
        assert all(torch.equal(other_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize(
    "name", ["grouped heads", "7 heads for each of 2", "head_dim given", "tied", "windows", "yarn", "qwen3"]
)
def test_a_model_split_over_two_ranks_gives_the_same_numbers(name: str, two_ranks: Ranks) -> None:
    case = case_of(tiny_config(**CONFIGS[name]))
    assert_same(two_ranks.call(jobs.split_engine, case, {}), jobs.engine(case, case.weights()))


@pytest.mark.parametrize("spec", SPECS)
def test_adapters_of_a_split_model_are_split_as_it_is(spec: str, two_ranks: Ranks) -> None:
    case = case_of(tiny_config(), SPECS[spec], n=2 if spec != "some" else None)
    options = {"checkpoint": "block", "layer": (1, -1)}
    assert_same(two_ranks.call(jobs.split_engine, case, options), jobs.engine(case, case.weights(), **options))


def test_gradients_of_a_few_tensors_of_a_split_model_are_the_same(two_ranks: Ranks) -> None:
    case = case_of(tiny_config())
    names = list(case.tensors)
    wanted = [names[1], names[20], names[29]]
    assert_same(
        two_ranks.call(jobs.split_engine, case, {"wrt": wanted}), jobs.engine(case, case.weights(), wrt=wanted)
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_split_model_that_is_packed_gives_the_same_numbers(two_ranks: Ranks) -> None:
    case = case_of(tiny_config(), dtype=torch.float32)
    assert_same(two_ranks.call(jobs.split_packed_engine, case), jobs.engine(case, case.weights()), 1e-4)


@pytest.mark.parametrize("spec", ["all projections", "some"])
def test_forward_of_a_split_model_gives_the_same_numbers(spec: str, two_ranks: Ranks) -> None:
    case = case_of(tiny_config(), SPECS[spec])
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [5, 6, 7, 8]])
    assert_same(two_ranks.call(jobs.split_forward, case, ids), jobs.plain_forward(case, case.weights(), ids))


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_a_block_takes_two_sums_each_way_and_one_more_where_it_is_computed_again(
    checkpoint: str, two_ranks: Ranks
) -> None:
    config = tiny_config()
    n = config.num_hidden_layers
    forwards, backwards = two_ranks.call(jobs.sums_of, case_of(config), checkpoint)[0]
    assert forwards == 2 * n
    # The first block's q, k and v have no dx. One more sum is for the gradients of all tensors together, and one for
    # the MLP's input in each recomputed block.
    assert backwards == 2 * n - 1 + 1 + (n if checkpoint == "block" else 0)


def test_a_rank_holds_no_more_than_its_part(two_ranks: Ranks, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", num_hidden_layers=3)
    config = read_config(folder)
    case = case_of(config, dtype=torch.float32, folder=folder)
    whole = case.weights()
    matrices = sum(
        getattr(block, name).nbytes
        for block in whole.blocks
        for name in ("qkv_proj", "qkv_bias", "o_proj", "gate_up_proj", "down_proj")
    )
    assert two_ranks.call(jobs.held_bytes, case) == [whole.nbytes() - matrices // 2] * 2
    assert_same(two_ranks.call(jobs.split_engine, case, {}), jobs.engine(case, whole), 1e-4)


def test_the_fingerprint_of_a_split_model_is_that_of_the_whole_one(two_ranks: Ranks) -> None:
    case = case_of(tiny_config(), dtype=torch.float32)
    assert two_ranks.call(jobs.fingerprint, case) == [model_fingerprint(case.config, case.weights())] * 2


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}], ids=str)
def test_labels_of_a_delta_that_is_split_over_ranks_are_refused(
    sizes: dict[str, int], two_ranks: Ranks, tmp_path: Path
) -> None:
    case = case_of(tiny_config(), dtype=torch.float32)
    for message in two_ranks.call(jobs.labels_of_a_split_delta, case, sizes, tmp_path / "labels"):
        assert message.startswith("delta is split over a mesh, expected one that every process computes by itself")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(("changes", "sizes"), [
    ({"num_attention_heads": 6, "num_key_value_heads": 3}, r"\[1, 3\]"),
    ({"intermediate_size": 41}, r"\[1\]"),
])  # fmt: skip
def test_a_model_that_cannot_be_split_is_refused(changes: dict[str, int], sizes: str, two_ranks: Ranks) -> None:
    fields = {"intermediate_size": 42} | changes
    for message in two_ranks.call(jobs.refusal, tiny_config(**fields)):
        assert re.match(f"mesh has 2 ranks for tensor parallelism, expected one of {sizes}, which divide", message)


@pytest.mark.parametrize("mean_loss", [False, True])
@pytest.mark.parametrize("per_pass", [None, 1])
@pytest.mark.parametrize(("sizes", "n"), [
    ({"dp": 2}, 3), ({"dp": 2}, 1), ({"tp": 2}, 2), ({"dp": 1, "tp": 2}, 2), ({"dp": 2, "tp": 1}, 4),
])  # fmt: skip
def test_the_delta_is_the_same_on_a_mesh(
    sizes: dict[str, int], n: int, per_pass: int | None, mean_loss: bool, two_ranks: Ranks
) -> None:
    case = case_of(tiny_config(), n=n)
    options = {"adapters_per_pass": per_pass}
    found = two_ranks.call(jobs.split_delta, case, sizes, mean_loss, options)
    assert_same(found, jobs.delta_of(case, case.weights(), None, mean_loss, **options))


def test_the_delta_is_the_same_on_a_mesh_of_two_dimensions() -> None:
    case, ranks = case_of(tiny_config(), n=3), Ranks(4)
    try:
        for mean_loss in (False, True):
            found = ranks.call(jobs.split_delta, case, {"dp": 2, "tp": 2}, mean_loss, {})
            assert_same(found, jobs.delta_of(case, case.weights(), None, mean_loss))
    finally:
        ranks.stop()


def test_one_adapter_without_a_batch_is_the_same_on_a_mesh(two_ranks: Ranks) -> None:
    case = case_of(tiny_config(), n=None)
    found = two_ranks.call(jobs.split_delta, case, {"dp": 2}, False, {})
    assert_same(found, jobs.delta_of(case, case.weights(), None, False))


def test_a_lora_of_zeros_has_a_delta_of_zero_on_a_mesh(two_ranks: Ranks) -> None:
    case = case_of(tiny_config(), n=3, dtype=torch.float32)
    zero = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in case.tensors.items()}
    case = jobs.Case(case.config, case.spec, zero, PROBES, torch.float32)
    for sizes in ({"dp": 2}, {"tp": 2}):
        for value, _ in two_ranks.call(jobs.split_delta, case, sizes, False, {}):
            assert not value.any()


@pytest.mark.real_checkpoint
def test_a_real_model_split_over_two_ranks_gives_the_same_numbers(real_checkpoint: str, two_ranks: Ranks) -> None:
    folder = Path(real_checkpoint)
    config = read_config(folder)
    spec = LoraSpec()
    tensors: dict[str, Tensor] = random_lora(config, spec, 2, dtype=torch.float32, size=0.05)
    probes = [[785, 3974, 13876, 38835, 34208], [785, 3974, 264], [16, 17, 18]]
    case = jobs.Case(config, spec, tensors, probes, torch.float32, folder)
    value, gradients = jobs.engine(case, case.weights())
    (found, found_gradients), _ = two_ranks.call(jobs.split_engine, case, {})
    assert relative_error(found, value) <= 1e-5
    for name, gradient in gradients.items():
        assert relative_error(found_gradients[name], gradient) <= 1e-4, name


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("mean_loss", "options"),
    [
        (False, {}),
        (True, {"label_smoothing": 0.2}),
        (False, {"teacher": "states"}),
        (True, {"teacher": "top k"}),
    ],
    ids=str,
)
def test_the_lm_loss_of_split_adapters_or_of_a_split_model_is_that_of_one_process(
    sizes: dict[str, int], mean_loss: bool, options: dict[str, Any], tied: bool, two_ranks: Ranks
) -> None:
    case = case_of(tiny_config(tie_word_embeddings=tied, vocab_size=61))  # 61 is odd: an uneven split
    found = two_ranks.call(jobs.split_lm_loss, case, sizes, mean_loss, EXAMPLES, {"checkpoint": "block", **options})
    assert_same(found, jobs.lm_loss_of(case, case.weights(), None, mean_loss, EXAMPLES, **options))
