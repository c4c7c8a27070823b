"""``lora-delta evaluate`` on runs and on folders of adapters, against PEFT; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import call, hf_model, peft_model, random_lora
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from lora_delta import save_peft_adapter
from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint
from lora_delta.generate.conditions import Condition
from lora_delta.generate.controls import base_judge, judge_run, read_cases
from lora_delta.generate.judge import HELD_OUT, SEEN
from lora_delta.generate.runs import load_run
from lora_delta.peft.adapters import load_peft_adapter
from qwen_functional import LoraSpec, load_pretrained

LINES = [
    {"condition": f"do {task} {way}", "task": task, "prompt": f"{word}=", "completion": f"{word}{task}"}
    for task in ("x", "y", "z")
    for way in ("now", "here")
    for word in ("cat", "dog")
]
RUN = """
base = "embedded"
dtype = "float32"
device = "cpu"
data = "train.jsonl"
out = "run"
condition_layer = 0
[adapter]
rank = 2
[generator]
kind = "additive"
width = 16
features = 4
[training]
steps = 20
batch_size = 2
warmup_steps = 1
learning_rate = 0.02
[losses]
lm = 1.0
"""


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two of three tasks, and a file with all three."""
    folder = tmp_path_factory.mktemp("evaluate")
    write(folder / "train.jsonl", [line for line in LINES if line["task"] != "z"])
    write(folder / "all.jsonl", LINES)
    (folder / "run.toml").write_text(RUN)
    assert main(["train", "--quiet", str(folder / "run.toml")]) == 0
    return folder


def nats_of(model: Any, adapter: dict[str, Tensor], prompt: Sequence[int], completion: Sequence[int]) -> float:
    """−log p of a completion behind its prompt."""
    with torch.no_grad():
        logits = call(model, adapter, input_ids=torch.tensor([[*prompt, *completion]])).logits
    return float(F.cross_entropy(logits[0, -1 - len(completion) : -1], torch.tensor(completion), reduction="sum"))


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    capsys.readouterr()
    assert main(["evaluate", "--quiet", "--device", "cpu", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_judged_on_what_it_has_seen_and_on_what_it_has_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, "--run", folder / "run", "--data", folder / "all.jsonl", "--out", tmp_path / "out")
    assert {group: ways["generated"]["conditions"] for group, ways in found.items()} == {SEEN: 4, HELD_OUT: 2}
    assert {group: ways["generated"]["tasks"] for group, ways in found.items()} == {SEEN: 2, HELD_OUT: 1}
    ways = ["generated", "another condition's", "of gibberish", "mean of generated", "bare model", "prompted base"]
    assert list(found[SEEN]) == ways
    assert json.loads((tmp_path / "out" / "verdict.json").read_text()) == found
    assert (tmp_path / "out" / "verdict.png").read_bytes().startswith(b"\x89PNG")
    # By hand, in PEFT: the adapters that the generator writes for held-out conditions, on two texts each.
    run = load_run(folder / "run", "cpu")
    tokenizer = AutoTokenizer.from_pretrained(embedded_checkpoint())
    config, weights = load_pretrained(embedded_checkpoint(), dtype=torch.float32)
    model, total, n = peft_model(hf_model(config, weights), run.spec), 0.0, 0
    for condition in ("do z now", "do z here"):
        given = Condition.collate(run.encoder([condition]))
        adapter = {name: one[0] for name, one in run.write(given.states, given.mask).items()}
        for word in ("cat", "dog"):
            completion = [*tokenizer(f"{word}z").input_ids, tokenizer.eos_token_id]
            total += nats_of(model, adapter, tokenizer(f"{word}=").input_ids, completion)
            n += len(completion)
    assert found[HELD_OUT]["generated"]["loss"] == pytest.approx(total / n, rel=1e-4)


@pytest.mark.parametrize("per_pass", [1, 3, 16])
def test_the_mean_of_generated_is_over_all_seen_conditions_however_many_go_at_once(folder: Path, per_pass: int) -> None:
    run = load_run(folder / "run", "cpu", lm_head=True)
    seen = frozenset(line["condition"] for line in LINES if line["task"] != "z")
    given = Condition.collate(run.encoder(sorted(seen)))
    mean = {name: one.mean(0) for name, one in run.write(given.states, given.mask).items()}
    model = peft_model(hf_model(run.config, run.weights), run.spec)
    found = read_cases([folder / "all.jsonl"], run.folder, run.config, encoder=run.encoder, seen=seen, progress=False)
    verdicts = judge_run(run, base_judge(run.config, run.weights, found, per_pass))["mean of generated"]
    for case, verdict in zip(found, verdicts, strict=True):
        nats = sum(nats_of(model, mean, prompt.tolist(), completion.tolist()) for prompt, completion in case.examples)
        assert verdict is not None
        assert verdict.nats == pytest.approx(nats, rel=1e-4)


def test_limits_take_conditions_and_texts_evenly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--run", folder / "run", "--data", folder / "all.jsonl"]
    found = evaluate(capsys, *data, "--conditions", 1, "--texts", 1)
    assert {group: (ways["generated"]["conditions"], ways["generated"]["texts"]) for group, ways in found.items()} == {
        SEEN: (1, 1), HELD_OUT: (1, 1),
    }  # fmt: skip
    assert evaluate(capsys, *data, "--conditions", 0, "--texts", 0) == evaluate(capsys, *data)


def test_adapters_from_elsewhere_have_the_figures_of_the_generator_that_wrote_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(folder / "run", "cpu")
    names = dict.fromkeys(line["condition"] for line in LINES)
    for name in names:
        given = Condition.collate(run.encoder([name]))
        tensors = {key: one[0].contiguous() for key, one in run.write(given.states, given.mask).items()}
        save_peft_adapter(tmp_path / "adapters" / name, run.spec, tensors, base_model="embedded")
    data = ["--data", folder / "all.jsonl"]
    judged = evaluate(capsys, *data, "--adapters", tmp_path / "adapters", "--model", embedded_checkpoint())
    found = evaluate(capsys, "--run", folder / "run", *data)
    assert list(judged) == [HELD_OUT]  # nothing says what they were trained on
    ways = [own["generated"] for own in found.values()]
    nats = sum(one["loss"] * one["conditions"] for one in ways) / 6  # all have the same number of tokens
    assert judged[HELD_OUT]["adapters"]["loss"] == pytest.approx(nats, rel=1e-5)
    assert list(judged[HELD_OUT]) == [
        "adapters", "another condition's", "mean of adapters", "bare model", "prompted base",
    ]  # fmt: skip


def test_teachers_are_controls(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, config = LoraSpec(rank=2), load_pretrained(embedded_checkpoint())[0]
    for seed, name in enumerate(("near", "far")):
        tensors = random_lora(config, spec, seed=seed, dtype=torch.float32)
        save_peft_adapter(tmp_path / name, spec, tensors, base_model="embedded")
    label = ["label", "--model", str(embedded_checkpoint()), "--dtype", "float32", "--device", "cpu", "--quiet"]
    assert main([*label, "--out", str(tmp_path / "labels"), str(tmp_path / "near"), str(tmp_path / "far")]) == 0
    prompts = [{"adapter": "near", "prompts": ["do z now"]}, {"adapter": "far", "prompts": ["QQQQ 9999"]}]
    write(tmp_path / "prompts.jsonl", prompts)
    write(tmp_path / "z.jsonl", [line for line in LINES if line["task"] == "z"])
    teachers = ["--teachers", tmp_path / "labels", "--teacher-prompts", tmp_path / "prompts.jsonl"]
    found = evaluate(capsys, "--run", folder / "run", "--data", tmp_path / "z.jsonl", *teachers)[HELD_OUT]
    named = [{**line, "condition": "near"} for line in LINES if line["task"] == "z"]
    write(tmp_path / "named.jsonl", named)
    shutil.copytree(tmp_path / "near", tmp_path / "only" / "near")
    data = ["--data", tmp_path / "named.jsonl", "--adapters", tmp_path / "only", "--model", embedded_checkpoint()]
    near = evaluate(capsys, *data)[HELD_OUT]["adapters"]
    assert found["nearest teacher"]["loss"] == pytest.approx(near["loss"], rel=1e-5)
    each = [load_peft_adapter(tmp_path / name)[1] for name in ("near", "far")]
    mean = {name: (tensor + each[1][name]) / 2 for name, tensor in each[0].items()}
    save_peft_adapter(tmp_path / "means" / "near", spec, mean, base_model="embedded")
    data[3] = tmp_path / "means"
    expected = evaluate(capsys, *data)[HELD_OUT]["adapters"]
    assert found["mean teacher"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    few = [line for line in LINES if line["condition"] == "do z now"]
    both = write(tmp_path / "both.jsonl", [{**line, "condition": name} for name in ("near", "far") for line in few])
    for name in ("near", "far"):
        shutil.copytree(tmp_path / name, tmp_path / "both" / name)
    own = evaluate(capsys, "--run", folder / "run", "--data", both, *teachers)[HELD_OUT]["its teacher"]
    data = ["--data", both, "--adapters", tmp_path / "both", "--model", embedded_checkpoint()]
    each_own = evaluate(capsys, *data)[HELD_OUT]["adapters"]
    assert own["loss"] == pytest.approx(each_own["loss"], rel=1e-5)
    some = write(tmp_path / "some.jsonl", named + [line for line in LINES if line["task"] == "z"])
    without = evaluate(capsys, "--run", folder / "run", "--data", some, *teachers)[HELD_OUT]
    assert "its teacher" not in without  # not all have one
    assert "nearest teacher" in without


def test_the_nearest_teachers_prompts_have_the_largest_cosine(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(folder / "run", "cpu")
    prompts = {"a": ["do z now", "now"], "b": ["QQQQ 9999"], "c": ["here is more, and longer"], "d": ["sum: 1, 2, 3"]}
    for seed, name in enumerate(prompts):
        tensors = random_lora(run.config, run.spec, seed=seed, dtype=torch.float32)
        save_peft_adapter(tmp_path / name, run.spec, tensors, base_model="embedded")
    label = ["label", "--model", str(embedded_checkpoint()), "--dtype", "float32", "--device", "cpu", "--quiet"]
    assert main([*label, "--out", str(tmp_path / "labels"), *(str(tmp_path / name) for name in prompts)]) == 0
    given = write(tmp_path / "prompts.jsonl", [{"adapter": name, "prompts": own} for name, own in prompts.items()])
    lines = [
        {"condition": condition, "task": "z", "prompt": f"{word}=", "completion": f"{word}z"}
        for condition in ("9999", "do z here", "1, 2, 3, 4", "Qz Qz", "now now now", "longer, please", "more here")
        for word in ("cat", "dog")
    ]
    means = torch.stack([torch.cat(run.encoder(own)).mean(0) for own in prompts.values()])
    nearest = {}
    for condition in dict.fromkeys(line["condition"] for line in lines):
        state = torch.cat(run.encoder([condition])).mean(0)
        best = F.cosine_similarity(state - means.mean(0), means - means.mean(0), dim=-1).argmax()
        nearest[condition] = list(prompts)[int(best)]
        shutil.copytree(tmp_path / nearest[condition], tmp_path / "nearest" / condition)
    assert len(set(nearest.values())) > 2
    data = ["--data", write(tmp_path / "lines.jsonl", lines)]
    teachers = ["--teachers", tmp_path / "labels", "--teacher-prompts", given]
    found = evaluate(capsys, "--run", folder / "run", *data, *teachers)[HELD_OUT]["nearest teacher"]
    each = evaluate(capsys, *data, "--adapters", tmp_path / "nearest", "--model", embedded_checkpoint())
    assert found["loss"] == pytest.approx(each[HELD_OUT]["adapters"]["loss"], rel=1e-5)


def test_conditions_may_be_names_of_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [{**line, "condition": "the name"} for line in LINES if line["condition"] == "do z now"]
    data = write(tmp_path / "named.jsonl", named)
    prompts = write(tmp_path / "prompts.jsonl", [{"adapter": "the name", "prompts": ["do z now"]}])
    found = evaluate(capsys, "--run", folder / "run", "--data", data, "--prompts", prompts)[HELD_OUT]
    plain = write(tmp_path / "plain.jsonl", [line for line in LINES if line["condition"] == "do z now"])
    expected = evaluate(capsys, "--run", folder / "run", "--data", plain)[HELD_OUT]
    for way in ("generated", "prompted base"):  # the context is the prompt, not the name
        assert found[way]["loss"] == pytest.approx(expected[way]["loss"], rel=1e-5)


BAD = [
    ([], "neither --run nor --adapters is given"),
    (["--run", "r", "--adapters", "a"], "--adapters and --run are both given"),
    (["--adapters", "a"], "only one of --adapters and --model is given"),
    (["--run", "r", "--teachers", "t"], "--teachers and --teacher-prompts need each other and --run"),
    (["--run", "r", "--texts", "-1"], "--texts is -1, expected 0 or more"),
    (["--run", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_arguments_that_do_not_fit_are_named(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--data", str(folder / "all.jsonl"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_that_is_not_there_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, config = LoraSpec(rank=2), load_pretrained(embedded_checkpoint())[0]
    save_peft_adapter(tmp_path / "a" / "other", spec, random_lora(config, spec, dtype=torch.float32), base_model="x")
    given = ["--data", folder / "all.jsonl", "--adapters", tmp_path / "a", "--model", embedded_checkpoint()]
    assert main(["evaluate", *map(str, given)]) == 2
    assert "there is no adapter for 'do x now', expected a folder of this name" in capsys.readouterr().err
