"""The configuration of a dense Qwen2 model, under the field names of a checkpoint's ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes and constants of a Qwen2 / Qwen2.5 model.

    Fields have the names and meanings of transformers' ``Qwen2Config``. ``None`` is resolved on construction:
    ``num_key_value_heads`` to ``num_attention_heads``, ``head_dim`` to ``hidden_size // num_attention_heads``,
    ``layer_types`` from ``use_sliding_window``, ``sliding_window`` and ``max_window_layers``.
    ``rope_parameters`` always holds ``rope_type`` and ``rope_theta``; the older ``rope_theta`` and
    ``rope_scaling`` fields are read by :meth:`from_dict`.

    Raises:
        ValueError: a field has an unsupported value; the message names the field.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # resolved in __post_init__
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        resolve = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen dataclass)
        if self.num_key_value_heads is None:
            resolve("num_key_value_heads", self.num_attention_heads)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config field {name} is {value!r}, expected a positive integer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config field num_key_value_heads is {self.num_key_value_heads}, "
                f"expected a divisor of num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"config field hidden_size is {self.hidden_size}, expected a multiple of "
                    f"num_attention_heads = {self.num_attention_heads} where head_dim is not given"
                )
            resolve("head_dim", self.hidden_size // self.num_attention_heads)
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"config field head_dim is {self.head_dim!r}, expected a positive even integer")
        if self.hidden_act != "silu":
            raise ValueError(f"config field hidden_act is {self.hidden_act!r}, expected 'silu'")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"config field rms_norm_eps is {self.rms_norm_eps!r}, expected a positive number")
        if self.use_sliding_window and self.sliding_window is None:
            raise ValueError("config field sliding_window is None, expected a size as use_sliding_window is true")
        if self.use_sliding_window and (not isinstance(self.sliding_window, int) or self.sliding_window < 1):
            raise ValueError(f"config field sliding_window is {self.sliding_window!r}, expected a positive integer")
        if not self.use_sliding_window:
            resolve("sliding_window", None)
        resolve("layer_types", self._resolved_layer_types())
        resolve("rope_parameters", _checked_rope(self.rope_parameters, self.max_position_embeddings))

    def _resolved_layer_types(self) -> tuple[str, ...]:
        if self.layer_types is None:
            windowed = self.max_window_layers if self.sliding_window is not None else self.num_hidden_layers
            return tuple(LAYER_TYPES[i >= windowed] for i in range(self.num_hidden_layers))
        types = tuple(self.layer_types)
        for i, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"config field layer_types[{i}] is {kind!r}, expected one of {LAYER_TYPES}")
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"config field layer_types has {len(types)} entries, expected num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        if "sliding_attention" in types and self.sliding_window is None:
            raise ValueError(
                "config field layer_types names sliding_attention, expected use_sliding_window and sliding_window"
            )
        return types

    @property
    def q_size(self) -> int:
        """Output rows of q_proj, and input columns of o_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output rows of k_proj, and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens (a token sees itself and window − 1 before it), or None."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Qwen2Config:
        """Read the fields of a ``config.json``, in the older or the newer spelling of rope.

        Fields that do not touch the computation (token ids, dtypes, versions, dropout of a frozen model) are
        left aside.

        Raises:
            ValueError: ``model_type`` is not ``qwen2``, a size is missing, or a value is not supported.
        """
        model_type = fields.get("model_type")
        if model_type != "qwen2":
            raise ValueError(f"config field model_type is {model_type!r}, expected 'qwen2'")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in fields:
                raise ValueError(f"config field {name} is missing, expected a positive integer")
        for name in ("quantization_config", "partial_rotary_factor"):
            if fields.get(name) not in (None, 1, 1.0):
                raise ValueError(f"config field {name} is {fields[name]!r}, which is not supported; expected none")
        known = {f.name for f in dataclasses.fields(cls)} - {"rope_parameters"}
        values = {name: value for name, value in fields.items() if name in known}
        rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
        rope.setdefault("rope_theta", fields.get("rope_theta", 10000.0))
        return cls(**values, rope_parameters=rope)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Qwen2Config:
        """Read a checkpoint's ``config.json``. Raises ``ValueError`` as :meth:`from_dict`, naming the file."""
        path = Path(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist, expected a Qwen2 config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path} holds a {type(fields).__name__}, expected a JSON object")
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as transformers 5 writes them, ready for ``json.dump`` and for ``Qwen2Config.from_dict``."""
        fields = dataclasses.asdict(self)
        fields["layer_types"] = list(self.layer_types)
        fields["rope_parameters"] = dict(self.rope_parameters)
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **fields}


def _checked_rope(rope: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """Rope parameters with rope_type and rope_theta filled in, or a ``ValueError`` that names the field."""
    rope = dict(rope)
    nested = [key for key in LAYER_TYPES if key in rope]
    if nested:
        raise ValueError(f"config field rope_parameters has entries per layer type {nested}, expected one for all")
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.setdefault("rope_theta", 10000.0)
    if kind not in ROPE_TYPES:
        raise ValueError(f"config field rope_parameters.rope_type is {kind!r}, expected one of {ROPE_TYPES}")
    if not isinstance(rope["rope_theta"], (int, float)) or not rope["rope_theta"] > 1:
        raise ValueError(f"config field rope_theta is {rope['rope_theta']!r}, expected a number above 1")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"config field rope_parameters.partial_rotary_factor is {rope['partial_rotary_factor']!r}, expected 1"
        )
    if kind == "default":
        return {"rope_type": kind, "rope_theta": rope["rope_theta"]}
    factor = rope.get("factor")
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", max_position_embeddings)
        if factor is None:
            rope["factor"] = factor = max_position_embeddings / rope["original_max_position_embeddings"]
    if not isinstance(factor, (int, float)) or factor < 1:
        raise ValueError(f"config field rope_parameters.factor is {factor!r}, expected a number of at least 1")
    return rope
