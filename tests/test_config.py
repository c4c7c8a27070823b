"""Qwen2Config and Qwen3Config against transformers' classes of the same names, read from the same fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qwen_functional.config import CONFIGS, Qwen2Config, Qwen3Config, read_config

FIELDS: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)


def both(**changes: Any) -> tuple[Qwen2Config, Any]:
    """The same JSON fields, read by us and by transformers."""
    text = json.dumps({**FIELDS, **changes})
    fields = json.loads(text)
    theirs = AutoConfig.for_model(fields["model_type"]).__class__.from_dict(fields)
    return CONFIGS[json.loads(text)["model_type"]].from_dict(json.loads(text)), theirs


def assert_same(ours: Qwen2Config, theirs: Any) -> None:
    for name in SHARED:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    used = {name: value for name, value in dict(theirs.rope_parameters or {}).items() if name != "type"}
    assert dict(ours.rope_parameters) == used


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 6},
        {"head_dim": 10},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 512},
        {"attention_dropout": 0.1, "torch_dtype": "bfloat16", "use_cache": False, "eos_token_id": [1, 2]},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_sizes_and_defaults_of_missing_fields_are_transformers(kind: str, changes: dict[str, Any]) -> None:
    assert_same(*both(model_type=kind, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 32},
        {"use_sliding_window": True, "max_window_layers": 3},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        {"sliding_window": 8, "layer_types": ["full_attention"] * 6},
    ],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_windowed_layers_are_those_of_transformers(kind: str, changes: dict[str, Any]) -> None:
    ours, theirs = both(model_type=kind, **changes)
    assert_same(ours, theirs)
    windowed = [kind == "sliding_attention" for kind in theirs.layer_types or ()]
    assert [ours.window(i) for i in range(6)] == [theirs.sliding_window if it else None for it in windowed]


YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 128}
NEW_YARN = {"rope_type": "yarn", "rope_theta": 1e6, **YARN}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": {**NEW_YARN, "beta_fast": 16, "truncate": False}},
        {"rope_parameters": {**NEW_YARN, "mscale": 1, "mscale_all_dim": 0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_rope_is_read_as_by_transformers_in_the_older_and_the_newer_spelling(
    kind: str, changes: dict[str, Any]
) -> None:
    assert_same(*both(model_type=kind, **changes))


def test_yarn_takes_the_outer_original_length_first_as_transformers_does_when_it_computes() -> None:
    ours, theirs = both(original_max_position_embeddings=64, rope_scaling={"type": "yarn", **YARN})
    theirs.standardize_rope_params()
    assert_same(ours, theirs)
    assert ours.rope_parameters["original_max_position_embeddings"] == 64


def test_yarn_without_a_factor_derives_it_from_the_lengths() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    config = Qwen2Config.from_dict({**FIELDS, "max_position_embeddings": 512, "rope_parameters": rope})
    assert config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": NEW_YARN}, {"head_dim": 10}], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_written_fields_read_back_the_same_here_and_in_transformers(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config, theirs = both(model_type=kind, use_sliding_window=True, sliding_window=8, **changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert read_config(tmp_path) == config
    assert_same(config, AutoConfig.from_pretrained(tmp_path))
    assert AutoConfig.from_pretrained(tmp_path).__class__ is theirs.__class__


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_saves_reads_back(kind: str, tmp_path: Path) -> None:
    _, theirs = both(model_type=kind, rope_theta=1e6, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    assert_same(read_config(tmp_path), theirs)


def test_a_config_of_the_other_family_is_another_one() -> None:
    ours = [CONFIGS[kind].from_dict({**FIELDS, "model_type": kind, "head_dim": 8}) for kind in CONFIGS]
    assert ours[0] != ours[1]
    with pytest.raises(ValueError, match="config field model_type is 'qwen3', expected 'qwen2'"):
        Qwen2Config.from_dict({**FIELDS, "model_type": "qwen3"})


def test_a_qwen3_with_biases_is_refused() -> None:
    with pytest.raises(ValueError, match="config field attention_bias is True, expected False"):
        Qwen3Config.from_dict({**FIELDS, "model_type": "qwen3", "attention_bias": True})
    Qwen2Config.from_dict({**FIELDS, "attention_bias": True})  # means nothing for Qwen2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("model_type", "qwen2_moe"),
        ("vocab_size", 0),
        ("hidden_size", "48"),
        ("intermediate_size", -1),
        ("num_hidden_layers", 2.0),
        ("num_attention_heads", True),
        ("num_key_value_heads", 4),  # does not divide 6
        ("head_dim", 7),
        ("head_dim", 0),
        ("head_dim", 1 << 62),
        ("vocab_size", 1 << 63),
        ("num_hidden_layers", 10**9),
        ("max_position_embeddings", 10**400),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", 10**30),
        ("rope_theta", 10**400),
        ("rope_theta", float("nan")),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", "1e-6"),
        ("max_position_embeddings", None),
        ("tie_word_embeddings", "false"),
        ("use_sliding_window", 1),
        ("max_window_layers", None),
        ("layer_types", "full_attention"),
        ("layer_types", ["full_attention"] * 5),
        ("layer_types", ["chunked_attention"] * 6),
        ("layer_types", ["sliding_attention"] * 6),  # without use_sliding_window
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("per_layer_config", {"0": {"hidden_size": 8}}),
        ("partial_rotary_factor", 0.5),
        ("is_causal", False),
        ("rope_theta", 0),
        ("rope_theta", None),
        ("rope_parameters", ["yarn"]),
    ],
)
def test_an_unsupported_value_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"config field {field}\b.*expected"):
        Qwen2Config.from_dict({**FIELDS, field: value})


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "rope_type"),
        ({"rope_type": "dynamic", "factor": 8.0}, "rope_type"),
        ({"type": "mrope", "mrope_section": [1, 1, 1]}, "rope_type"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0.5}, "factor"),
        ({"type": "linear", "factor": float("nan")}, "factor"),
        ({"type": "yarn", "factor": "4"}, "factor"),
        ({**NEW_YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**NEW_YARN, "attention_factor": "1"}, "attention_factor"),
        ({**NEW_YARN, "beta_fast": -1}, "beta_fast"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
    ids=str,
)
def test_an_unsupported_rope_is_an_error_that_names_the_field(rope: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"config field rope_parameters.*{field}.*expected"):
        Qwen2Config.from_dict({**FIELDS, "rope_scaling": rope})


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "model_type"])
def test_a_missing_size_is_an_error_and_no_default_of_a_larger_model(field: str) -> None:
    with pytest.raises(ValueError, match=f"config field {field} is missing"):
        Qwen2Config.from_dict({name: value for name, value in FIELDS.items() if name != field})


@pytest.mark.parametrize("window", [None, 0, "8"])
def test_a_sliding_window_without_a_size_is_an_error(window: Any) -> None:
    with pytest.raises(ValueError, match=r"config field sliding_window is .*expected"):
        Qwen2Config.from_dict({**FIELDS, "use_sliding_window": True, "sliding_window": window})


def test_a_hidden_size_that_the_heads_do_not_divide_is_an_error_unless_head_dim_is_given() -> None:
    with pytest.raises(ValueError, match="config field hidden_size is 50"):
        Qwen2Config.from_dict({**FIELDS, "hidden_size": 50})
    assert Qwen2Config.from_dict({**FIELDS, "hidden_size": 50, "head_dim": 8}).q_size == 48


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "a list, expected the config.json of a Qwen2 or Qwen3"),
        ('{"model_type": "llama"}', "model_type"),
        ('{"model_type": ' + "[" * 100_000, "nested too deeply"),
        ('{"model_type": "qwen2", "vocab_size": 1' + "0" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_file(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.*{problem}"):
        read_config(path.parent)
    path.unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(path.parent)
