"""Delta targets of texts, as ``lora-delta teach --deltas`` writes them, against transformers and PEFT, and training
that reads them."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from labelled import write_labelled_teachers
from reference import relative_error
from torch import Tensor

from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.build import END
from lora_delta.generate.checkpoints import METRICS
from lora_delta.probes.tokenization import load_tokenizer
from lora_delta.stored_deltas import StoredDeltas, deltas_written
from qwen_functional import LoraSpec
from qwen_functional.safetensors_format import SafetensorsFile

SPEC = LoraSpec(rank=2, alpha=4)
CONTEXT = "{condition}: {prompt}"
RUN = """
base = "embedded"
dtype = "float32"
device = "DEVICE"
data = "texts.jsonl"
out = "NAME"
TEACHERS
[generator]
kind = "additive"
features = 4
width = 8
[training]
steps = 4
batch_size = 2
texts_per_condition = 2
[losses]
lm = 0.5
delta = {weight = 1.0, texts = "own", DELTA}
[teacher]
context = "{condition}: {prompt}"
STORED
"""
KINDS = {
    "context": 'target = "context"',
    "context, last": 'target = "context", positions = "last", layers = [0, -1]',
    "context, all": 'target = "context", positions = "all"',
    "teacher": 'target = "teacher", layers = [1, 2]',
    "teacher, all": 'target = "teacher", positions = "all"',
}
WORDS = ("cat", "horse", "ox", "donkey", "goose", "hen", "pig")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    """Three teachers with labels and prompts, and texts that cycle through them."""
    folder = tmp_path_factory.mktemp("deltas")
    write_labelled_teachers(folder, SPEC, device)
    texts = [
        {"condition": f"teachers/t{i % 3}", "prompt": f"{word}=" if i != 4 else "", "completion": word[::-1] * 2}
        for i, word in enumerate(WORDS)
    ]
    for line in texts:
        if not line["prompt"]:
            line["text"] = line.pop("completion")
            del line["prompt"]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    return folder


def written(folder: Path, name: str, kind: str, device: str, stored: str = "") -> Path:
    """Write the file of a run."""
    teachers = 'labels = "deltas"\nprompts = "prompts.jsonl"' if "teacher" in kind else 'prompts = "prompts.jsonl"'
    text = RUN.replace("NAME", name).replace("TEACHERS", teachers).replace("DEVICE", device)
    text = text.replace("DELTA", KINDS[kind]).replace("STORED", stored)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def taught(folder: Path, kind: str, device: str) -> Path:
    path = folder / f"{kind}.safetensors"
    if not path.exists():
        config = written(folder, f"teach {kind}", kind, device)
        assert main(["teach", "--quiet", "--deltas", "--out", str(path), str(config)]) == 0
    return path


def hidden_states(model: Any, ids: Sequence[int], layers: Sequence[int]) -> Tensor:
    """(layers, T, H) by transformers; the last one is after the final norm."""
    with torch.no_grad():
        states = model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return torch.stack([states[-1 if layer == -1 else layer + 1][0] for layer in layers])


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_states_that_transformers_gives(folder: Path, device: str, kind: str) -> None:
    stored = StoredDeltas(taught(folder, kind, device))
    assert len(stored) == len(WORDS)
    tokenizer = load_tokenizer(embedded_checkpoint())
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    teachers = [
        peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(embedded_checkpoint(), dtype=torch.float32),
            str(folder / "teachers" / f"t{i}"),
        ).base_model.model
        for i in range(3)
    ]  # fmt: skip
    positions, layers = stored.facts["positions"], stored.facts["layers"]
    end = tokenizer.token_to_id(END) or 0
    for number, line in enumerate((folder / "texts.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        who = int(entry["condition"][-1])
        prompt = tokenizer.encode(entry["prompt"]).ids if "prompt" in entry else []
        completion = tokenizer.encode(entry.get("completion", entry.get("text"))).ids
        completion += [end]
        context = tokenizer.encode(CONTEXT.format(condition=f"task {who}", prompt=entry.get("prompt", ""))).ids
        whole = prompt + completion
        n = {"completion": len(completion) - (not prompt), "last": 1, "all": len(whole)}[positions]
        before = 1 if positions == "completion" else 0  # the last prompt token predicts the first of the completion
        base = hidden_states(model, whole, layers)[:, len(whole) - before - n : len(whole) - before]
        wanted_by, read = (teachers[who], whole) if "teacher" in kind else (model, context + completion)
        wanted = hidden_states(wanted_by, read, layers)[:, len(read) - before - n : len(read) - before]
        found = stored[number]
        assert int(stored.lengths[number]) == n
        assert relative_error(found[0], base) <= 1e-5
        assert relative_error(found[1], wanted) <= 1e-5


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def live(folder: Path, kind: str, device: str) -> list[dict[str, Any]]:
    """The history of a run that computes its targets."""
    run = folder / f"live {kind}"
    if not run.exists():
        assert main(["train", "--quiet", str(written(folder, run.name, kind, device))]) == 0
    return history(run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_stored_targets_is_that_of_one_which_computes_them(folder: Path, device: str, kind: str) -> None:
    stored = f'stored_deltas = "{taught(folder, kind, device).name}"'
    assert main(["train", "--quiet", str(written(folder, f"stored {kind}", kind, device, stored))]) == 0
    for ours, theirs in zip(history(folder / f"stored {kind}"), live(folder, kind, device), strict=True):
        for term in ("lm", "delta", "gradient_norm"):
            assert ours[term] == pytest.approx(theirs[term], rel=1e-3), term


def test_a_run_on_stored_targets_reads_no_teachers(folder: Path, device: str, tmp_path: Path) -> None:
    path = taught(folder, "teacher", device)
    for name in ("texts.jsonl", "prompts.jsonl", path.name):
        shutil.copy(folder / name, tmp_path / name)
    config = written(tmp_path, "run", "teacher", device, f'stored_deltas = "{path.name}"')
    config.write_text(config.read_text().replace('labels = "deltas"', "[adapter]\nrank = 2\nalpha = 4").replace(
        '[adapter]\nrank = 2\nalpha = 4\nprompts = "prompts.jsonl"',
        'prompts = "prompts.jsonl"\n[adapter]\nrank = 2\nalpha = 4',
    ))  # fmt: skip
    assert main(["train", "--quiet", str(config)]) == 0
    computed = live(folder, "teacher", device)[0]
    assert history(tmp_path / "run")[0]["delta"] == pytest.approx(computed["delta"], rel=1e-3)  # the same first batch


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("context", 'target = "context"', 'target = "context", positions = "last"', "has positions 'completion', exp"),
        ("context", 'target = "context"', 'target = "context", layers = [1]', r"has layers \[-1\], expected \[1\]"),
        ("context, last", "layers = [0, -1]", "layers = [-1, 0]", r"has layers \[0, -1\], expected \[-1, 0\] as here"),
        ("context", "{condition}: {prompt}", "{condition} {prompt}", "has context '{condition}: {prompt}', expected"),
        ("teacher", 'target = "teacher"', 'target = "context"', "has target 'teacher', expected 'context' as here"),
        ("context", '"float32"', '"bfloat16"', "has model_sha256 '.*', expected '.*' as here: lora-delta teach"),
        ("context", "texts.jsonl", "more.jsonl", "has texts_sha256 '.*', expected '.*' as here"),
        ("context", "context.safetensors", "texts.jsonl", "texts.jsonl is not a file of targets of deltas"),
        ("context", "context.safetensors", "none", "none is not a file, expected one of targets of deltas"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(
    folder: Path, device: str, kind: str, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = taught(folder, kind, device)
    (folder / "more.jsonl").write_text((folder / "texts.jsonl").read_text() + "\n")
    config = written(folder, "odd", kind, device, f'stored_deltas = "{path.name}"')
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    assert main(["train", "--quiet", str(config)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_deltas_of_a_run_without_them_are_refused(
    folder: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(folder, "none", "context", device)
    text = config.read_text()
    config.write_text("\n".join(line for line in text.splitlines() if not line.startswith("delta")))
    assert main(["teach", "--quiet", "--deltas", "--out", str(folder / "no"), str(config)]) == 2
    assert "has no loss 'delta' with texts = 'own'" in capsys.readouterr().err
    assert not (folder / "no").exists()
    config = written(folder, "none", "teacher", device, 'stored_deltas = "deltas"')
    config.write_text(config.read_text().replace('labels = "deltas"\n', ""))
    assert main(["teach", "--quiet", "--deltas", "--out", str(folder / "no"), str(config)]) == 2
    assert "has no labels, from which the teachers' targets are read" in capsys.readouterr().err


# The file


def states(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 3, size, 4, generator=chance, dtype=torch.float64).to(dtype) for size in sizes]
    return [(base, wanted) for base, wanted in pairs]


def saved(path: Path, *sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    texts = states(*sizes, dtype=dtype)
    with deltas_written(path, {"layers": [0]}) as writer:
        for base, wanted in texts:
            writer.write(base, wanted)
    return texts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    texts = saved(tmp_path / "file", 3, 1, 5, dtype=dtype)
    stored = StoredDeltas(tmp_path / "file")
    assert stored.lengths.tolist() == [3, 1, 5]
    assert stored.facts == {"layers": [0]}
    for index in (2, 0, 1):
        for one, other in zip(stored[index], texts[index], strict=True):
            assert torch.equal(one, other)
    target = stored.target([[1, 2], [0]], torch.device("cpu"))
    assert torch.equal(target.base[0], torch.cat((texts[1][0], texts[2][0]), 1))
    assert torch.equal(target.deltas[1], texts[0][1] - texts[0][0])
    assert list(SafetensorsFile(tmp_path / "file").tensors) == ["states", "lengths"]


def test_nothing_is_left_of_a_writing_that_failed(tmp_path: Path) -> None:
    def failing() -> None:
        with deltas_written(tmp_path / "file", {}) as writer:
            writer.write(*states(2)[0])
            writer.write(torch.zeros(1), torch.zeros(2))

    with pytest.raises(RuntimeError, match="equal size"):
        failing()
    message = r"no text was written to .*file, expected at least one"
    with pytest.raises(ValueError, match=message), deltas_written(tmp_path / "file", {}):
        pass
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "file", 3, 1)
    content = (tmp_path / "file").read_bytes()
    for damaged in (b"", content[:100], content[:-9], content + b"x", content.replace(b'"I64"', b'"I32"')):
        (tmp_path / "odd").write_bytes(damaged)
        with pytest.raises(ValueError, match="odd is not a file of targets of deltas: "):
            StoredDeltas(tmp_path / "odd")
    texts = states(2)
    texts[0][1][0, 0, 0] = torch.nan
    with deltas_written(tmp_path / "odd", {}) as writer:
        writer.write(*texts[0])
    with pytest.raises(ValueError, match="the states of text 0 are not finite"):
        StoredDeltas(tmp_path / "odd")[0]
