"""Adapter folders that must be refused rather than misread, and tensors that must be refused rather than written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_case import CONFIG, JSON, Q_A, QV, TENSORS, base, by_peft, edit
from checkpoints import edit_json
from reference import random_lora, tiny_config
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_delta.peft.adapters import AdapterFiles, load_peft_adapter, save_peft_adapter
from qwen_functional import LoraSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PEFT's adapter of q and v in all layers, rank 4, for tests to corrupt."""
    by_peft(tmp_path / "adapter", target_modules=QV)
    return tmp_path / "adapter"


# --- What no LoraSpec can express ---------------------------------------------------------------------------

PISSA = "converts the others"
REFUSED_FROM_PEFT: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "field use_dora is True"),
    "bias": ({"bias": "lora_only"}, "field bias is 'lora_only', expected 'none'"),
    "LoRA bias": ({"lora_bias": True}, "field lora_bias is True"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"field modules_to_save is \['lm_head'\]"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, r"field trainable_token_indices is \[1, 2\]"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "field target_parameters is "),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names model.embed_tokens"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names lm_head, expected only"),
    "PiSSA": ({"init_lora_weights": "pissa"}, f"field init_lora_weights is 'pissa', expected .*{PISSA}"),
    "PiSSA by iteration": ({"init_lora_weights": "pissa_niter_4"}, f"init_lora_weights is 'pissa_niter_4'.*{PISSA}"),
    "OLoRA": ({"init_lora_weights": "olora"}, f"field init_lora_weights is 'olora', expected .*{PISSA}"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, r"field alora_invocation_tokens is \[5\]"),
    "repeated layers": ({"layer_replication": [(0, 2), (1, 3)]}, "field layer_replication is "),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED_FROM_PEFT)
def test_an_adapter_that_no_spec_can_represent_is_refused(tmp_path: Path, case: str) -> None:
    fields, message = REFUSED_FROM_PEFT[case]
    by_peft(tmp_path, model=base().float(), **{"target_modules": QV, **fields})
    with pytest.raises(ValueError, match=message) as caught:
        load_peft_adapter(tmp_path, config=CONFIG)
    assert str(tmp_path) in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("peft_type", "IA3", "'LORA'"),
        ("peft_type", None, "'LORA'"),
        ("task_type", "SEQ_CLS", "'CAUSAL_LM' or null"),
        ("auto_mapping", "Qwen2", "an object"),
        ("init_lora_weights", "corda", "true, false or"),
        ("init_lora_weights", "loftq", "true, false or"),
        ("init_lora_weights", "lora_ga", "true, false or"),
        ("init_lora_weights", "tomorrow", "true, false or"),
        ("bias", "all", "'none'"),
        *(
            (name, value, "it absent or empty")
            for name, value in {
                "fan_in_fan_out": True,
                "megatron_config": {"a": 1},
                "use_qalora": True,
                "kasa_config": {"a": 1},
                "velora_config": {"a": 1},
                "monteclora_config": {"a": 1},
                "use_bdlora": {"nblocks": 2},
                "arrow_config": {"top_k": 1},
                "use_tomorrow": True,
                "tomorrow": 0.5,
            }.items()
        ),
        ("r", 0, "a positive integer"),
        ("r", "4", "a positive integer"),
        ("r", None, "a positive integer"),
        ("lora_alpha", float("nan"), "a finite number"),
        ("lora_alpha", None, "a finite number"),
        ("use_rslora", "yes", "true or false"),
        ("target_modules", {"q_proj": 1}, "a list of strings"),
        ("target_modules", ["q_proj", 1], "a list of strings"),
        ("layers_to_transform", "1", "a layer number"),
        ("layers_to_transform", [0, 1.0], "a layer number"),
        ("layers_to_transform", True, "a layer number"),
        ("layers_pattern", "layers", "null without layers_to_transform"),
    ],
)
def test_a_field_of_an_unsupported_value_is_refused_by_name(folder: Path, name: str, value: Any, expected: str) -> None:
    edit_json(folder / JSON, **{name: value})
    with pytest.raises(ValueError, match=re.escape(f"{JSON}: field {name} is {value!r}, expected {expected}")):
        load_peft_adapter(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0, expected a positive integer"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is a list, expected a dict"),
        ({"alpha_pattern": {"lm_head": "x"}}, "alpha_pattern['lm_head'] is 'x', expected a finite number"),
        ({"alpha_pattern": {"(": 1}}, "field alpha_pattern: '(' is not a regular expression: missing )"),
        ({"target_modules": "(q_proj"}, "field target_modules: '(q_proj' is not a regular expression: missing )"),
        ({"exclude_modules": "*"}, "field exclude_modules: '*' is not a regular expression: nothing to repeat"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "field layers_to_transform is 1, expected null"),
        ({"target_modules": ".*", "layers_pattern": "h"}, "field layers_pattern is 'h', expected null where"),
        ({"layers_to_transform": 1, "layers_pattern": "("}, "field layers_pattern: '(' is not a regular expr"),
        ({"layers_to_transform": 1, "layers_pattern": "h|layers"}, "'h|layers' finds no layer in some of its altern"),
        ({"rank_pattern": {f"{i}q_proj": 4 for i in range(1025)}}, "rank_pattern has 1,025 patterns, expected at most"),
        ({"target_modules": [str(i) for i in range(5000)]}, "expected a list of at most 4,096"),
        ({"base_model_name_or_path": 5}, "field base_model_name_or_path is 5, expected a string or null"),
        ({"target_modules": [*QV, "lm_head"]}, "field target_modules names lm_head, expected only"),
        ({"target_modules": ".*(q_proj|v_proj|embed_tokens)"}, "target_modules names model.embed_tokens, expected"),
        ({"target_modules": ["q_proj"]}, "tensors for model.layers.0.self_attn.v_proj and 2 more, which its fields"),
        ({"exclude_modules": r"model\.layers\.0\..*"}, "tensors for model.layers.0.self_attn.q_proj and 1 more, which"),
        ({"layers_to_transform": [0, 2]}, "tensors for model.layers.1.self_attn.q_proj and 1 more, which its"),
        ({"target_modules": [*QV, "k_proj"]}, "declares model.layers.0.self_attn.k_proj and 2 more, for which there"),
        ({"target_modules": []}, "has tensors for model.layers.0.self_attn.q_proj and 5 more"),
        ({"r": 5}, "layers.0.self_attn.q_proj.lora_A.weight' has shape (4, 24), expected (5, 24), as its rank is 5"),
        ({"rank_pattern": {"1.self_attn.v_proj": 3}}, "has shape (4, 24), expected (3, 24), as its rank is 3"),
        ({"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}, "base_model_class is 'LlamaForCausalLM', exp"),
    ],
)
def test_fields_that_contradict_others_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    edit_json(folder / JSON, **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_peft_adapter(folder)


EXPLODES = "(.|..)*!"  # takes exponential time in ``re`` on any module name


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"(.|..)*\.(q_proj|v_proj)"},
        {"exclude_modules": EXPLODES},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": ["x", "(?:.|..)*layers"]},
        {"rank_pattern": {EXPLODES: 4}},
        {"alpha_pattern": {f"({EXPLODES})*": 1, "(.|..)*proj": 7}},
    ],
    ids=lambda fields: list(fields)[-1],
)
@pytest.mark.filterwarnings("ignore:.* matches no adapted module")
def test_an_expression_without_end_in_re_is_read_and_means_what_it_says(folder: Path, fields: dict[str, Any]) -> None:
    expected, tensors = load_peft_adapter(folder, config=CONFIG)
    edit_json(folder / JSON, **fields)
    spec, found = load_peft_adapter(folder, config=CONFIG)
    assert list(found) == list(tensors)
    for layer in range(3):
        assert spec.rank_and_scaling(layer, "q_proj") == expected.rank_and_scaling(layer, "q_proj")


WRONG: list[Any] = [
    1e400, -1e400, float("nan"), 10**400, -1, True, "x" * 10_000, "\ud800\n", [[[]]], [5], {"a": {}}, {"(": 1}
]  # fmt: skip
CHECKED = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules", "bias",
    "layers_to_transform", "layers_pattern", "peft_type", "task_type", "auto_mapping", "base_model_name_or_path",
    "init_lora_weights", "use_dora", "modules_to_save",
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_whatever_a_field_holds_is_read_or_an_error_of_one_line_that_names_it(folder: Path, name: str) -> None:
    refused = []
    for value in WRONG:
        edit_json(folder / JSON, **{name: value})
        try:
            load_peft_adapter(folder)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) >= 8
    for message in refused:
        assert message.isprintable()
        assert len(message) < 1000
        assert name in message or "tensors" in message
        assert JSON in message


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_deep_json_is_an_error_that_names_the_file(folder: Path, depth: int) -> None:
    text = (folder / JSON).read_text().rstrip().removesuffix("}")
    (folder / JSON).write_text(f'{text}, "deep": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(ValueError, match=JSON) as caught:
        load_peft_adapter(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path, task_type: str | None) -> None:
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    llama.save_pretrained(tmp_path / "base")
    llama.name_or_path = str(tmp_path / "base")
    by_peft(tmp_path / "adapter", model=llama, target_modules=QV, task_type=task_type)
    message = "base_model_name_or_path is .* 'qwen3', and not 'llama'" if task_type else "'LlamaForCausalLM', expected"
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(tmp_path / "adapter", config=CONFIG)


def test_an_adapter_of_a_base_model_at_hand_is_read(folder: Path, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    for auto_mapping in (None, {"base_model_class": "FSDPQwen2ForCausalLM", "parent_library": "x"}):
        edit_json(folder / JSON, base_model_name_or_path=str(tmp_path / "base"), auto_mapping=auto_mapping)
        assert len(load_peft_adapter(folder)[1]) == 12


# --- Broken files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t.pop(Q_A), f"lora_B.weight' without '{Q_A}'"),
        (lambda t: t.update({Q_A: t[Q_A][:3].clone()}), f"{Q_A}' has shape (3, 24), expected (4, 24), as its rank is"),
        (lambda t: t.update({Q_A: t[Q_A][:, :9].clone()}), "has shape (4, 24), expected (4, 9), as its rank is 4 and"),
        (lambda t: t.update({Q_A: t[Q_A][None].clone()}), "has shape (1, 4, 24), expected (4, a positive integer)"),
        (lambda t: t.update({Q_A: t[Q_A].int()}), f"{Q_A}' has dtype I32, expected one of"),
        (lambda t: t.update({Q_A: t[Q_A].to(torch.float8_e5m2)}), f"{Q_A}' has dtype torch.float8_e5m2, expected"),
        (lambda t: t[Q_A][1].fill_(torch.nan), f"{Q_A}' is not finite"),
        (lambda t: t[Q_A][1].fill_(-torch.inf), f"{Q_A}' is not finite"),
        (lambda t: t.update({Q_A.replace(".weight", ".default.weight"): t[Q_A].clone()}), "expected one spelling"),
        (lambda t: t.update({Q_A.replace("q_proj", "norm"): t[Q_A].clone()}), "norm.lora_A.weight', expected only the"),
        (lambda t: t.update({Q_A.replace(".0.", f".{10**6}."): t[Q_A].clone()}), "expected layers 0 to 255"),
        (lambda t: [t.pop(name) for name in list(t) if ".1." in name], "declares model.layers.1.self_attn.q_proj"),
    ],
)
def test_a_broken_tensor_is_refused(folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_peft_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 28}, "has shape (4, 24), expected (4, 28), as its rank is 4 and hidden_size is 28"),
        ({"num_key_value_heads": 4}, "has shape (16, 4), expected (32, 4), as its rank is 4 and kv_size is 32"),
        ({"num_hidden_layers": 2}, "layers.2.self_attn.q_proj.lora_A.weight', expected layers 0 to 1"),
        ({"num_hidden_layers": 4}, "declares model.layers.3.self_attn.q_proj and 1 more, for which there are no"),
    ],
)
def test_an_adapter_of_another_size_is_refused(folder: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_peft_adapter(folder, config=tiny_config(**{"head_dim": 8, **changes}))


def test_half_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{TENSORS}, of {size} bytes, is truncated or corrupt"):
            load_peft_adapter(folder)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=rf"only in the pickle adapter_model\.bin.*expected {TENSORS}"):
        load_peft_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=f"has no {TENSORS}"):
        load_peft_adapter(folder)
    for text, message in (("{", "is not valid JSON"), ("[1]", "holds a list, expected"), ("\xff", "not valid JSON")):
        (folder / JSON).write_text(text, encoding="latin-1")
        (folder / TENSORS).write_bytes(whole)
        with pytest.raises(ValueError, match=message):
            load_peft_adapter(folder)
    (folder / JSON).unlink()
    for missing, message in ((folder, f"has no {JSON}"), (tmp_path / "absent", "a folder that does not exist")):
        for use in (load_peft_adapter, AdapterFiles.read):
            with pytest.raises(ValueError, match=message):
                use(missing)


# --- Tensors that cannot be saved ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "tensors holds no tensors, expected those of at least one module"),
        (lambda t: t.update({n: x[None] for n, x in t.items()}), "shape (1, 2, 24), expected one adapter without"),
        (lambda t: t.pop(Q_A), f"without '{Q_A}', expected both or neither"),
        (lambda t: t.update({Q_A: t[Q_A][:1]}), "has shape (1, 24), expected (2, 24), as its rank is 2"),
        (lambda t: t.update({Q_A: t[Q_A].long()}), "has dtype torch.int64, expected one of"),
        (lambda t: t.update({Q_A: t[Q_A].to("meta")}), "is a Tensor without values, expected a torch.Tensor"),
        (lambda t: t.update({Q_A: [[0.0]]}), "is a list without values, expected a torch.Tensor"),
        (lambda t: t.update({Q_A: t[Q_A] * torch.nan}), "is not finite"),
        (lambda t: t.update({"lm_head.weight": t[Q_A]}), "tensors holds 'lm_head.weight', expected only"),
        (lambda t: t.update({7: t[Q_A]}), "tensors holds 7, expected only"),
        (
            lambda t: t.update({n.replace("q_", "o_"): x for n, x in t.items()}),
            "fits nothing; expected target_modules ['q_proj', 'k_proj'] in layers [0, 2], as the spec says",
        ),
        (lambda t: t.update({n.replace(".0.", ".1."): x for n, x in t.items()}), "fits nothing; expected target_mod"),
        (lambda t: t.update({n.replace(".0.", ".3."): x for n, x in t.items()}), "expected layers 0 to 2"),
    ],
)
def test_tensors_that_do_not_fit_are_not_saved(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    spec = LoraSpec(2, target_modules=("q_proj", "k_proj"), layers_to_transform=(0, 2))
    tensors = random_lora(CONFIG, spec)
    change(tensors)
    with pytest.raises(ValueError, match=re.escape(message)):
        save_peft_adapter(tmp_path / "adapter", spec, tensors, config=CONFIG)
    assert not (tmp_path / "adapter").exists()


def test_a_bad_place_or_base_model_is_refused(folder: Path) -> None:
    spec, tensors = load_peft_adapter(folder)
    with pytest.raises(ValueError, match="which is a file; expected a folder"):
        save_peft_adapter(folder / JSON, spec, tensors)
    for base_model in ("", None):
        with pytest.raises(ValueError, match=f"base_model is {base_model!r}, expected"):
            save_peft_adapter(folder, spec, tensors, base_model=base_model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tensors is a list, expected a dict"):
        save_peft_adapter(folder, spec, list(tensors))  # type: ignore[arg-type]
