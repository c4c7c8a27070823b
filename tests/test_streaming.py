"""Weights that are read when they are used: the same numbers, two blocks in memory, each read when it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import rank_jobs as jobs
import torch
from checkpoints import edit_tensors, save_checkpoint
from ranks import Ranks
from reference import random_lora, relative_error

from lora_delta import DifferentiableDeltaCompute
from lora_delta.labelling.settings import model_fingerprint
from qwen_functional import LoraSpec, load_pretrained, read_config
from qwen_functional.dtypes import cpu_multiplies_bfloat16
from qwen_functional.streaming import StreamedBlocks
from qwen_functional.weights import BlockWeights

PROBES = [[1, 2, 3, 4, 5], [1, 2, 6], [7, 8]]
SPEC = LoraSpec(rank=3, alpha=7)
N_BLOCKS = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES = [True, "disk", "host"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "shards", shards=True, num_hidden_layers=N_BLOCKS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", model_type="qwen3")


def case_of(folder: Path, dtype: torch.dtype = torch.float32, n: int = 3, spec: LoraSpec = SPEC) -> jobs.Case:
    config = read_config(folder)
    return jobs.Case(config, spec, random_lora(config, spec, n, dtype=torch.float32), PROBES, dtype, folder)


def assert_equal(found: jobs.Values, expected: jobs.Values) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


class Reads:
    """The layers that are read, in order, and the most blocks in memory at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        self.alive = self.most = 0
        load = StreamedBlocks._load

        def watched(blocks: StreamedBlocks, layer: int) -> BlockWeights:
            self.layers.append(layer)
            block = load(blocks, layer)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(block.down_proj, self._gone)
            return block

        monkeypatch.setattr(StreamedBlocks, "_load", watched)

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("options", [{}, {"checkpoint": "block", "layer": (1, -1)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", PLACES)
def test_streamed_weights_give_the_same_bits(
    stream: bool | str, dtype: torch.dtype, options: dict[str, Any], folder: Path
) -> None:
    case = case_of(folder, dtype)
    _, streamed = load_pretrained(folder, dtype, stream=stream)
    for _ in range(2):
        assert_equal(jobs.engine(case, streamed, **options), jobs.engine(case, case.weights(), **options))
    ids = torch.tensor([[1, 2, 3], [4, 4, 60], [5, 6, 7]])
    assert_equal(jobs.plain_forward(case, streamed, ids), jobs.plain_forward(case, case.weights(), ids))


@pytest.mark.parametrize("stream", PLACES)
def test_a_qwen3_is_streamed(stream: bool | str, qwen3: Path) -> None:
    case = case_of(qwen3)
    streamed = load_pretrained(qwen3, stream=stream)[1]
    assert_equal(jobs.engine(case, streamed, checkpoint="block"), jobs.engine(case, case.weights(), checkpoint="block"))


@pytest.mark.parametrize("stream", PLACES)
def test_a_tied_lm_head_and_another_compute_dtype_are_streamed(stream: bool | str, tied: Path) -> None:
    case, ids = case_of(tied), torch.tensor([[1, 2, 3]] * 3)
    _, streamed = load_pretrained(tied, stream=stream)
    assert_equal(jobs.plain_forward(case, streamed, ids), jobs.plain_forward(case, case.weights(), ids))
    wide, expected = (weights.compute_in(torch.float64) for weights in (streamed, case.weights()))
    assert_equal(jobs.engine(case, wide), jobs.engine(case, expected))
    assert streamed.nbytes() == case.weights().nbytes()
    without = load_pretrained(tied, stream=stream, lm_head=False)[1]
    assert without.lm_head is without.embed_tokens


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_two_blocks_are_in_memory_and_none_is_read_in_vain(
    checkpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, reads = case_of(folder), Reads(monkeypatch)
    _, streamed = load_pretrained(folder, stream=True)
    for _ in range(3):
        jobs.engine(case, streamed, checkpoint=checkpoint)
    assert isinstance(streamed.blocks, StreamedBlocks)
    streamed.blocks.fetch(0)  # waits for the block that is read ahead
    there, back = list(range(N_BLOCKS)), list(range(N_BLOCKS - 2, -1, -1))
    # A pass goes up and down again. The first block ends one pass and begins the next, and is read once for both.
    assert reads.layers == there + back + 2 * (there[1:] + back)
    assert reads.most == 2


def test_labels_read_every_block_once_a_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, reads = case_of(folder), Reads(monkeypatch)
    _, streamed = load_pretrained(folder, stream=True)
    delta = DifferentiableDeltaCompute(case.config, streamed, PROBES, SPEC)
    with torch.no_grad():
        delta(case.tensors)
    assert isinstance(streamed.blocks, StreamedBlocks)
    streamed.blocks.fetch(0)
    n_passes = len(reads.layers) // N_BLOCKS  # the bare model's, the base's and the adapters'
    assert reads.layers == [*range(N_BLOCKS)] * n_passes + [0]
    assert reads.most == 2


def test_only_rows_that_a_token_asks_for_are_read(folder: Path) -> None:
    case = case_of(folder)
    _, streamed = load_pretrained(folder, stream=True)
    rows, read = streamed.embed_tokens, []
    assert not isinstance(rows, torch.Tensor)
    inner = rows._read
    rows._read = lambda part: read.append((part.start, part.stop)) or inner(part)  # type: ignore[func-returns-value]
    jobs.engine(case, streamed)
    assert read == [(token, token + 1) for token in range(1, 9)]


def test_the_delta_of_streamed_weights_is_the_same_and_zero_without_an_adapter(folder: Path) -> None:
    case = case_of(folder)
    _, streamed = load_pretrained(folder, stream=True)
    options = {"adapters_per_pass": 2}
    expected = jobs.delta_of(case, case.weights(), None, False, prepack=False, **options)
    assert_equal(jobs.delta_of(case, streamed, None, False, **options), expected)
    delta = DifferentiableDeltaCompute(case.config, streamed, PROBES, SPEC)
    assert not delta({name: torch.zeros(2, *shape) for name, shape in delta.lora_shapes.items()}).any()


@pytest.mark.parametrize("stream", PLACES)
def test_streamed_weights_have_the_fingerprint_of_the_model(stream: bool | str, folder: Path) -> None:
    for dtype in DTYPES:
        config, streamed = load_pretrained(folder, dtype, stream=stream)
        assert model_fingerprint(config, streamed) == model_fingerprint(config, load_pretrained(folder, dtype)[1])


def test_a_split_model_is_streamed_part_by_part(folder: Path, two_ranks: Ranks) -> None:
    case = case_of(folder)
    value, gradients = jobs.engine(case, case.weights())
    for found, found_gradients in two_ranks.call(jobs.split_streamed_engine, case):
        assert relative_error(found, value) <= 1e-5
        assert max(relative_error(found_gradients[name], gradients[name]) for name in gradients) <= 1e-4


def test_what_is_wrong_with_streamed_weights_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stream is 'ram', expected False, True, 'disk' or 'host'"):
        load_pretrained(folder, stream="ram")
    config, streamed = load_pretrained(folder, stream=True)
    assert not streamed.can_prepack
    with pytest.raises(ValueError, match="weights are streamed, expected weights in memory to pack them"):
        streamed.prepack()
    with pytest.raises(ValueError, match="weights are streamed, expected weights in memory to view them"):
        streamed.named_views(config)
    broken = save_checkpoint(tmp_path / "broken", num_hidden_layers=2)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")

    edit_tensors(broken, spoil)
    case = case_of(broken)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight in .* is not finite"):
        jobs.engine(case, load_pretrained(broken, stream=True)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_is_flat_over_thousands_of_blocks_and_rows(folder: Path) -> None:
    _, streamed = load_pretrained(folder, torch.bfloat16, stream=True)
    ids = torch.tensor([3, 1, 4, 1, 5])

    def resident(passes: int) -> int:
        for _ in range(passes):
            for layer in range(N_BLOCKS):
                streamed.block(layer, (layer + 1) % N_BLOCKS)
            assert isinstance(streamed.embed_tokens[ids], torch.Tensor)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident(100)
    assert resident(500) - before < 2 << 20  # at 5 KB for each of the 29,000 tensors it would be 140 MB


STEP = """
import resource, sys, torch
from lora_delta import DifferentiableDeltaCompute
from qwen_functional import LoraSpec

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(2)
warm = torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # the libraries' own memory
before = status("VmRSS")
spec = LoraSpec(rank=8)
options = {"dtype": getattr(torch, sys.argv[2]), "stream": True, "checkpoint": "block"}
delta = DifferentiableDeltaCompute.from_pretrained(sys.argv[1], spec=spec, **options)
tensors = {n: torch.full((1, *s), 0.01, requires_grad=True) for n, s in delta.lora_shapes.items()}
loss = delta(tensors).square().sum()
loss.backward()
assert all(tensor.grad.isfinite().all() for tensor in tensors.values())
print(delta.weights.nbytes(), status("VmHWM") - before)
"""


@pytest.mark.real_checkpoint
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_streamed_weights_takes_less_than_a_third_of_the_model(real_checkpoint: str, dtype: str) -> None:
    if dtype == "bfloat16" and not cpu_multiplies_bfloat16():
        pytest.skip("blocks are converted to float32 on a processor without bfloat16 products")
    for file in Path(real_checkpoint).glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # drop it from the page cache
        os.close(descriptor)
    done = subprocess.run(
        [sys.executable, "-c", STEP, real_checkpoint, dtype], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    model, peak = map(int, done.stdout.split())
    assert peak < model / 3, f"{peak / 2**20:.0f} MiB of {model / 2**20:.0f}"
