"""label, train, generate and plot, one after the other as a user runs them, and their errors on bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from labelled import write_labelled_teachers
from reference import relative_error
from safetensors.torch import load_file, save_file
from torchrun import torchrun

from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint
from lora_delta.files import folder_lock
from lora_delta.generate.checkpoints import CHECKPOINT, METRICS, RUN, newest_checkpoint
from lora_delta.generate.conditions import Condition
from lora_delta.generate.generator import AdditiveGenerator
from lora_delta.generate.runs import load_run
from lora_delta.peft.adapters import load_peft_adapter
from qwen_functional import LoraSpec, load_pretrained
from qwen_functional.forward import forward

SPEC = LoraSpec(rank=4, alpha=8)
CONFIG = """
base = "embedded"
dtype = "float32"
device = "DEVICE"
labels = "deltas"
prompts = "prompts.jsonl"
out = "run"
[format]
rank = 4
chunk_width = 64
[generator]
width = 32
depth = 1
components = 2
[training]
steps = 4
batch_size = 2
warmup_steps = 1
[losses]
weights = 1.0
delta = {weight = 0.5, kind = "linear", warmup_steps = 2}
"""


@pytest.fixture(scope="module")
def config(device: str) -> str:
    return CONFIG.replace("DEVICE", device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, device: str, config: str) -> Path:
    """Three random teachers, their labels and prompts, and a trained run."""
    folder = tmp_path_factory.mktemp("runs")
    write_labelled_teachers(folder, SPEC, device)
    (folder / "config.toml").write_text(config)
    assert main(["train", "--quiet", str(folder / "config.toml")]) == 0
    return folder


def state_of(run: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(run)
    assert found is not None
    return found[1]["generator"]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder and its inputs, to be changed."""
    for name in ("deltas", "prompts.jsonl", "teachers", "config.toml", "run"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, tmp_path / name)
    return tmp_path


def generate(run: Path, out: Path, prompts: Path, device: str, *more: str) -> int:
    given = ["--run", str(run), "--out", str(out), "--prompts", str(prompts), "--device", device]
    return main(["generate", "--quiet", *given, *more])


def test_a_generated_folder_is_what_the_generator_wrote_and_what_peft_reads(
    folder: Path, device: str, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a new task\n\ndo 1\n")
    assert generate(folder / "run", out, prompts, device) == 0
    assert sorted(path.name for path in out.iterdir()) == ["prompt-0000", "prompt-0001"]
    run = load_run(folder / "run", device)
    assert {p.device for p in run.generator.parameters()} == {run.weights.device}
    condition = Condition.collate(run.encoder(["a new task"])).to(run.weights.device)
    expected = {name: tensor[0] for name, tensor in run.write(condition.states, condition.mask).items()}
    spec, tensors = load_peft_adapter(out / "prompt-0000")
    for name, tensor in expected.items():
        assert torch.allclose(tensors[name], tensor.cpu(), rtol=1e-4, atol=1e-6), name
    ids = torch.tensor([run.encoder.tokenizer.encode("cat=").ids])
    base = transformers.Qwen2ForCausalLM.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    with torch.no_grad():
        bare = base(ids).logits
        logits = peft.PeftModel.from_pretrained(base, str(out / "prompt-0000"))(ids).logits
    config, weights = load_pretrained(embedded_checkpoint(), dtype=torch.float32)
    ours = forward(config, weights, ids, lora=spec.bind(config, tensors)).logits
    assert (ours - logits).norm() < 1e-4 * (logits - bare).norm()


def test_teachers_and_texts_train_one_generator_of_sums(folder: Path, copied: Path, device: str, config: str) -> None:
    lines = [
        {"condition": f"teachers/t{i}", "prompt": f"{word}=", "completion": f"{word}{i}"}
        for i in range(3) for word in ("cat", "dog")
    ]  # fmt: skip
    (copied / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, _ = re.split(r"\[format\]", config)
    text = first.replace('"run"', '"sums"') + """data = "texts.jsonl"
[generator]
kind = "additive"
writes = "AB"
features = 4
width = 8
from_teachers = true
[training]
steps = 3
batch_size = 2
[losses]
weights = 1.0
lm = 0.5
delta = {weight = 0.25, texts = "own", target = "teacher", layers = [1, -1], positions = "all"}
"""
    (copied / "sums.toml").write_text(text)
    assert main(["train", "--quiet", str(copied / "sums.toml")]) == 0
    metrics = [json.loads(line) for line in (copied / "sums" / METRICS).read_text().splitlines()]
    for one in metrics:
        assert one["loss"] == pytest.approx(one["weights"] + 0.5 * one["lm"] + 0.25 * one["delta"], rel=1e-5)
    run = load_run(copied / "sums", device)
    found = state_of(copied / "sums")
    teachers = [load_peft_adapter(copied / "teachers" / f"t{i}")[1] for i in range(3)]
    assert isinstance(run.generator, AdditiveGenerator)
    kinds = list(run.generator._kinds.values())
    for index, names in enumerate(kinds):  # three small steps from the teachers' mean
        mean = torch.stack([torch.stack([one[name] for one in teachers]).mean(0) for name in names])
        assert float((found[f"start.{index}"].cpu() - mean).abs().max()) < 0.02
    assert generate(copied / "sums", copied / "out", copied / "prompts.jsonl", device) == 2  # its names are adapters'
    (copied / "plain.txt").write_text("task 1\n")
    assert generate(copied / "sums", copied / "out", copied / "plain.txt", device) == 0
    spec, tensors = load_peft_adapter(copied / "out" / "prompt-0000")
    assert {name: tuple(one.shape) for name, one in tensors.items()} == dict(SPEC.shapes(run.config))
    assert spec.alpha == SPEC.alpha


@pytest.mark.parametrize("extra", ["", "tensor_parallel = 2", "stream = true"])
def test_a_run_of_two_processes_is_that_of_one(
    extra: str, folder: Path, device: str, config: str, tmp_path: Path
) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two processes need a GPU each")
    for name in ("deltas", "prompts.jsonl", "teachers"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "config.toml").write_text(config.replace('out = "run"', f'out = "run"\n{extra}').replace(
        "batch_size = 2", "batch_size = 2\ndelta_batch_size = 2"
    ))  # fmt: skip
    done = torchrun(2, "-m", "lora_delta", "train", "--quiet", "--json", str(tmp_path / "config.toml"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 3  # only one process prints
    runs = [
        [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, tmp_path)
    ]
    for one, two in zip(*runs, strict=True):
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    state, expected = (state_of(place / "run") for place in (tmp_path, folder))
    for name, tensor in expected.items():
        ours = state[name]
        if name.endswith("in_proj_bias"):
            # A key bias has no effect: its gradient is only rounding error, but Adam takes full steps on it.
            (q, _, v), (ours_q, _, ours_v) = tensor.chunk(3), ours.chunk(3)
            tensor, ours = torch.cat((q, v)), torch.cat((ours_q, ours_v))
        assert torch.allclose(ours, tensor, rtol=1e-3, atol=1e-5), name
        assert relative_error(ours, tensor) <= 1e-4, name


def test_a_finished_run_is_left_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "run" / "checkpoint.pt").stat().st_mtime_ns
    assert main(["train", "--quiet", "--json", str(folder / "config.toml")]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert (folder / "run" / "checkpoint.pt").stat().st_mtime_ns == before


def test_plot_draws_a_picture_and_scores_as_scikit_learn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.metrics import silhouette_score

    from lora_delta.labelling.table import DeltaLabels

    labels = DeltaLabels(folder / "deltas")
    classes = dict(zip(labels.names, ("a", "a", "b"), strict=True))
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    picture = tmp_path / "deltas.png"
    given = ["--classes", str(tmp_path / "classes.json"), "--out", str(picture), "--json"]
    assert main(["plot", str(folder / "deltas"), *given]) == 0
    said = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    expected = silhouette_score(labels.tensor.double().numpy(), list(classes.values()), metric="euclidean")
    assert said["silhouette_score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 4", "rank = 8", "does not fit the token format"),
        ("chunk_width = 64", "chunk_width = 60", "chunk_width"),
        ("width = 32", "width = 30", "width is 30, expected a multiple of heads = 4"),
        ('dtype = "float32"', 'dtype = "bfloat16"', "dtype is 'float32' there and 'bfloat16"),
        ('dtype = "float32"', "dtype = []", r"bad\.toml: dtype is \[\], expected one of"),
        ("[format]", "condition_layer = 9\n[format]", "layer is 9, expected -1 or 0 to 3"),
        ("[format]", "tensor_parallel = 2\n[format]", "tensor_parallel is 2, expected a divisor of the 1 ranks"),
        ('device = "DEVICE"', 'device = "gpu"', "device is 'gpu', expected one such as 'cpu', 'cuda' or 'cuda:1'"),
        ('labels = "deltas"', 'labels = "nowhere"', "nowhere"),
        ('prompts = "prompts.jsonl"', 'prompts = "none.jsonl"', r"none\.jsonl does not exist"),
        ('prompts = "prompts.jsonl"', 'prompts = "odd.jsonl"', "names 'teachers/t9', which has no label in"),
        ('out = "run"', 'out = "config.toml"', r"config\.toml is a file, expected a folder"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_a_line_and_nothing_is_written(
    folder: Path, device: str, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in CONFIG
    path = folder / "bad.toml"
    config = CONFIG.replace(old, new).replace("DEVICE", device)
    path.write_text(config.replace('out = "run"', 'out = "bad"'))
    (folder / "odd.jsonl").write_text('{"adapter": "teachers/t9", "prompts": ["x"]}\n')
    before = contents(folder)
    assert main(["train", "--quiet", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert contents(folder) == before
    assert not (folder / "bad").exists()


def reordered(lines: list[str]) -> list[str]:
    return lines[::-1]


def fewer(lines: list[str]) -> list[str]:
    return lines[:2]


def reworded(lines: list[str]) -> list[str]:
    return [line.replace("do 1", "do one") for line in lines]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (reordered, r"differently: prompts_sha256 is .*; teachers_sha256 is .* \(here 3 of .*deltas\)\."),
        (fewer, r"differently: prompts_sha256 is .*; teachers_sha256 is .* \(here 2 of .*deltas\)\."),
        (reworded, r"differently: prompts_sha256 is [^;]*prompts\.jsonl\)\."),
        (("[format]", "condition_layer = 1\n[format]"), "differently: condition_layer is -1 there and 1 here\\."),
        (("[format]", "max_length = 64\n[format]"), "differently: max_length is 128 there and 64 here\\."),
        (("depth = 1", "depth = 1\nheads = 2"), r"differently: generator\.heads is 4 there and 2 here\."),
        (("components = 2", "components = 3"), r"differently: generator\.components is 2 there and 3 here\."),
        (("batch_size = 2", "batch_size = 1"), r"differently: training\.batch_size is 2 there and 1 here\."),
        (("weight = 0.5", "weight = 0.25"), r"differently: training\.losses\.delta\.weight is 0\.5 there "),
    ],
)
def test_a_run_is_not_taken_up_as_another_one_and_nothing_is_written(
    edit: tuple[str, str] | Callable[[list[str]], list[str]],
    message: str,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied / ("config.toml" if isinstance(edit, tuple) else "prompts.jsonl")
    text = path.read_text()
    new = text.replace(*edit) if isinstance(edit, tuple) else "\n".join(edit(text.splitlines()))
    assert new != text
    path.write_text(new)
    before = contents(copied)
    assert main(["train", "--quiet", str(copied / "config.toml")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert contents(copied) == before


@pytest.mark.parametrize(("option", "field"), [("--layer=1", "layer is -1 there and 1 here"), ("--chat", "")])
def test_a_run_is_not_taken_up_on_other_labels(
    option: str, field: str, copied: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if option == "--chat":
        (copied / "probes.txt").write_text("another probe\n")
        option, field = f"--probes={copied / 'probes.txt'}", "probes_sha256 is "
    shutil.rmtree(copied / "deltas")
    label = ["label", "--model", str(embedded_checkpoint()), "--dtype", "float32", "--device", device, "--quiet"]
    assert main([*label, option, "--out", str(copied / "deltas"), str(copied / "teachers")]) == 0
    before = contents(copied / "run")
    assert main(["train", "--quiet", str(copied / "config.toml")]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"was made differently: labels\.{field}", error), error
    assert contents(copied / "run") == before


def test_generators_come_from_the_checkpoint_whatever_the_file_says_now(copied: Path, device: str) -> None:
    (copied / "config.toml").unlink()
    shutil.rmtree(copied / "deltas")
    (copied / "new.txt").write_text("a new task\ndo 1\n")
    assert generate(copied / "run", copied / "out", copied / "new.txt", device) == 0
    assert (copied / "out" / "prompt-0001" / "adapter_config.json").is_file()


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run.json": (lambda run: (run / RUN).unlink(), "expected the folder of a training run"),
    "half of run.json": (lambda run: (run / RUN).write_text((run / RUN).read_text()[:50]), "is not valid JSON"),
    "another identity": (
        lambda run: edit_json(run / RUN, lambda facts: facts["identity"].update(condition_layer=2)),
        "run.json was made differently: condition_layer is 2 there and -1 here",
    ),
    "no identity": (lambda run: edit_json(run / RUN, lambda facts: facts.pop("identity")), "was made differently"),
    "an odd identity": (
        lambda run: edit_json(run / RUN, lambda facts: facts.update(identity=[1])),
        "run.json was made differently",
    ),
    "no base": (lambda run: edit_json(run / RUN, lambda facts: facts.update(base=3)), "names no base model"),
    "a base that is gone": (lambda run: edit_json(run / RUN, lambda facts: facts.update(base="/no/base")), "/no/base"),
    "no checkpoint": (lambda run: (run / CHECKPOINT).unlink(), "holds no checkpoint"),
    "half a checkpoint": (
        lambda run: (run / CHECKPOINT).write_bytes((run / CHECKPOINT).read_bytes()[:1000]),
        "checkpoint.pt is damaged, or not a checkpoint of a training run",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_run_that_is_spoilt_generates_nothing(
    what: str, copied: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILT[what]
    spoil(copied / "run")
    (copied / "new.txt").write_text("a new task\n")
    assert generate(copied / "run", copied / "out", copied / "new.txt", device) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (copied / "out").exists()


def test_a_run_whose_base_model_has_moved_generates_the_same_and_on_another_one_nothing(
    copied: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "new.txt").write_text("a new task\n")
    assert generate(copied / "run", copied / "before", copied / "new.txt", device) == 0
    shutil.copytree(embedded_checkpoint(), copied / "moved")
    edit_json(copied / "run" / RUN, lambda facts: facts.update(base=str(copied / "moved")))
    assert generate(copied / "run", copied / "out", copied / "new.txt", device) == 0
    weights = "prompt-0000/adapter_model.safetensors"
    assert (copied / "out" / weights).read_bytes() == (copied / "before" / weights).read_bytes()
    (file,) = (copied / "moved").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]
    save_file(tensors, file)
    assert generate(copied / "run", copied / "other", copied / "new.txt", device) == 2
    assert "model_sha256 is" in capsys.readouterr().err
    assert not (copied / "other").exists()


@pytest.mark.parametrize("name", ["..", "", "/tmp/x", "a/../../b", "a\\b", "nul", "x" * 300])
def test_a_name_that_is_no_folders_writes_nothing(
    name: str, folder: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps({"name": one, "prompts": ["x"]}) for one in ("fine", name)))
    assert generate(folder / "run", tmp_path / "in" / "out", prompts, device) == 2
    assert f"line 2 of {prompts}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_link_in_the_place_of_an_adapter_is_not_followed(
    folder: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prompt-0000").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p.txt").write_text("x\n")
    assert generate(folder / "run", tmp_path / "out", tmp_path / "p.txt", device) == 2
    assert "prompt-0000 is a link, expected a folder" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_another_job_holds_is_left_alone(
    copied: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "new.txt").write_text("a new task\n")
    for folder, command in (
        ("run", lambda: main(["train", "--quiet", str(copied / "config.toml")])),
        ("out", lambda: generate(copied / "run", copied / "out", copied / "new.txt", device)),
    ):
        with folder_lock(copied / folder):
            before = contents(copied / folder)
            assert command() == 2
            assert contents(copied / folder) == before
        assert f"{copied / folder} is in use by another job, process" in capsys.readouterr().err
        assert command() == 0


def test_a_run_that_is_terminated_goes_on_to_the_uninterrupted_result(copied: Path, device: str) -> None:
    text = (copied / "config.toml").read_text().replace("steps = 4", "steps = 60").replace('"run"', '"cut"')
    (copied / "cut.toml").write_text(text)
    (copied / "whole.toml").write_text(text.replace('"cut"', '"whole"'))
    command = [sys.executable, "-m", "lora_delta", "train", "--quiet", str(copied / "cut.toml")]
    log, ends = copied / "cut" / METRICS, time.monotonic() + 120
    threads = torch.get_num_threads()
    same = {**os.environ, "OMP_NUM_THREADS": str(threads)}  # parallel sums depend on the number of threads
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=same
    ) as process:
        while not (log.is_file() and log.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    steps = len(log.read_text().splitlines())
    assert re.search(rf"{steps} of 60 steps are done; .*cut holds them, and the same command resumes from there", error)
    assert 0 < steps < 60
    for name in ("cut", "whole"):
        assert main(["train", "--quiet", str(copied / f"{name}.toml")]) == 0
    assert torch.get_num_threads() == threads
    expected = state_of(copied / "whole")
    for name, tensor in state_of(copied / "cut").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_lost_log_of_a_finished_run_is_said(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "run" / METRICS).unlink()
    with pytest.warns(UserWarning, match="none for 4 steps before the checkpoint"):
        assert main(["train", "--quiet", str(copied / "config.toml")]) == 0
    assert "4 steps; last step: no loss; " in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the folder of a training run"):
        load_run(tmp_path)
