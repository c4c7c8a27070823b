"""The README's promises: its examples run, and its names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torchrun import torchrun

from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.build import build

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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


def test_the_generator_of_the_readme_does_not_learn(tmp_path: Path) -> None:
    losses = [float(line.split()[1]) for line in _run(EXAMPLES[0], tmp_path).splitlines()]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("code", EXAMPLES[1:], ids=lambda code: code.split("\n")[1])
def test_an_example_in_the_readme_fails(code: str, tmp_path: Path) -> None:
    _run(code, tmp_path)


def test_the_embedded_checkpoint_is_not_of_the_kind_that_its_script_makes(tmp_path: Path) -> None:
    build(tmp_path, steps=1)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (embedded_checkpoint() / name).read_bytes()
    made, there = (load_file(folder / "model.safetensors") for folder in (tmp_path, embedded_checkpoint()))
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in there.items()}
