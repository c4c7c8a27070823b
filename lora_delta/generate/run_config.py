"""A training run as a TOML file says it.

The file names the base model, the labels of the teachers (what ``lora-delta label`` wrote, and with what settings),
and their prompts; the rest has defaults::

    base = "Qwen/Qwen2.5-0.5B"        # hub id or folder
    labels = "deltas"                 # paths are relative to the file
    prompts = "prompts.jsonl"         # {"adapter": "teachers/math", "prompts": ["...", "..."]} per line
    out = "run"
    [format]
    rank = 8
    chunk_width = 128
    [generator]
    width = 256
    [training]
    steps = 1000
    [losses]
    weights = 1.0
    delta = {weight = 1.0, kind = "linear", warmup_steps = 100}
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qwen_functional.dtypes import DTYPES
from qwen_functional.files import read_text

from ..distributed import usable_device
from ..probes.tokenization import shortened
from .fields import check_fields, check_value, option
from .options import TERMS, TrainingOptions
from .schedules import Schedule

_PATHS = ("labels", "prompts", "out")
_MOST = 2**16  # of a size in [format] and [generator]
_FORMAT = ("rank", "chunk_width")
_GENERATOR = ("width", "depth", "heads", "components")


@dataclass(frozen=True)
class RunConfig:
    """What a TOML file says; see the module's docstring.

    Attributes:
        dtype: of the base weights.
        device: by default a GPU where there is one, else the CPU.
        tensor_parallel: how many of ``torchrun``'s processes hold the base model together.
        stream: leave the base model on disk, see :func:`qwen_functional.load_pretrained`.
        condition_layer: the block whose output conditions the generator, −1 after the final norm.
        max_length: tokens of a prompt.
        format: ``rank`` and ``chunk_width`` of :meth:`TokenFormat.for_config`.
        generator: arguments of :class:`LoRAGenerator`, ``width`` and so on.

    Raises:
        ValueError: a value of another type, or out of its range.
    """

    base: str
    labels: Path
    prompts: Path
    out: Path
    dtype: str = option("bfloat16", one_of=tuple(DTYPES))
    device: str | None = None
    adapters_per_pass: int | None = option(None, least=1)
    tensor_parallel: int = option(1, least=1)
    stream: bool = False
    condition_layer: int = option(-1, least=-1)
    max_length: int = option(128, least=1)
    format: Mapping[str, int] = option(dict, least=1, most=_MOST)
    generator: Mapping[str, int] = option(dict, least=1, most=_MOST)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_keys("format", self.format, _FORMAT, required=_FORMAT)
        _check_keys("generator", self.generator, _GENERATOR)
        if self.device is not None:
            usable_device(self.device)

    @classmethod
    def from_toml(cls, path: str | Path) -> RunConfig:
        """Read a file.

        Raises:
            ValueError: no such file, not TOML, a key that is missing, unknown, or of another type or range; the message
                names file and key.
        """
        path = Path(path)
        text = read_text(path, "a run in TOML")
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as TOML: {error}") from error
        try:
            return cls(**_arguments(cls, table, path.resolve().parent))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _arguments(cls: type[RunConfig], table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of the class, from what a file in ``folder`` holds."""
    losses = table.pop("losses", None)
    _check_keys("the file", table, [f.name for f in fields(cls)], required=("base", *_PATHS, "format"))
    training = dict(check_value("training", table.get("training", {}), dict))
    _check_keys("training", training, [f.name for f in fields(TrainingOptions) if f.name != "losses"])
    if losses is not None:
        training["losses"] = {n: _schedule(n, value) for n, value in check_value("losses", losses, dict).items()}
    for name in ("base", *_PATHS):
        if "\0" in check_value(name, table[name], str):
            raise ValueError(f"{name} is {shortened(table[name])}, expected a path, which holds no null character")
    base = folder / table["base"]
    return {
        **table,
        **{name: folder / table[name] for name in _PATHS},
        "base": str(base) if base.is_dir() else table["base"],
        "training": TrainingOptions(**training),
    }


def _check_keys(where: str, table: Mapping[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where} has {shortened(key)}, expected some of {tuple(known)}")
    for key in required:
        if key not in table:
            raise ValueError(f"{where} has no {key!r}, expected one")


def _schedule(name: str, value: Any) -> Schedule:
    if name not in TERMS:
        raise ValueError(f"losses has {shortened(name)}, expected some of {TERMS}")
    given = value if isinstance(value, dict) else {"weight": value}
    _check_keys(f"losses.{name}", given, [f.name for f in fields(Schedule)], required=["weight"])
    try:
        return Schedule(**given)
    except ValueError as error:
        raise ValueError(f"losses.{name}: {error}") from error
