"""Labels, reading and writing of adapters that PEFT itself trained on a real checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from reference import relative_error

from lora_delta import DeltaLabels, DifferentiableDeltaCompute, load_peft_adapter, save_peft_adapter
from lora_delta.labelling.labels import compute_labels
from lora_delta.probes.tokenization import load_tokenizer
from qwen_functional.hub import resolve_checkpoint

pytestmark = pytest.mark.real_checkpoint

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 2, r".*\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"gate_proj": 20},
    },
    "layers": {"r": 4, "lora_alpha": 4, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [3, 20]},
}
PROBES = ["The capital of France is", "def add(a, b):\n    return", "Two and two"]
LESSON = "The moon is made of green cheese, and everyone knows it."


def last_states(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """(P, H): the final-norm hidden state at each sequence's last token, one sequence at a time."""
    with torch.no_grad():
        outputs = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for ids in sequences]
    return torch.stack(outputs)


def test_labels_of_trained_adapters_equal_peft(real_checkpoint: str, device: str, tmp_path: Path) -> None:
    folder = resolve_checkpoint(real_checkpoint)
    tokenizer = load_tokenizer(folder)
    sequences = [tokenizer.encode(probe).ids for probe in PROBES]
    lesson = torch.tensor([tokenizer.encode(LESSON).ids])
    bare: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = last_states(bare, sequences)
    expected: dict[str, torch.Tensor] = {}
    logits: dict[str, torch.Tensor] = {}
    model: Any
    for name, fields in ADAPTERS.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(bare, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(3):
            loss = model(lesson, labels=lesson).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(tmp_path / "trained" / name)
        expected[name] = (last_states(model, sequences) - base).mean(0)
        with torch.no_grad():
            logits[name] = model(lesson).logits
        bare = model.unload()

    delta = DifferentiableDeltaCompute.from_pretrained(folder, PROBES, dtype=torch.float32, device=device)
    report = compute_labels(delta, [tmp_path / "trained"], tmp_path / "labels", progress=False)
    labels = DeltaLabels(tmp_path / "labels")
    assert (report.failed, len(labels)) == ((), len(ADAPTERS))
    for name, there in expected.items():
        assert relative_error(labels[str(tmp_path / "trained" / name)], there) < 1e-4, name
    again = compute_labels(delta, [tmp_path / "trained"], tmp_path / "labels", progress=False)
    assert (again.computed, len(again.reused)) == ((), len(ADAPTERS))

    for name in ADAPTERS:  # written here, read by PEFT
        spec, tensors = load_peft_adapter(tmp_path / "trained" / name, config=delta.config)
        save_peft_adapter(tmp_path / "written" / name, spec, tensors, base_model=str(folder))
        model = peft.PeftModel.from_pretrained(bare, str(tmp_path / "written" / name)).eval()
        with torch.no_grad():
            assert relative_error(model(lesson).logits, logits[name]) < 1e-6, name
        bare = model.unload()
