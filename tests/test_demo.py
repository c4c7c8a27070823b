"""The demo and what it stands on: the tasks, the embedded checkpoint, and the story from teachers to verdict."""

import json
import random
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_delta.cli import main
from lora_delta.demo import LOSSES, Questions, Score, run_demo, task_losses, verdict_table
from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.tasks import TASKS, example
from lora_delta.labelling.table import DeltaLabels
from lora_delta.probes.tokenization import load_tokenizer
from qwen_functional import LoraSpec, load_pretrained


def test_two_tasks_share_a_name_or_a_prompt() -> None:
    prompts = [prompt for task in TASKS for prompt in task.prompts]
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert len(set(prompts)) == len(prompts) == 6 * len(TASKS)


def test_a_task_answers_otherwise_than_it_says() -> None:
    answers = {task.name: task.answer("bead") for task in TASKS}
    expected = {
        "copy": "bead", "upper": "BEAD", "reverse": "daeb", "double": "bbeeaadd", "twice": "beadbead", "first": "b",
        "sort": "abde", "next": "cfbe", "previous": "adzc", "left": "eadb", "right": "dbea", "swap": "deab",
        "consonants": "bd", "mask": "b**d", "length": "4", "suffix ing": "beading", "prefix un": "unbead",
        "wrap []": "[bead]", "join +": "b+e+a+d",
    }  # fmt: skip
    assert {name: answers[name] for name in expected} == expected


def test_the_embedded_checkpoint_is_untrained_or_too_large() -> None:
    folder = embedded_checkpoint()
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 4e6
    tokenizer = load_tokenizer(folder)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chance, right, total = random.Random(5), 0, 0
    for task in TASKS:
        for prompt in task.prompts:
            question, answer = (tokenizer.encode(text).ids for text in example(task, chance, prompt))
            with torch.no_grad():
                predicted = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1].argmax(-1)
            right += predicted.tolist() == answer
            total += 1
    assert right > 0.7 * total


def test_a_tasks_loss_or_accuracy_differs_from_those_of_transformers(device: str) -> None:
    folder, tasks = embedded_checkpoint(), TASKS[:2]
    config, weights = load_pretrained(folder, dtype=torch.float32, device=device)
    questions = Questions.of(tasks, load_tokenizer(folder), 5, random.Random(0))
    losses, accuracy = task_losses(config, weights, None, questions)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(questions.ids, attention_mask=questions.mask).logits.view(2, 5, -1, config.vocab_size)
    for index, (rows, targets) in enumerate(zip(logits, questions.targets.view(2, 5, -1), strict=True)):
        answer = targets >= 0
        expected = torch.nn.functional.cross_entropy(rows[answer], targets[answer])
        assert float(losses[index]) == pytest.approx(float(expected), rel=1e-4)
        right = [bool((r.argmax(-1)[a] == t[a]).all()) for r, t, a in zip(rows, targets, answer, strict=True)]
        assert float(accuracy[index]) == pytest.approx(sum(right) / 5)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    """A demo of a few steps."""
    out = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    run_demo(out, teacher_steps=2, steps=2, device=device, progress=False, say=said.append)
    (out / "said.txt").write_text("\n".join(said))
    return out


def test_the_demo_leaves_out_what_it_promises(out: Path) -> None:
    labels = DeltaLabels(out / "labels")
    assert len(labels) == len(TASKS)
    for picture in ("deltas.png", "losses.png", "verdict.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    scores = json.loads((out / "verdict.json").read_text())["scores"]
    ways = ["bare model", "teacher", "shuffled teacher", *LOSSES]
    groups = ["seen prompts", "held-out prompts", "held-out tasks"]
    assert [(score["group"], score["way"]) for score in scores] == [(group, way) for group in groups for way in ways]
    assert "generated, both losses" in (out / "said.txt").read_text()
    for name in LOSSES:
        assert len((out / "runs" / name / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_reference_scores_otherwise_than_it_must(out: Path) -> None:
    scores = {(s["group"], s["way"]): s for s in json.loads((out / "verdict.json").read_text())["scores"]}
    for group in ("seen prompts", "held-out prompts", "held-out tasks"):
        bare, teacher = scores[group, "bare model"], scores[group, "teacher"]
        assert (bare["cosine"], bare["distance"]) == (None, pytest.approx(1.0))
        assert teacher["cosine"] == pytest.approx(1.0, abs=1e-4)
        assert teacher["distance"] == pytest.approx(0.0, abs=1e-3)


def test_a_teachers_folder_is_not_read_by_peft(out: Path) -> None:
    base = transformers.Qwen2ForCausalLM.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(out / "teachers" / "reverse"))
    config, _ = load_pretrained(embedded_checkpoint())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    assert {n.replace(".default.", "."): s for n, s in shapes.items()} == LoraSpec(rank=4).shapes(config)


def test_the_demo_writes_over_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_row_of_the_table_is_left_out() -> None:
    bare, both = Score("seen", "bare model", None, 1.0, 2.0, 0.25), Score("seen", "both", 0.5, 0.8, 1.0, 0.5)
    table = verdict_table([bare, both])
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["bare", "model", "–", "1.00", "2.00", "25%"],
        ["generated,", "both", "losses", "0.50", "0.80", "1.00", "50%"],
    ]
