"""label, train, generate and plot, one after the other as a user runs them, and what they say of bad input."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from reference import relative_error
from torchrun import torchrun

from lora_delta.adapters import load_peft_adapter, save_peft_adapter
from lora_delta.cli import main
from lora_delta.conditions import Condition
from lora_delta.embedded import embedded_checkpoint
from lora_delta.runs import RunConfig, load_run, read_prompts
from lora_delta.training import load_generator_state
from qwen_functional import LoraSpec, load_pretrained
from qwen_functional.forward import forward

SPEC = LoraSpec(rank=4, alpha=8)
CONFIG = """
base = "embedded"
dtype = "float32"
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random teachers, their labels and prompts, and a trained run."""
    folder = tmp_path_factory.mktemp("runs")
    config, _ = load_pretrained(embedded_checkpoint())
    chance = torch.Generator().manual_seed(0)
    for i in range(3):
        tensors = {n: 0.1 * torch.randn(s, generator=chance) for n, s in SPEC.shapes(config).items()}
        save_peft_adapter(folder / "teachers" / f"t{i}", SPEC, tensors, base_model=str(embedded_checkpoint()))
    label = ["label", "--model", str(embedded_checkpoint()), "--dtype", "float32", "--quiet"]
    assert main([*label, "--out", str(folder / "deltas"), str(folder / "teachers")]) == 0
    lines = [json.dumps({"adapter": f"teachers/t{i}", "prompts": [f"task {i}", f"do {i}"]}) for i in range(3)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(CONFIG)
    assert main(["train", "--quiet", str(folder / "config.toml")]) == 0
    return folder


def test_a_generated_folder_is_not_what_the_generator_wrote_or_not_what_peft_reads(
    folder: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a new task\n\ndo 1\n")
    given = ["--run", str(folder / "run"), "--prompts", str(prompts), "--out", str(out)]
    assert main(["generate", "--quiet", *given]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["prompt-0000", "prompt-0001"]
    run = load_run(folder / "run")
    condition = Condition.collate(run.encoder(["a new task"]))
    with torch.no_grad():
        expected = run.format.detokenize(run.generator(condition.states, condition.mask)[0])
    spec, tensors = load_peft_adapter(out / "prompt-0000")
    for name, tensor in expected.items():
        assert torch.allclose(tensors[name], tensor, rtol=1e-4, atol=1e-6), name
    ids = torch.tensor([run.encoder.tokenizer.encode("cat=").ids])
    base = transformers.Qwen2ForCausalLM.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    with torch.no_grad():
        bare = base(ids).logits
        logits = peft.PeftModel.from_pretrained(base, str(out / "prompt-0000"))(ids).logits
    config, weights = load_pretrained(embedded_checkpoint(), dtype=torch.float32)
    ours = forward(config, weights, ids, lora=spec.bind(config, tensors)).logits
    assert (ours - logits).norm() < 1e-4 * (logits - bare).norm()


@pytest.mark.parametrize("extra", ["", "tensor_parallel = 2", "stream = true"])
def test_a_run_of_two_processes_is_another_one(extra: str, folder: Path, tmp_path: Path) -> None:
    for name in ("deltas", "prompts.jsonl", "teachers"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "config.toml").write_text(CONFIG.replace('out = "run"', f'out = "run"\n{extra}').replace(
        "batch_size = 2", "batch_size = 2\ndelta_batch_size = 2"
    ))  # fmt: skip
    done = torchrun(2, "-m", "lora_delta", "train", "--quiet", "--json", str(tmp_path / "config.toml"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 3  # one process prints
    runs = [
        [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, tmp_path)
    ]
    for one, two in zip(*runs, strict=True):
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    state, expected = (load_generator_state(place / "run") for place in (tmp_path, folder))
    for name, tensor in expected.items():
        ours = state[name]
        if name.endswith("in_proj_bias"):
            # Keys need no bias: its gradient is rounding alone, of which Adam makes steps as large as any.
            (q, _, v), (ours_q, _, ours_v) = tensor.chunk(3), ours.chunk(3)
            tensor, ours = torch.cat((q, v)), torch.cat((ours_q, ours_v))
        assert torch.allclose(ours, tensor, rtol=1e-3, atol=1e-5), name
        assert relative_error(ours, tensor) <= 1e-4, name


def test_a_finished_run_is_trained_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "run" / "checkpoint.pt").stat().st_mtime_ns
    assert main(["train", "--quiet", "--json", str(folder / "config.toml")]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert (folder / "run" / "checkpoint.pt").stat().st_mtime_ns == before


def test_plot_draws_nothing_or_scores_otherwise_than_scikit_learn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.metrics import silhouette_score

    from lora_delta.label_table import DeltaLabels

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
        ('base = "embedded"', "", "gives base = None, expected a string"),
        ("rank = 4", "rank = 4\nrnak = 4", "gives 'rnak' in \\[format\\]"),
        ("rank = 4", "rank = 8", "does not fit the token format"),
        ("chunk_width = 64", "chunk_width = 60", "chunk_width"),
        ("steps = 4", "steps = 0", "steps is 0, expected an integer of at least 1"),
        ("steps = 4", "step = 4", "gives 'step' in \\[training\\]"),
        ('dtype = "float32"', 'dtype = "int8"', "gives dtype = 'int8'"),
        ('dtype = "float32"', 'dtype = "bfloat16"', "was made with dtype = float32, and the run has bfloat16"),
        ("weights = 1.0", "logits = 1.0", "gives 'logits' in \\[losses\\]"),
        ("[format]", "[format", "cannot be read as TOML"),
        ("[format]", "tensor_parallel = 2\n[format]", "tensor_parallel is 2, expected a divisor of the 1 ranks"),
        ("[format]", "tensor_parallel = 0\n[format]", "gives tensor_parallel = 0, expected an integer of at least 1"),
        ("[format]", 'stream = "no"\n[format]', "gives stream = 'no', expected true or false"),
        ('labels = "deltas"', 'labels = "nowhere"', "nowhere"),
        ('prompts = "prompts.jsonl"', 'prompts = "none.jsonl"', "prompts cannot be read"),
    ],
)
def test_a_bad_config_is_taken(
    folder: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "bad.toml"
    assert old in CONFIG
    path.write_text(CONFIG.replace(old, new).replace('out = "run"', 'out = "bad"'))
    assert main(["train", "--quiet", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "text", ["", '{"adapter": "a"}', '{"adapter": "a", "prompts": []}', '{"adapter": 1, "prompts": ["x"]}', "{", "{}"]
)
def test_bad_prompts_are_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"p\.jsonl"):
        read_prompts(tmp_path / "p.jsonl")


def test_an_adapter_without_a_label_is_trained_on(folder: Path, tmp_path: Path) -> None:
    (folder / "odd.jsonl").write_text('{"adapter": "teachers/t9", "prompts": ["x"]}\n')
    path = folder / "odd.toml"
    path.write_text(CONFIG.replace("prompts.jsonl", "odd.jsonl"))
    assert main(["train", "--quiet", str(path)]) == 2


def test_paths_of_a_config_are_relative_to_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunConfig.from_toml(folder / "config.toml").labels == folder.resolve() / "deltas"


def test_another_folder_is_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the folder of a training run"):
        load_run(tmp_path)
