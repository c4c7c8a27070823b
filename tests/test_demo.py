"""The demo and its foundations: the tasks, the embedded checkpoint, and the course from data to verdict."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from lora_delta.cli import main
from lora_delta.demo import LOSSES, run_demo, task_deltas
from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.build import END, batch, byte_tokenizer, embedded_config
from lora_delta.embedded.tasks import (
    CONTEXT,
    DECORATIONS,
    OPERATIONS,
    SEEN,
    SEEN_WORDINGS,
    TEST,
    VALIDATION,
    Task,
    lines,
    word,
)
from lora_delta.generate.runs import load_run
from lora_delta.probes.tokenization import load_tokenizer
from qwen_functional import init_weights
from qwen_functional.forward import forward


def test_every_task_has_its_own_name_and_its_own_ways_to_be_asked_for() -> None:
    tasks = [*SEEN, *VALIDATION, *TEST]
    assert len({task.name for task in tasks}) == len(tasks) == len(OPERATIONS) * len(DECORATIONS) == 168
    wordings = [wording for part in (*OPERATIONS, *DECORATIONS) for wording in part.wordings]
    assert len(set(wordings)) == len(wordings) == 6 * (len(OPERATIONS) + len(DECORATIONS) - 1)
    conditions = [condition for task in tasks for condition in task.conditions()]
    assert len(set(conditions)) == len(conditions)


def test_tasks_answer_as_they_say() -> None:
    operations = {part.name: part.apply("bead") for part in OPERATIONS}
    assert operations == {
        "copy": "bead", "upper": "BEAD", "title": "Bead", "reverse": "daeb", "double": "bbeeaadd", "behead": "ead",
        "curtail": "bea", "left": "eadb", "right": "dbea", "swap": "deab", "next": "cfbe", "mask": "b**d",
    }  # fmt: skip
    decorations = {part.name: part.apply("bead") for part in DECORATIONS}
    assert decorations == {
        "plain": "bead", "suffix ing": "beading", "suffix ed": "beaded", "suffix ly": "beadly", "suffix !": "bead!",
        "prefix un": "unbead", "prefix re": "rebead", "wrap ()": "(bead)", "wrap <>": "<bead>", "wrap []": "[bead]",
        "wrap {}": "{bead}", "join -": "b-e-a-d", "join .": "b.e.a.d", "twice": "beadbead",
    }  # fmt: skip
    (task,) = (one for one in (*SEEN, *VALIDATION, *TEST) if one.name == "reverse, suffix ing")
    assert task.answer("cat") == "tacing"
    assert task.conditions(slice(1)) == ["reverse then add ing", "reverse, add ing", "add ing after reverse"]


def test_the_parts_of_held_out_tasks_are_seen_in_other_company() -> None:
    assert (len(SEEN), len(VALIDATION), len(TEST)) == (120, 24, 24)
    seen = Counter(part.name for task in SEEN for part in (task.operation, task.decoration))
    for split in (VALIDATION, TEST):
        own = Counter(part.name for task in split for part in (task.operation, task.decoration))
        assert max(own.values()) <= 3
        assert min(seen[name] for name in own) >= 5
        assert not own.keys() & {"copy", "plain"}


def test_lines_are_the_examples_of_every_condition() -> None:
    found = list(lines(SEEN[:20], random.Random(0), per_condition=2))
    of = {condition: task for task in SEEN[:20] for condition in task.conditions(slice(SEEN_WORDINGS))}
    assert Counter(line["condition"] for line in found) == dict.fromkeys(of, 2)
    for line in found:
        task = of[line["condition"]]
        assert line["task"] == task.name
        assert line["completion"] == task.answer(line["prompt"].removesuffix("="))


def test_the_loss_of_the_embedded_checkpoints_training_is_that_of_each_example_alone() -> None:
    tokenizer = byte_tokenizer()
    config, chance = embedded_config(tokenizer), random.Random(3)
    weights = init_weights(config, dtype=torch.float64)
    ids, positions, sees, targets = (one[:2] for one in batch(tokenizer, chance))
    whole = forward(config, weights, ids, sees, positions).logits
    for row in range(2):
        seen = sees[row, 0]
        for at in (targets[row] >= 0).nonzero().flatten().tolist():
            text = ids[row, seen[at].nonzero().flatten()][None]  # the tokens that a prediction sees
            assert torch.equal(positions[row, seen[at]], torch.arange(text.shape[1]))
            alone = forward(config, weights, text).logits[0, -1]
            assert torch.allclose(whole[row, at], alone, rtol=1e-9, atol=1e-12)


def prompted_accuracy(tasks: tuple[Task, ...]) -> float:
    """The accuracy of the embedded checkpoint, in transformers, with the condition in its prompt."""
    folder, chance, right, total = embedded_checkpoint(), random.Random(5), 0, 0
    tokenizer = load_tokenizer(folder)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for task in tasks:
        for condition in task.conditions()[::9]:
            given = word(chance)
            question = tokenizer.encode(CONTEXT.format(condition=condition, prompt=f"{given}=")).ids
            answer = tokenizer.encode(task.answer(given) + END).ids
            with torch.no_grad():
                predicted = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1].argmax(-1)
            right += predicted.tolist() == answer
            total += 1
    return right / total


def test_the_embedded_checkpoint_follows_instructions_also_those_that_it_has_not_seen() -> None:
    assert sum(path.stat().st_size for path in embedded_checkpoint().iterdir() if path.is_file()) < 4e6
    assert prompted_accuracy(SEEN[::4]) > 0.9
    assert prompted_accuracy(VALIDATION) > 0.6


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    """A demo of a few steps."""
    out = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    run_demo(out, steps=3, device=device, progress=False, say=said.append)
    (out / "said.txt").write_text("\n".join(said))
    return out


def test_the_demo_leaves_data_runs_pictures_and_a_verdict(out: Path) -> None:
    for picture in ("deltas.png", "accuracy.png", "verdict.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "verdict.json").read_text())
    assert found["tasks"] == [task.name for task in VALIDATION]
    assert list(found["figures"]) == ["seen conditions", "held-out conditions"]
    controls = ["another condition's", "of gibberish", "mean of generated"]
    expected = {*LOSSES, *(f"{way}, {name}" for way in controls for name in LOSSES), "bare model", "prompted base"}
    for ways in found["figures"].values():
        assert set(ways) == expected
        assert ways["prompted base"]["accuracy"] > 0.5 > ways["bare model"]["accuracy"]
        assert (ways["bare model"]["cosine"], ways["bare model"]["distance"]) == (None, pytest.approx(1.0))
        assert ways["prompted base"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["figures"]["held-out conditions"]["deltas"]["tasks"] == 24
    assert "bare model" in (out / "said.txt").read_text()
    for name in LOSSES:
        metrics = [json.loads(line) for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert len(metrics) == 3
        assert "held_out_accuracy" in metrics[-1]


def test_a_file_of_the_demo_goes_through_evaluate(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(out / "runs" / name) for name in LOSSES]
    data = ["--data", str(out / "train.jsonl"), str(out / "validation.jsonl")]
    arguments = ["evaluate", "--run", *runs, *data, "--conditions", "144", "--texts", "6", "--json", "--quiet"]
    assert main([*arguments, "--device", "cpu"]) == 0
    ours = json.loads(capsys.readouterr().out)
    told = json.loads((out / "verdict.json").read_text())["figures"]
    for group, ways in ours.items():
        assert ways["generated"]["runs"] == 2
        each = [told[group][name]["accuracy"] for name in LOSSES]
        assert ways["generated"]["accuracy"] == pytest.approx(sum(each) / 2)
        assert ways["prompted base"]["loss"] == pytest.approx(told[group]["prompted base"]["loss"], rel=1e-4)


def test_the_deltas_of_the_picture_are_of_each_task(out: Path, device: str) -> None:
    run = load_run(out / "runs" / "deltas", device)
    deltas = task_deltas(run, VALIDATION[:3])
    assert tuple(deltas.shape) == (3, 128)
    assert torch.allclose(deltas[1], task_deltas(run, VALIDATION[1:2])[0], atol=1e-5)


def test_the_demo_does_not_write_over_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


DISTURBED = """
import errno, os, signal, sys
sys.path[:0] = sys.argv[1:2]
from fault_bench import Fault
from pathlib import Path
from lora_delta.cli import main

def happens():
    if sys.argv[3] == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))

Fault(Path(sys.argv[2]), int(sys.argv[4]), happens, stays=sys.argv[3] == "full").arm()
sys.exit(main(["demo", "--steps", "4", "--quiet", "--device", "cpu", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("what", "at", "status", "message"),
    [
        ("full", 0, 2, "No space left on device"),
        ("full", 9, 2, "No space left on device"),
        ("full", 60, 2, "No space left on device"),
        ("SIGINT", 60, 130, ""),
        ("SIGKILL", 60, -9, ""),
    ],
)
def test_a_demo_that_is_disturbed_says_so_in_a_line_and_leaves_runs_that_go_on(
    what: str, at: int, status: int, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", DISTURBED, str(Path(__file__).parent), str(out), what, str(at)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (what != "SIGKILL")
    if at == 60:  # it dies in the first training
        assert main(["train", "--quiet", str(out / "cross-entropy.toml")]) == 0
        assert len((out / "runs" / "cross-entropy" / "metrics.jsonl").read_text().splitlines()) == 4
