"""Random teachers of the embedded checkpoint, with their labels and prompts, in a folder that a run can read."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint
from lora_delta.peft.adapters import save_peft_adapter
from qwen_functional import LoraSpec, load_pretrained


def write_labelled_teachers(folder: Path, spec: LoraSpec, device: str, n: int = 3) -> None:
    """Write ``teachers/t0`` and so on, their ``deltas``, and ``prompts.jsonl`` with two prompts for each."""
    base, _ = load_pretrained(embedded_checkpoint())
    chance = torch.Generator().manual_seed(0)
    for i in range(n):
        tensors = {name: 0.1 * torch.randn(shape, generator=chance) for name, shape in spec.shapes(base).items()}
        save_peft_adapter(folder / "teachers" / f"t{i}", spec, tensors, base_model=str(embedded_checkpoint()))
    label = ["label", "--model", str(embedded_checkpoint()), "--dtype", "float32", "--device", device, "--quiet"]
    assert main([*label, "--out", str(folder / "deltas"), str(folder / "teachers")]) == 0
    lines = [json.dumps({"adapter": f"teachers/t{i}", "prompts": [f"task {i}", f"do {i}"]}) for i in range(n)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
