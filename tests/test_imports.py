"""What each package may import: neither transformers nor PEFT; the lower one neither autograd nor the upper one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import CHATML, edit_tensors, make_checkpoint, save_checkpoint

import lora_delta
import qwen_functional

LOWER, UPPER = (Path(package.__path__[0]) for package in (qwen_functional, lora_delta))
LOWER_FILES = sorted(LOWER.rglob("*.py"))
KERNELS = LOWER / "backends" / "kernels"  # only these files need Triton, which some torch builds lack

BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "peft", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in ("transformers", "peft", "triton"):
    try:
        __import__(name)
    except ImportError as error:
        assert "is blocked" in str(error)
    else:
        raise AssertionError(f"{name} can be imported")
"""
MAIN_JOB = """
import torch
from lora_delta import DifferentiableDeltaCompute
from qwen_functional import LoraSpec

torch.set_num_threads(1)
for chat in (False, True):
    delta = DifferentiableDeltaCompute.from_pretrained(
        sys.argv[1], ["a probe", "another"], spec=LoraSpec(rank=2), dtype=torch.float32, device="cpu", chat=chat
    )
    tensors = {n: torch.full((2, *s), 0.1, requires_grad=True) for n, s in delta.lora_shapes.items()}
    delta(tensors).square().sum().backward()
    assert delta.base_activation.isfinite().all()
    assert len(tensors) == 28 and all(tensor.grad.any() for tensor in tensors.values())
"""
IMPORT_ALL = """
import importlib, pkgutil, sys

def import_all(package):
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        if not found.name.endswith("__main__") and ".kernels." not in found.name:
            importlib.import_module(found.name)
"""


def run(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{LOWER.parent}{os.pathsep}{UPPER.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(tree: ast.AST) -> Iterator[str]:
    """Absolute names of all modules that a file imports, including inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg


def test_the_main_job_runs_without_transformers_peft_and_triton(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, chat_template=CHATML)
    save_checkpoint(tmp_path, vocab_size=300)
    edit_tensors(tmp_path, lambda tensors: [t.mul_(0.2) for t in tensors.values()])  # so that no softmax saturates
    run(BLOCKED + MAIN_JOB, str(tmp_path))


def test_every_module_is_imported_without_transformers_peft_and_triton() -> None:
    run(BLOCKED + IMPORT_ALL + "import_all('qwen_functional'); import_all('lora_delta')")


def test_the_lower_floor_imports_nothing_of_the_upper_one() -> None:
    loaded = run(IMPORT_ALL + "import_all('qwen_functional'); print(*sys.modules)").split()
    assert "qwen_functional.engine" in loaded
    above = {"lora_delta", "transformers", "peft", "tokenizers", "triton"}
    assert above.isdisjoint(name.partition(".")[0] for name in loaded)


@pytest.mark.parametrize("file", LOWER_FILES, ids=lambda file: file.relative_to(LOWER).as_posix())
def test_the_lower_floor_uses_neither_autograd_nor_a_library_of_the_upper_one(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = set(imported(tree))
    roots = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert roots <= ({"torch", "triton"} if file.parent == KERNELS else {"torch", "safetensors", "huggingface_hub"})
    assert not [name for name in modules if name.startswith(("torch.autograd", "torch.utils.checkpoint"))]
    grad = {"autograd", "requires_grad", "requires_grad_", "enable_grad", "set_grad_enabled"}
    assert (grad | {"Module"}).isdisjoint(names(tree))


def test_the_upper_floor_does_not_import_triton() -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in UPPER.rglob("*.py")]
    assert "triton" not in {name.partition(".")[0] for tree in trees for name in imported(tree)}


def test_the_upper_floor_meets_autograd_and_peft_in_one_place_each() -> None:
    trees = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in UPPER.rglob("*.py")}
    functions = [file for file, tree in trees.items() if "Function" in set(names(tree))]
    assert functions == ["autograd.py"]
    users = {
        file
        for file, tree in trees.items()
        if {name.partition(".")[0] for name in imported(tree)} & {"transformers", "peft"}
    }
    assert users == {"against_peft.py"}
