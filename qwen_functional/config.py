"""The configuration of a dense Qwen2 or Qwen3 model, under the field names of a checkpoint's ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeGuard, TypeVar

from .architecture import FAMILIES, Family
from .files import read_json_object

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "yarn")
# {size: largest accepted value}, far above any Qwen2's: more is a mistake, and takes memory before files are checked.
SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
}
_MOST_HEAD_DIM = 1 << 16
_LARGEST = 3.4e38
_MOST_TOKENS = 1 << 40  # in a context or a window
_MOST_BYTES = 1 << 24  # of config.json

C = TypeVar("C", bound="Qwen2Config")


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes and constants of a Qwen2 / Qwen2.5 model.

    Fields have the names and meanings of transformers' ``Qwen2Config``. ``None`` is resolved on construction:
    ``num_key_value_heads`` to ``num_attention_heads``, ``head_dim`` to
    ``hidden_size // num_attention_heads``, ``layer_types`` from ``use_sliding_window``, ``sliding_window``
    and ``max_window_layers``. ``rope_parameters`` always holds ``rope_type`` and ``rope_theta``; the older
    ``rope_theta`` and ``rope_scaling`` fields are read by :meth:`from_dict`.

    Raises:
        ValueError: a field has an unsupported value; the message names the field.
    """

    model_type: ClassVar[str] = "qwen2"
    # Fields that change what transformers computes, unless they have this value.
    _fixed: ClassVar[Mapping[str, Any]] = {
        "quantization_config": None, "per_layer_config": None, "partial_rotary_factor": 1, "is_causal": True,
    }  # fmt: skip

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
        for name, most in {**SIZES, "max_position_embeddings": _MOST_TOKENS}.items():
            value = getattr(self, name)
            if not _is_integer(value, 1):
                raise ValueError(f"config field {name} is {value!r:.100}, expected a positive integer")
            if value > most:
                raise ValueError(f"config field {name} is {value!r:.100}, expected at most {most:,}")
        for name in ("tie_word_embeddings", "use_sliding_window"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config field {name} is {getattr(self, name)!r:.100}, expected true or false")
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
        if not _is_integer(self.head_dim, 2) or self.head_dim % 2 or self.head_dim > _MOST_HEAD_DIM:
            raise ValueError(
                f"config field head_dim is {self.head_dim!r:.100}, expected a positive even integer of at most "
                f"{_MOST_HEAD_DIM:,}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"config field hidden_act is {self.hidden_act!r:.100}, expected 'silu'")
        if not _is_number(self.rms_norm_eps) or not self.rms_norm_eps > 0:
            raise ValueError(f"config field rms_norm_eps is {self.rms_norm_eps!r:.100}, expected a number above 0")
        if not self.use_sliding_window:
            resolve("sliding_window", None)
        elif not _is_integer(self.sliding_window, 1) or self.sliding_window > _MOST_TOKENS:
            raise ValueError(
                f"config field sliding_window is {self.sliding_window!r:.100}, expected a positive integer of at most "
                f"{_MOST_TOKENS:,} because use_sliding_window is true"
            )
        if not _is_integer(self.max_window_layers, 0):
            raise ValueError(
                f"config field max_window_layers is {self.max_window_layers!r:.100}, expected an integer >= 0"
            )
        resolve("layer_types", self._resolved_layer_types())
        resolve("rope_parameters", _checked_rope(self.rope_parameters, self.max_position_embeddings))

    def _resolved_layer_types(self) -> tuple[str, ...]:
        if self.layer_types is None:
            windowed = self.max_window_layers if self.sliding_window is not None else self.num_hidden_layers
            return tuple(LAYER_TYPES[i >= windowed] for i in range(self.num_hidden_layers))
        if not isinstance(self.layer_types, (list, tuple)):
            raise ValueError(f"config field layer_types is {self.layer_types!r:.100}, expected a list")
        types = tuple(self.layer_types)
        for i, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"config field layer_types[{i}] is {kind!r:.100}, expected one of {LAYER_TYPES}")
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"config field layer_types has {len(types)} entries, expected num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        if "sliding_attention" in types and self.sliding_window is None:
            raise ValueError(
                "config field layer_types names sliding_attention, expected use_sliding_window to be true"
            )
        return types

    def __hash__(self) -> int:  # from fewer fields than equality compares: rope's parameters are a dict
        return hash((self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers, self.head_dim))

    @property
    def family(self) -> Family:
        """The family of models that it belongs to."""
        return FAMILIES[self.model_type]

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
    def from_dict(cls: type[C], fields: Mapping[str, Any]) -> C:
        """Read the fields of a ``config.json``, in the older or the newer spelling of rope.

        Fields that do not affect the computation (token ids, dtypes, versions, dropout of a frozen model) are
        ignored. Missing fields take transformers' defaults, but sizes must be given: a default that does
        not fit the others would only surface as a tensor of the wrong shape.

        Raises:
            ValueError: ``model_type`` is not this class's, a size is missing, or a value is not supported.
        """
        model_type = fields.get("model_type")
        if model_type != cls.model_type:
            raise ValueError(f"config field model_type is {model_type!r:.100}, expected {cls.model_type!r}")
        for name in SIZES:
            if name not in fields:
                raise ValueError(f"config field {name} is missing, expected a positive integer")
        for name, same in cls._fixed.items():
            if fields.get(name) not in (None, same):
                raise ValueError(f"config field {name} is {fields[name]!r:.100}, expected {same}")
        known = {f.name for f in dataclasses.fields(cls)} - {"rope_parameters"}
        values = {name: value for name, value in fields.items() if name in known}
        values.setdefault("sliding_window", 4096)
        rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config field rope_parameters is {rope!r:.100}, expected an object")
        rope = dict(rope)
        rope.setdefault("rope_theta", fields.get("rope_theta", 10000.0))
        if "original_max_position_embeddings" in fields:  # transformers prefers it to the nested one
            rope["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
        return cls(**values, rope_parameters=rope)

    def to_dict(self) -> dict[str, Any]:
        """The fields as transformers 5 writes them, ready for ``json.dump`` and for :meth:`from_dict`."""
        fields = dataclasses.asdict(self)
        fields["layer_types"] = list(self.layer_types)
        fields["rope_parameters"] = dict(self.rope_parameters)
        return {"architectures": [self.family.architecture], "model_type": self.model_type, **fields}


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Sizes and constants of a dense Qwen3 model: like Qwen2's, but queries and keys have norms and nothing has a bias.

    ``head_dim`` defaults to 128; None is resolved as for Qwen2.
    """

    model_type: ClassVar[str] = "qwen3"
    _fixed: ClassVar[Mapping[str, Any]] = {**Qwen2Config._fixed, "attention_bias": False}

    head_dim: int = 128

    __hash__ = Qwen2Config.__hash__


CONFIGS: Mapping[str, type[Qwen2Config]] = {kind.model_type: kind for kind in (Qwen2Config, Qwen3Config)}


def read_config(folder: str | Path) -> Qwen2Config:
    """The ``config.json`` in a checkpoint's folder, as the class that its ``model_type`` selects.

    Raises:
        ValueError: the file does not exist, its ``model_type`` is not in :data:`CONFIGS`, or as for
            :meth:`Qwen2Config.from_dict`; the message names the file.
    """
    path = Path(folder) / "config.json"
    fields = read_json_object(path, "the config.json of a Qwen2 or Qwen3", _MOST_BYTES)
    try:
        model_type = fields.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIGS:
            raise ValueError(f"config field model_type is {model_type!r:.100}, expected one of {list(CONFIGS)}")
        return CONFIGS[model_type].from_dict(fields)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply, expected the config.json of a Qwen2 or Qwen3") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_integer(value: Any, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a float that float32 can hold, or an integer that torch accepts."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63
    return isinstance(value, float) and -_LARGEST <= value <= _LARGEST


def _checked_rope(rope: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """Rope parameters with rope_type and rope_theta filled in, or a ``ValueError`` that names the field."""
    rope = dict(rope)
    nested = [key for key in LAYER_TYPES if key in rope]
    if nested:
        raise ValueError(f"config field rope_parameters has entries for {nested}, expected one set for all layers")
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.setdefault("rope_theta", 10000.0)
    if kind not in ROPE_TYPES:
        raise ValueError(f"config field rope_parameters.rope_type is {kind!r:.100}, expected one of {ROPE_TYPES}")
    if not _is_number(rope["rope_theta"]) or not rope["rope_theta"] > 1:
        raise ValueError(f"config field rope_theta is {rope['rope_theta']!r:.100}, expected a number above 1")
    if rope.get("partial_rotary_factor") not in (None, 1):
        partial = rope["partial_rotary_factor"]
        raise ValueError(f"config field rope_parameters.partial_rotary_factor is {partial!r:.100}, expected 1")
    if kind == "default":
        return {"rope_type": kind, "rope_theta": rope["rope_theta"]}
    if kind == "yarn":
        original = rope.setdefault("original_max_position_embeddings", max_position_embeddings)
        if not _is_number(original) or not original >= 1:
            raise ValueError(
                "config field rope_parameters.original_max_position_embeddings is "
                f"{original!r:.100}, expected a number >= 1"
            )
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = rope.get(name)
            if value is not None and (not _is_number(value) or not value >= 0):
                raise ValueError(f"config field rope_parameters.{name} is {value!r:.100}, expected a number >= 0")
        if rope.get("factor") is None:
            rope["factor"] = max_position_embeddings / original
    factor = rope.get("factor")
    if not _is_number(factor) or not factor >= 1:
        raise ValueError(f"config field rope_parameters.factor is {factor!r:.100}, expected a number >= 1")
    return rope
