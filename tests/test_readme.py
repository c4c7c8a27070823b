"""What the README promises: its examples run, and its names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torchrun import torchrun

import qwen_functional
from lora_delta import distributed
from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.build import build
from lora_delta.peft.adapters import load_peft_adapter

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
LINES = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLES += [  # and those of docstrings
    textwrap.dedent(re.findall(r"::\n\n((?:    .*\n|\n)+)", module.__doc__ or "")[0]).strip()
    for module in (qwen_functional, distributed)
]
RECIPES = [*TOML[:2], re.sub(r"\[teacher\].*\n", '[teacher]\nstored = "said.safetensors"\n', TOML[1])]


def _run(code: str, folder: Path) -> str:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    file = folder / "example.py"
    file.write_text(code, encoding="utf-8")
    several = re.match(r"# torchrun --nproc-per-node (\d)", code)
    if several:
        result = torchrun(int(several[1]), str(file), env=one_thread)
    else:
        command = [sys.executable, str(file)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_generator_of_the_readme_learns(tmp_path: Path) -> None:
    losses = [float(line.split()[1]) for line in _run(EXAMPLES[0], tmp_path).splitlines()]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("code", EXAMPLES[1:], ids=lambda code: code.split("\n")[1])
def test_an_example_in_the_readme_runs(code: str, tmp_path: Path) -> None:
    _run(code, tmp_path)


@pytest.mark.parametrize("text", RECIPES, ids=["text-to-lora", "doc-to-lora", "doc-to-lora, stored"])
def test_a_recipe_of_the_readme_trains_on_its_lines(text: str, tmp_path: Path) -> None:
    """It trains, with fewer steps, to adapters that differ between conditions."""
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(LINES[0], encoding="utf-8")
    text = text.replace("steps = 1000", "steps = 4").replace("every = 100", "every = 2")
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    if "\nstored" in text:
        said = str(tmp_path / "said.safetensors")
        assert main(["teach", "--quiet", str(tmp_path / "recipe.toml"), "--k", "16", "--out", said]) == 0
    assert main(["train", "--quiet", str(tmp_path / "recipe.toml")]) == 0
    (run,) = (path.parent for path in tmp_path.glob("*/run.json"))
    (tmp_path / "prompts.txt").write_text("write it backwards\nin capitals\n", encoding="utf-8")
    given = ["--run", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "written")]
    assert main(["generate", "--quiet", *given]) == 0
    one, other = (load_peft_adapter(tmp_path / "written" / f"prompt-000{i}") for i in range(2))
    assert one[0] == other[0]
    assert one[0].rank == 8
    assert any(bool((tensor != other[1][name]).any()) for name, tensor in one[1].items())


def test_the_embedded_checkpoint_is_of_the_kind_that_its_script_makes(tmp_path: Path) -> None:
    build(tmp_path, steps=1)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (embedded_checkpoint() / name).read_bytes()
    made, there = (load_file(folder / "model.safetensors") for folder in (tmp_path, embedded_checkpoint()))
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in there.items()}
