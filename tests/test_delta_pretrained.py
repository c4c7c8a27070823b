"""DifferentiableDeltaCompute.from_pretrained against transformers + PEFT on the same folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHATML, edit_json, edit_tensors, make_checkpoint, save_checkpoint
from reference import hidden_states_at_end, peft_model, random_lora, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_delta.frozen
from lora_delta import DifferentiableDeltaCompute, create_generic_probes, create_mixed_probes
from qwen_functional import LoraSpec

SPEC = LoraSpec(rank=2, alpha=3)
F32 = torch.float32


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint as transformers writes it: weights, a byte-level tokenizer, a chat template."""
    folder = tmp_path_factory.mktemp("saved")
    make_checkpoint(folder, chat_template=CHATML)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    save_checkpoint(folder, vocab_size=300, max_position_embeddings=512, model_type=request.param)
    return edit_tensors(folder, lambda tensors: [t.mul_(0.2) for t in tensors.values()])


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def bare_activation(folder: Path, ids: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=F32)
    with torch.no_grad():
        return torch.stack([hidden_states_at_end(model, None, probe, (-1,))[0] for probe in ids]).mean(0)


@pytest.mark.parametrize("probes", [None, ["one text", "and another, longer one"], ("one text",)])
def test_a_delta_of_a_checkpoint_equals_transformers_and_peft(
    saved: Path, probes: Sequence[str] | None, device: str
) -> None:
    delta = DifferentiableDeltaCompute.from_pretrained(saved, probes, SPEC, dtype=F32, device=device)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer(list(probes or create_generic_probes()))["input_ids"]
    bare = bare_activation(saved, ids)
    assert relative_error(delta.base_activation, bare) <= 1e-5

    tensors = random_lora(delta.config, SPEC, dtype=F32, device=device)
    model = peft_model(AutoModelForCausalLM.from_pretrained(saved, dtype=F32), SPEC)
    with torch.no_grad():
        moved = torch.stack([hidden_states_at_end(model, tensors, probe)[0] for probe in ids]).mean(0)
    assert relative_error(delta(tensors), moved - bare) <= 1e-4
    assert delta.truncated_probes == ()


def test_the_defaults_are_the_seeds(saved: Path) -> None:
    delta = DifferentiableDeltaCompute.from_pretrained(str(saved))
    assert delta.weights.dtype == torch.bfloat16
    assert delta.weights.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert delta.spec == LoraSpec(rank=16, alpha=32)
    assert len(delta.tokens.last) == 5
    assert (delta.layer, delta.pooling, delta.adapters_per_pass) == (-1, "mean", None)
    assert delta.base_activation.dtype == F32
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(saved)(create_generic_probes())["input_ids"]]
    assert delta.tokens.lengths == tuple(lengths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_dtype_is_the_one_asked_for(saved: Path, dtype: torch.dtype) -> None:
    delta = DifferentiableDeltaCompute.from_pretrained(saved, ["a"], SPEC, dtype, "cpu")
    assert delta.weights.dtype == dtype


def test_options_reach_the_constructor(saved: Path, device: str) -> None:
    options: dict[str, Any] = {"layer": (0, -1), "pooling": "none", "adapters_per_pass": 2, "checkpoint": "block"}
    options = {**options, "dtype": F32, "device": device}
    delta = DifferentiableDeltaCompute.from_pretrained(saved, ["a", "b", "c"], SPEC, **options)
    drawn = random_lora(delta.config, SPEC, 3, dtype=F32, device=device)
    tensors = {name: tensor.requires_grad_() for name, tensor in drawn.items()}
    value = delta(tensors)
    assert value.shape == (3, 2, 3, 24)
    assert delta.base_activation.shape == (2, 3, 24)
    value.sum().backward()
    assert delta.checkpoint_used == "block"


# --- Texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [1, 40, 256])
def test_long_probes_are_cut_as_by_transformers(saved: Path, max_length: int) -> None:
    probes = ["short", *create_mixed_probes(), "long " * 300]
    options: dict[str, Any] = {"dtype": F32, "device": "cpu", "max_length": max_length}
    delta = DifferentiableDeltaCompute.from_pretrained(saved, probes, SPEC, **options)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    uncut = [len(ids) for ids in tokenizer(probes)["input_ids"]]
    assert delta.truncated_probes == tuple(i for i, length in enumerate(uncut) if length > max_length)
    assert delta.truncated_probes != ()
    assert delta.tokens.lengths == tuple(min(length, max_length) for length in uncut)
    cut = tokenizer(probes, truncation=True, max_length=max_length)["input_ids"]
    assert relative_error(delta.base_activation, bare_activation(saved, cut)) <= 1e-5


@pytest.mark.parametrize("adds_special_tokens", [False, True])
def test_chat_probes_equal_transformers(folder: Path, adds_special_tokens: bool) -> None:
    make_checkpoint(folder, chat_template=CHATML, adds_special_tokens=adds_special_tokens)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    probes = ["hello there", "2 + 2?"]
    options: dict[str, Any] = {"dtype": F32, "device": "cpu"}
    delta = DifferentiableDeltaCompute.from_pretrained(folder, probes, SPEC, chat=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": probe}] for probe in probes]
    ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    assert relative_error(delta.base_activation, bare_activation(folder, ids)) <= 1e-5
    assert len(delta.tokens) < sum(delta.tokens.lengths)  # the template's beginning is shared
    plain = DifferentiableDeltaCompute.from_pretrained(folder, probes, SPEC, **options)
    ids = tokenizer(probes)["input_ids"]
    assert relative_error(plain.base_activation, bare_activation(folder, ids)) <= 1e-5


# --- Bad input, before the weights are read ---------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(lora_delta.frozen, "load_pretrained", load)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": []}, "probes is empty"),
        ({"probes": "one text"}, "'one text': expected a list of str"),
        ({"probes": ["fine", ""]}, "probe 1 is empty: expected a text with at least one token"),
        ({"probes": ["fine", 7]}, "probe 1 is a int: expected a str"),
        ({"probes": [[1, 2], [3]]}, "probe 0 is a list: expected a str"),
        ({"probes": {"a": "b"}}, "probes is a dict: expected a list of str"),
        ({"probes": ["half \ud800"]}, "probe 0, .* is not valid Unicode"),
        ({"probes": [], "chat": True}, "probes is empty"),
        ({"probes": ["fine", ""], "chat": True}, "probe 1 is empty"),
        ({"max_length": 0}, "max_length is 0: expected an integer of at least 1"),
        ({"max_length": 2.5}, "max_length is 2.5: expected an integer of at least 1"),
    ],
)
def test_bad_probes_are_refused(saved: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DifferentiableDeltaCompute.from_pretrained(saved, **arguments)


@pytest.mark.usefixtures("no_weights")
def test_a_checkpoint_without_tokenizer_or_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template in .*: expected the file chat_template\.jinja"):
        DifferentiableDeltaCompute.from_pretrained(folder, chat=True)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer in .*: expected the file tokenizer\.json"):
        DifferentiableDeltaCompute.from_pretrained(folder)


@pytest.mark.usefixtures("no_weights")
def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        DifferentiableDeltaCompute.from_pretrained(tmp_path / "missing", local_files_only=True)


def test_a_probe_beyond_the_models_positions_or_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 1500 tokens, expected at most max_position.* = 512"):
        DifferentiableDeltaCompute.from_pretrained(folder, ["a", "z" * 1500], max_length=4096)
    edit_json(folder / "config.json", vocab_size=40)
    edit_tensors(folder, lambda t: t.update({n: v[:40].clone() for n, v in t.items() if len(v) == 300}))
    with pytest.raises(ValueError, match="is outside the vocabulary, expected 0 to 39"):
        DifferentiableDeltaCompute.from_pretrained(folder, ["zzz"])


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("option", "value"), [("pooling", "max"), ("layer", 2), ("checkpoint", "all"), ("adapters_per_pass", 0)]
)
def test_a_bad_option_is_refused(saved: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option} is '?{value}'?, expected"):
        DifferentiableDeltaCompute.from_pretrained(saved, **{option: value})


def test_revision_and_offline_mode_reach_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(model: str, **options: Any) -> Path:
        asked.append((model, options))
        return saved

    monkeypatch.setattr(lora_delta.delta, "resolve_checkpoint", resolve)
    DifferentiableDeltaCompute.from_pretrained("org/name", ["a"], revision="v2", local_files_only=True)
    DifferentiableDeltaCompute.from_pretrained("org/name", ["a"])
    assert asked == [
        ("org/name", {"revision": "v2", "local_files_only": True}),
        ("org/name", {"revision": None, "local_files_only": False}),
    ]
