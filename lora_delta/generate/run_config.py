"""A training run, described by a TOML file.

To train on teachers, name their labels (the folder that ``lora-delta label`` wrote, which also fixes probes, layer and
pooling) and their prompts; the rest has defaults::

    base = "Qwen/Qwen2.5-0.5B"        # hub id or folder
    labels = "deltas"                 # paths are relative to the file
    prompts = "prompts.jsonl"         # {"adapter": "teachers/math", "prompts": ["...", "..."]} per line
    out = "run"
    [format]                          # the generator writes tokens
    rank = 8
    chunk_width = 128
    [generator]
    width = 256
    [training]
    steps = 1000
    [losses]
    weights = 1.0
    delta = {weight = 1.0, kind = "linear", warmup_steps = 100}

The language model's loss on texts needs no teachers, see :mod:`lora_delta.generate.text_lines`::

    base = "Qwen/Qwen2.5-0.5B"
    data = "train.jsonl"              # conditions are texts, or names in a file of prompts
    out = "run"
    [adapter]                         # the generator writes A and B
    rank = 8
    target_modules = ["q_proj", "v_proj"]
    [losses]
    lm = 1.0
    delta = {weight = 0.5, texts = "own", target = "context"}
    l2 = 0.01
    [evaluation]
    data = "held_out.jsonl"
    every = 200
    patience = 5

A run resumes from its last checkpoint, bit for bit as if it had not stopped, or is refused with the name of whatever
has changed among the things it depends on. ``steps`` can be raised. A step whose loss or gradient is not finite is
skipped, and a warning names its adapters; Ctrl-C and SIGTERM save the step in progress. Texts are tokenized once, into
the run's folder, and read as they are drawn; the states of conditions are kept there as well. If ``prompts`` names a
file, the data's conditions are names in it. ``mean = "tokens"`` in ``[training]`` weighs all tokens of a step equally,
over ranks and accumulation. ``[log]`` sends metrics to TensorBoard (``tensorboard = true``) or Weights & Biases
(``wandb = "project"``) in addition to ``metrics.jsonl``.

``delta`` with ``texts = "own"`` compares deltas of the adapters' own texts with those of the prompted base, whose
context ``[teacher]`` describes (``target = "context"``), or with those of labelled adapters (``target = "teacher"``).
``lora-delta teach run.toml --out FILE`` stores the output of the teacher of ``kl``, for ``stored = FILE`` in
``[teacher]``, and with ``--deltas`` the targets of ``delta``, for ``stored_deltas = FILE``: a step then costs as much
as one on ``lm``. With ``kind = "additive"`` in ``[generator]`` the contributions of a condition's tokens are added
independently, so that the generator covers new combinations of known parts: choose an early ``condition_layer``, such
as 0, where a text's words are not mixed yet.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from qwen_functional import LoraSpec
from qwen_functional.dtypes import DTYPES
from qwen_functional.files import read_text

from ..distributed import usable_device
from ..lm_loss import REDUCTIONS
from ..probes.tokenization import shortened
from .fields import Range, check_fields, check_value, option
from .generator import WRITES
from .options import TERMS, DeltaOptions, TrainingOptions
from .schedules import Schedule
from .text_lines import CONTEXT
from .texts import ON_BAD_LINE
from .trackers import TrackerOptions

_PATHS = ("labels", "prompts", "data", "out")
_MOST = 2**16  # largest size in [format] and [generator]
_FORMAT = ("rank", "chunk_width")
TRANSFORMER, ADDITIVE = "transformer", "additive"
# The options of each kind of generator: one that writes tokens, one that writes A and B, and the additive one.
_OF_TOKENS = ("width", "depth", "heads", "components")
_OF_MATRICES = ("width", "depth", "heads")
_OF_SUMS = ("width", "features", "scale", "writes", "from_teachers")


@dataclass(frozen=True)
class AdapterOptions:
    """The adapters that a generator writes, if no teachers determine them; see :class:`qwen_functional.LoraSpec`.

    Attributes:
        alpha: by default twice the rank.
        target_modules: by default all seven projections.
        layers_to_transform: by default all.
    """

    rank: int = option(8, least=1, most=_MOST)
    alpha: float | None = option(None, above=0)
    use_rslora: bool = False
    target_modules: list | None = None
    layers_to_transform: list | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def spec(self) -> LoraSpec:
        """Raises ``ValueError`` for impossible modules or layers."""
        given: dict[str, Any] = {"rank": self.rank, "alpha": 2 * self.rank if self.alpha is None else self.alpha}
        for name in ("target_modules", "layers_to_transform"):
            if getattr(self, name) is not None:
                given[name] = tuple(getattr(self, name))
        return LoraSpec(use_rslora=self.use_rslora, **given)


@dataclass(frozen=True)
class TextOptions:
    """The loss on texts.

    Attributes:
        on_bad_line: ``"error"``, or ``"skip"``: leave the line out, with a warning.
        max_tokens: limit for a prompt with its completion; by default the model's number of positions.
        reduction, label_smoothing: see :class:`lora_delta.DifferentiableLMLoss`.
        chat_template_kwargs: further variables of the chat template, where texts are messages.
    """

    on_bad_line: str = option("error", one_of=ON_BAD_LINE)
    max_tokens: int | None = option(None, least=2)
    reduction: str = option("token", one_of=REDUCTIONS)
    label_smoothing: float = option(0.0, least=0, most=0.999)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            json.dumps(self.chat_template_kwargs, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            found = shortened(self.chat_template_kwargs)
            raise ValueError(f"chat_template_kwargs is {found}, expected values that JSON can hold: {error}") from error


@dataclass(frozen=True)
class TeacherOptions:
    """The teacher of the loss ``"kl"``, and the context of the prompted base, the target of deltas of own texts.

    Attributes:
        context: what the bare model reads instead of a prompt, made of ``{condition}`` and ``{prompt}``; if texts are
            messages, the condition goes into the system message instead.
        temperature: logits are divided by it.
        stored: a file of the teacher's distributions on all completions of ``data``, in order; written by
            ``lora-delta teach``.
        stored_deltas: a file of the target deltas of these texts, likewise; written by ``lora-delta teach --deltas``.
    """

    context: str = CONTEXT
    temperature: float = option(1.0, above=0, most=1e6)
    stored: str | None = None
    stored_deltas: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class EvaluationOptions:
    """Held-out conditions; see :class:`lora_delta.generate.evaluation.Evaluation`."""

    data: str
    every: int = option(200, least=1)
    conditions: int | None = option(None, least=1)
    texts: int | None = option(8, least=1)
    patience: int | None = option(None, least=1)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class RunConfig:
    """The contents of a TOML file; see the module's docstring.

    Attributes:
        labels: teachers' labels, for the loss ``"weights"``, and for ``"delta"`` unless its target is the prompted
            base.
        prompts: the prompts of each adapter named in the labels or in the data; without them the data's conditions
            are themselves the prompts.
        data: JSON lines of texts, for the losses ``"lm"`` and ``"kl"``, and for deltas of adapters' own texts.
        dtype: dtype of the base weights.
        device: by default a GPU if there is one, else the CPU.
        tensor_parallel: how many of ``torchrun``'s processes share one copy of the base model.
        stream: leave the base model on disk, see :func:`qwen_functional.load_pretrained`.
        condition_layer: the block whose output conditions the generator; −1 is after the final norm.
        max_length: most tokens of a prompt: a longer one is cut, a longer condition of the data is a bad line.
        condition_cache: bytes of conditions' states to keep in the run's folder.
        format: ``rank`` and ``chunk_width`` of :meth:`TokenFormat.for_config`; without it the generator writes A and B.
        generator: ``kind``, by default ``"transformer"``, with the sizes of :class:`LoRAGenerator`, or without a format
            of :class:`DirectGenerator`; or ``"additive"`` with those of :class:`AdditiveGenerator`, which starts from
            the teachers if ``from_teachers`` is set.

    Raises:
        ValueError: a value of another type, or out of its range; losses without what they need.
    """

    base: str
    out: Path
    labels: Path | None = None
    prompts: Path | None = None
    data: Path | None = None
    dtype: str = option("bfloat16", one_of=tuple(DTYPES))
    device: str | None = None
    adapters_per_pass: int | None = option(None, least=1)
    tensor_parallel: int = option(1, least=1)
    stream: bool = False
    condition_layer: int = option(-1, least=-1)
    max_length: int = option(128, least=1)
    condition_cache: int = option(8 * 2**30, least=0, most=2**60)
    format: Mapping[str, int] | None = option(None, least=1, most=_MOST)
    adapter: AdapterOptions | None = None
    generator: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    texts: TextOptions = field(default_factory=TextOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    evaluation: EvaluationOptions | None = None
    log: TrackerOptions = field(default_factory=TrackerOptions)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.format is not None:
            _check_keys("format", self.format, _FORMAT, required=_FORMAT)
        self._check_generator()
        if self.device is not None:
            usable_device(self.device)
        of_texts = self.training.text_terms
        for name, terms, missing in (
            ("labels", self.asks_teachers_for, self.labels is None),
            ("data", of_texts, self.data is None),
        ):
            if terms and missing:
                raise ValueError(f"{name} is missing, which the loss {terms[0]!r} needs")
        if self.labels is None and self.data is None:
            raise ValueError("labels and data are both missing, expected at least one to train on")
        if self.labels is not None and self.prompts is None:
            raise ValueError("prompts is missing, expected the prompts of the labelled adapters")
        if self.labels is not None and self.adapter is not None:
            raise ValueError("adapter and labels are both given, expected one: the labelled teachers fix the adapter")
        if self.evaluation is not None and not of_texts:
            raise ValueError("evaluation is given without a loss on texts, expected 'lm', 'kl' or a delta of texts")
        if self.adapter is not None:
            rank = None if self.format is None else self.format["rank"]
            if rank not in (None, self.adapter.rank):
                raise ValueError(f"adapter.rank is {self.adapter.rank}, expected {rank}, the format's rank")

    @property
    def asks_teachers_for(self) -> tuple[str, ...]:
        """The losses that read teachers' adapters in each step."""
        stored = self.teacher.stored_deltas is not None and "delta" in self.training.text_terms
        return tuple(name for name in self.training.teacher_terms if name != "delta" or not stored)

    @property
    def asks_base_for(self) -> tuple[str, ...]:
        """The losses that run the bare model on contexts in each step."""
        kl = self.training.needs("kl") and self.teacher.stored is None
        delta = self.training.delta_from_context and self.teacher.stored_deltas is None
        return ("kl",) * kl + ("delta",) * delta

    def _check_generator(self) -> None:
        sizes = dict(self.generator)
        kind = check_value("generator.kind", sizes.pop("kind", TRANSFORMER), str, Range(one_of=(TRANSFORMER, ADDITIVE)))
        if kind == TRANSFORMER and self.format is None and "components" in sizes:
            raise ValueError("generator has 'components', but only token writers do: expected a format as well")
        if kind == ADDITIVE and self.format is not None:
            raise ValueError("generator is additive and there is a format, expected one of them: it writes A and B")
        known = _OF_SUMS if kind == ADDITIVE else _OF_TOKENS if self.format is not None else _OF_MATRICES
        _check_keys("generator", sizes, known)
        for name, value in sizes.items():
            if name == "writes":
                check_value("generator.writes", value, str, Range(one_of=WRITES))
            elif name == "from_teachers":
                check_value("generator.from_teachers", value, bool)
            else:
                check_value(f"generator.{name}", value, int, Range(least=1, most=_MOST))
        if sizes.get("from_teachers") and self.labels is None:
            raise ValueError("generator starts from_teachers without labels, expected the teachers' labels")

    @classmethod
    def from_toml(cls, path: str | Path) -> RunConfig:
        """Read a file.

        Raises:
            ValueError: no such file, not TOML, a key that is missing, unknown, of another type or out of range; the
                message names file and key.
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


_TABLES: dict[str, type] = {
    "adapter": AdapterOptions,
    "texts": TextOptions,
    "teacher": TeacherOptions,
    "evaluation": EvaluationOptions,
    "log": TrackerOptions,
}


def _arguments(cls: type[RunConfig], table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of the class, from the contents of a file in ``folder``."""
    losses = table.pop("losses", None)
    _check_keys("the file", table, [f.name for f in fields(cls)], required=("base", "out"))
    training = dict(check_value("training", table.get("training", {}), dict))
    _check_keys("training", training, [f.name for f in fields(TrainingOptions) if f.name not in ("losses", "delta")])
    if losses is not None:
        given, of_delta = dict(check_value("losses", losses, dict)), {}
        if isinstance(given.get("delta"), dict):
            known = [f.name for f in fields(DeltaOptions)]
            of_delta = {name: value for name, value in given["delta"].items() if name in known}
            given["delta"] = {name: value for name, value in given["delta"].items() if name not in known}
        training["losses"] = {name: _schedule(name, value) for name, value in given.items()}
        try:
            training["delta"] = DeltaOptions(**of_delta)
        except ValueError as error:
            raise ValueError(f"losses.delta: {error}") from error
    made: dict[str, Any] = dict(table)
    for name in ("base", *_PATHS):
        if name in table:
            made[name] = folder / _path(name, table[name])
    if not made["base"].is_dir():
        made["base"] = table["base"]
    made["base"] = str(made["base"])
    for name, kind in _TABLES.items():
        if name not in table:
            continue
        given = dict(check_value(name, table[name], dict))
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        _check_keys(name, given, [f.name for f in fields(kind)], required)
        for key in ("data", "stored", "stored_deltas"):
            if key in given:
                given[key] = str(folder / _path(f"{name}.{key}", given[key]))
        try:
            made[name] = kind(**given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {**made, "training": TrainingOptions(**training)}


def _path(name: str, value: Any) -> str:
    if "\0" in check_value(name, value, str):
        raise ValueError(f"{name} is {shortened(value)}, expected a path without null characters")
    return value


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
