"""The benchmark of labels compares what it says it compares, and times nothing that disagrees. No speed is asserted."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contenders
import pytest
import throughput
import torch
from bench import Finished, finished_run, tiny
from checkpoints import CHATML, make_checkpoint, save_checkpoint
from contenders import LABELS, Labels, PeftLabels
from reference import hf_model, hidden_states_at_end, one_by_one, peft_model, relative_error
from throughput import run_of
from torch import Tensor
from transformers import AutoTokenizer
from workload import Workload

from lora_delta.probes.texts import create_mixed_probes
from qwen_functional.dtypes import cpu_multiplies_bfloat16

OPTIONS = ["--loss", "labels", "--adapters", "3", "--per-pass", "2", "--rank", "4", "--rounds", "1", "--threads", "1"]
TINY = [*OPTIONS, "--size", "tiny"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run on the tiny size, in processes, and the file that it wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "scratch").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "scratch"))
        return finished_run("throughput.py", folder, *TINY)


def labelled(folder: Path, dtype: torch.dtype = torch.float32) -> Workload:
    """Three adapters, two per pass, so that the last pass is not full."""
    work = tiny(folder, adapters=3, dtype=dtype, adapters_per_pass=2)
    return dataclasses.replace(work, adapter_folders=throughput.save_adapters(work, folder / "adapters"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return labelled(tmp_path_factory.mktemp("model"))


def deltas(contender: Any, n: int) -> Tensor:
    ((value, gradients),) = contender.step(n)
    assert not gradients
    return value


def test_the_ways_agree_and_the_record_is_complete(finished: Finished) -> None:
    result, path = finished
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    (run,) = record["runs"]
    assert (record["loss"], record["rank"], record["machine"]["threads"]) == ("labels", 4, 1)
    told = {"kind": "generic probes", "count": 5, "tokens": 158, "tree_tokens": 155, "longest": 33}
    assert run["texts"] == told
    assert list(run["ways"]) == list(LABELS)
    assert 0 < run["ways"]["peft"]["agreement"]["value"] <= 1e-4, "no error at all: it was compared with itself"
    for name, entry in run["ways"].items():
        assert entry["adapters_per_second"] == pytest.approx(3 / entry["seconds"]["median"]), name
        assert entry["peak_bytes"] >= entry["weights_bytes"] > 0
    assert run["adapter_products"] is None
    # Forwards alone, of all adapters.
    assert run["floor"]["flop"] == 2 * 3 * 155 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)


def test_the_printed_table_is_made_of_the_json_alone(finished: Finished) -> None:
    result, path = finished
    (run,) = json.loads(path.read_text())["runs"]
    assert result.stdout.split("\n", 2)[2] == throughput.table(run) + "\n"


def test_a_finished_run_leaves_no_file_but_its_json(finished: Finished) -> None:
    folder = finished[1].parent
    assert sorted(each.name for each in folder.iterdir()) == ["result.json", "scratch"]
    assert not list((folder / "scratch").iterdir())


@pytest.mark.parametrize("way", ["compute_labels", "peft"])
def test_deltas_equal_those_of_each_probe_alone_in_float64(way: str, work: Workload) -> None:
    config, weights = work.engine_weights()
    model = peft_model(hf_model(config, weights, torch.float64), work.spec)

    def pooled(tensors: dict[str, Tensor]) -> Tensor:
        return torch.stack([hidden_states_at_end(model, tensors, probe)[0] for probe in work.probes]).mean(0)

    lora = {name: tensor.double() for name, tensor in work.lora(config).items()}
    base = pooled({name: torch.zeros_like(tensor[0]) for name, tensor in lora.items()})
    expected = torch.stack([pooled(tensors) - base for tensors in one_by_one(lora)])
    contender = LABELS[way](work)
    for n in (3, 3, 2):  # another round is like the first
        for got, delta in zip(deltas(contender, n), expected[:n], strict=True):
            assert relative_error(got, delta) < 1e-5


def test_pefts_model_keeps_one_adapter_alone(work: Workload) -> None:
    peft = PeftLabels(work)
    peft.step(3)
    assert list(peft.model.peft_config) == ["first"]


def test_one_pass_has_as_many_adapters_as_a_pass_of_the_job(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    contender: Any = LABELS["one-pass"](work)
    seen = []
    monkeypatch.setattr(contender.delta, "deltas", lambda lora: seen.append(lora.n_adapters))
    assert contender.step(3) is None
    assert seen == [2]


def test_an_adapter_that_fails_is_an_error(tmp_path: Path) -> None:
    work = labelled(tmp_path)
    (Path(work.adapter_folders[1]) / "adapter_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"1 of 3 adapters failed: .*adapter-0001"):
        Labels(work).step(3)


@pytest.mark.parametrize(
    ("spoil", "off"),
    [
        (lambda deltas: deltas * 1.001, r"1\.0e-03"),
        (lambda deltas: deltas.flip(0), r"\d\.\de[+-]0[01]"),
        (lambda deltas: deltas * torch.tensor([[1.0], [1.0], [0.0]]), r"\d\.\de-01"),
        (lambda deltas: deltas * torch.nan, "inf"),
    ],
    ids=["a thousandth", "another order", "one is zero", "NaN"],
)
def test_deltas_that_are_off_make_the_run_fail_and_leave_no_table(
    spoil: Callable[[Tensor], Tensor],
    off: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Spoiled(Labels):
        def step(self, adapters: int) -> Any:
            return [(spoil(deltas(super(), adapters)), {})]

    monkeypatch.setitem(contenders.LABELS, "compute_labels", Spoiled)
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert throughput.main([*TINY, "--ways", "peft", "compute_labels", "--one-process", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    message = rf"^error: compute_labels: the value is off by {off}, expected at most 1\.0e-04$"
    assert re.search(message, printed.err, re.MULTILINE)
    assert "|" not in printed.out
    assert not list(tmp_path.iterdir())


def test_bfloat16_deltas_are_about_as_near_to_float32_as_pefts(tmp_path: Path) -> None:
    work = labelled(tmp_path, torch.bfloat16)
    options = throughput.arguments([*OPTIONS, "--dtype", "bfloat16", "--device", "cpu", "--one-process"])
    run = run_of(work, options).measure()
    assert run.reference == "peft in float32"
    errors = {name: own.agreement.value for name, own in run.results.items() if own.agreement}
    assert list(errors) == ["peft in bfloat16", "compute_labels", "peft"]
    least = 1e-4 if cpu_multiplies_bfloat16() else 1e-8  # this library then multiplies in float32, PEFT does not
    assert least < errors["compute_labels"] <= 1.5 * errors["peft"] < 0.2


def test_a_checkpoints_deltas_agree_and_its_probes_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tmp_path / "some model", vocab_size=300, max_position_embeddings=512)
    make_checkpoint(folder, chat_template=CHATML)
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    path = tmp_path / "result.json"
    options = [*OPTIONS, "--model", str(folder), "--probes", "chat", "--json", str(path), "--one-process"]
    assert throughput.main([*options, "--device", "cpu"]) == 0, capsys.readouterr().err
    record = json.loads(path.read_text())
    chats = [[{"role": "user", "content": text}] for text in create_mixed_probes()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    assert record["model"] == "some model"
    (run,) = record["runs"]
    assert (run["texts"]["count"], run["texts"]["tokens"]) == (15, sum(map(len, expected)))
