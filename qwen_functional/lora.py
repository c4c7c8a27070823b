"""Which projections carry a LoRA, with what rank and scale, and the tensors that fill it in."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .architecture import PROJECTIONS, projection_shape
from .compiled import opaque
from .config import Qwen2Config
from .finite import check_finite, raise_found
from .patterns import Pattern, pattern_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # torch alone cannot multiply float8
_MOST_ALPHA = torch.finfo(torch.float32).max
_NAME = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d{1,9})\.(?:self_attn|mlp)\.([a-z]+_proj)\.lora_([AB])"
    r"(?:\.default)?\.weight",
    re.ASCII,
)


@functools.cache  # called hundreds of times in a step
def peft_name(layer: int, projection: str, side: str) -> str:
    """The tensor's name in PEFT's ``adapter_model.safetensors``; ``side`` is ``"A"`` or ``"B"``."""
    return f"base_model.model.model.layers.{layer}.{PROJECTIONS[projection].path}.lora_{side}.weight"


def parse_name(name: str) -> tuple[int, str, str] | None:
    """(layer, projection, side) of a LoRA tensor's name, in any accepted spelling; None if it is not one."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in PROJECTIONS or PROJECTIONS[match[2]].path not in name:
        return None
    return int(match[1]), match[2], match[3]


@dataclass(frozen=True)
class LoraPair:
    """The adapters of one projection. ``A`` (G, r, in), ``B`` (G, out, r); adds ``scaling · (x Aᵀ) Bᵀ``."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class Lora:
    """G adapters bound to a config: what :meth:`LoraSpec.bind` returns and ``forward`` takes.

    ``pairs`` maps (layer, projection) to its tensors, in the order of :meth:`LoraSpec.shapes`. ``batched`` says
    whether the tensors came with a leading G; if not, G is 1 and gradients come back without it.
    """

    pairs: Mapping[tuple[int, str], LoraPair]
    n_adapters: int
    batched: bool

    @functools.cached_property
    def structure(self) -> tuple:
        """All but the values and the number of adapters: what a plan depends on. Hashable."""
        pairs = self.pairs.items()
        return tuple((key, p.A.shape[1], p.scaling, p.A.dtype, p.B.dtype, p.A.device) for key, p in pairs)

    def names(self) -> list[str]:
        """PEFT names of all tensors, in order."""
        return list(self._names)

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(peft_name(*key, side) for key in self.pairs for side in "AB")

    def tensors(self) -> dict[str, Tensor]:
        """{PEFT name: tensor}, shaped as given to ``bind``."""
        flat = (tensor for pair in self.pairs.values() for tensor in (pair.A, pair.B))
        sides = dict(zip(self._names, flat, strict=True))
        return sides if self.batched else {name: tensor[0] for name, tensor in sides.items()}

    def __getitem__(self, adapters: slice) -> Lora:
        """The adapters of a slice, as views."""
        if self.batched and len(range(self.n_adapters)[adapters]) == self.n_adapters:
            return self
        pairs = {k: LoraPair(p.A[adapters], p.B[adapters], p.scaling) for k, p in self.pairs.items()}
        return Lora(pairs, len(range(self.n_adapters)[adapters]), batched=True)


@dataclass(frozen=True)
class LoraSpec:
    """Ranks, scales and places of a LoRA, under PEFT's field names (``rank`` and ``alpha`` are its r and lora_alpha).

    Args:
        rank: rank of every projection that ``rank_pattern`` does not name.
        alpha: numerator of the scale, ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        target_modules: which of the seven projections carry an adapter.
        rank_pattern: {pattern: rank}. As in PEFT, a pattern is a regular expression that must match the end of
            the module's path (``model.layers.3.self_attn.q_proj``) from a dot onwards; the first that matches is used.
        alpha_pattern: {pattern: alpha}, likewise.
        use_rslora: the rank-stabilized scale of arXiv 2312.03732.
        layers_to_transform: the layers that carry an adapter; None for all.

    Raises:
        ValueError: a rank that is not a positive integer, an alpha that is not finite, an unknown projection,
            layers that are not integers.
    """

    rank: int = 16
    alpha: float = 32
    target_modules: Sequence[str] = tuple(PROJECTIONS)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    layers_to_transform: Sequence[int] | int | None = None

    def __post_init__(self) -> None:
        for where, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(patterns, Mapping):
                raise ValueError(f"{where} is a {type(patterns).__name__}, expected a dict")
        for where, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{where} is {rank!r}, expected a positive integer")
        for where, a in (("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())):
            if not isinstance(a, (int, float)) or not -_MOST_ALPHA <= a <= _MOST_ALPHA:
                raise ValueError(f"{where} is {a!r}, expected a finite number")
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(f"target_modules is {self.target_modules!r}, expected some of {list(PROJECTIONS)}")
        for module in self.target_modules:
            if module not in PROJECTIONS:
                raise ValueError(f"target_modules names {module!r}, expected some of {list(PROJECTIONS)}")
        for where, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in patterns:
                try:
                    path_pattern(key)
                except ValueError as error:
                    raise ValueError(f"{where}: pattern {key!r:.200} {error}") from None
        if self.layers_to_transform is not None:
            layers = self._chosen_layers()
            if not layers or any(not isinstance(layer, int) or isinstance(layer, bool) for layer in layers):
                chosen = self.layers_to_transform
                raise ValueError(f"layers_to_transform is {chosen!r}, expected layer numbers, or None for all")

    def _chosen_layers(self) -> set[int]:
        chosen = self.layers_to_transform
        return set(chosen) if isinstance(chosen, Iterable) else set() if chosen is None else {chosen}

    def rank_and_scaling(self, layer: int, projection: str) -> tuple[int, float]:
        """Rank and scale of one projection's adapter."""
        path = f"model.layers.{layer}.{PROJECTIONS[projection].path}"
        rank = self.rank_pattern.get(matching_pattern(self.rank_pattern, path), self.rank)
        alpha = self.alpha_pattern.get(matching_pattern(self.alpha_pattern, path), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def modules(self, config: Qwen2Config) -> list[tuple[int, str]]:
        """(layer, projection) of every adapter, in the order of :meth:`shapes`.

        Raises:
            ValueError: ``layers_to_transform`` names a layer that the config lacks, or a pattern matches no module.
        """
        every = range(config.num_hidden_layers)
        layers = every if self.layers_to_transform is None else sorted(self._chosen_layers())
        for layer in layers:
            if not 0 <= layer < config.num_hidden_layers:
                raise ValueError(
                    f"layers_to_transform names layer {layer}, expected 0 to {config.num_hidden_layers - 1}"
                )
        modules = [(layer, name) for layer in layers for name in PROJECTIONS if name in self.target_modules]
        paths = [f"model.layers.{layer}.{PROJECTIONS[name].path}" for layer, name in modules]
        for where, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(matching_pattern((pattern,), path) for path in paths):
                    raise ValueError(f"{where} names {pattern!r}, which matches none of the adapted modules")
        return modules

    def shapes(self, config: Qwen2Config) -> dict[str, tuple[int, int]]:
        """{PEFT name: (rows, cols)}: layer by layer, q, k, v, o, gate, up, down; A (r, in) before B (out, r)."""
        shapes = {}
        for layer, projection in self.modules(config):
            rank, _ = self.rank_and_scaling(layer, projection)
            rows, cols = projection_shape(config, projection)
            shapes[peft_name(layer, projection, "A")] = (rank, cols)
            shapes[peft_name(layer, projection, "B")] = (rows, rank)
        return shapes

    @opaque
    def bind(self, config: Qwen2Config, tensors: Mapping[str, Tensor], *, validate: bool = True) -> Lora:
        """Check LoRA tensors against this spec and a config, and assign them their places. Nothing is copied.

        Args:
            tensors: {name: (r, in) or (out, r)} is one adapter, {name: (G, r, in) or (G, out, r)} is G of them.
                Names as PEFT writes them; ``.default.`` before ``weight`` and a missing ``base_model.model.`` in
                front are accepted as well. Modules may be left out: they have no adapter.
            validate: whether to check for NaN and infinity. On a GPU this does not wait: the error is raised by the
                first ``bind`` or vjp of this process after the GPU has finished the check.

        Raises:
            ValueError: a name that fits nothing, an A without its B, a wrong shape, different G, a tensor
                that is not floating point of 16 bits or more, or not finite, different devices.
        """
        raise_found()
        if not isinstance(tensors, Mapping):
            raise ValueError(f"tensors is a {type(tensors).__name__}, expected a dict of LoRA tensors")
        layout = self._layout(config, tuple(tensors))
        n_adapters, batched = _common_batch(tensors, layout.shapes)
        given = dict(zip(layout.names, tensors.values(), strict=True))
        if validate:
            check_finite(given)
        if layout.lonely is not None:
            raise ValueError("LoRA tensor {!r} is given without {!r}, expected both or neither".format(*layout.lonely))
        pairs = {}
        for key, a, b, scaling in layout.pairs:
            A, B = given[a], given[b]
            pairs[key] = LoraPair(A, B, scaling) if batched else LoraPair(A.unsqueeze(0), B.unsqueeze(0), scaling)
        return Lora(pairs, n_adapters, batched)

    def _layout(self, config: Qwen2Config, names: tuple[str, ...]) -> _Layout:
        """Where tensors of these names go. The last layout is kept: a training run has the same names in every step."""
        kept = self.__dict__.get("_kept_layout")
        if kept is not None and kept[0] == names and kept[1] == config:
            return kept[2]
        shapes = self.shapes(config)
        spelled: dict[str, str] = {}
        for name in names:
            parsed = parse_name(name) if isinstance(name, str) else None
            canonical = peft_name(*parsed) if parsed else name
            if canonical not in shapes:
                raise ValueError(f"LoRA tensor {name!r} fits nothing; expected names such as {next(iter(shapes))!r}")
            if canonical in spelled:
                raise ValueError(f"LoRA tensor {name!r} is given twice, in two spellings")
            spelled[canonical] = name
        pairs, lonely = [], None
        for layer, projection in self.modules(config):
            a, b = (peft_name(layer, projection, side) for side in "AB")
            if (a in spelled) != (b in spelled):
                lonely = lonely or ((a, b) if a in spelled else (b, a))
            elif a in spelled:
                pairs.append(((layer, projection), a, b, self.rank_and_scaling(layer, projection)[1]))
        layout = _Layout(tuple(spelled), tuple(shapes[name] for name in spelled), tuple(pairs), lonely)
        object.__setattr__(self, "_kept_layout", (names, config, layout))
        return layout


@dataclass(frozen=True)
class _Layout:
    """The layout of LoRA tensors, in the order in which they were given."""

    names: tuple[str, ...]  # as PEFT writes them
    shapes: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[tuple[int, str], str, str, float], ...]  # (layer, projection), A's name, B's name, scaling
    lonely: tuple[str, str] | None  # the name of an A or B that is given, and that of its missing partner


def matching_pattern(patterns: Iterable[str], path: str) -> str:
    """The first pattern that matches the end of a module path, as PEFT's ``get_pattern_key`` chooses; else "".

    Raises:
        ValueError: a pattern takes too many steps, see ``patterns.py``.
    """
    for key in patterns:
        try:
            if path_pattern(key).match(path):
                return key
        except ValueError as error:
            raise ValueError(f"pattern {key!r:.200} {error}") from None
    return ""


def path_pattern(key: str) -> Pattern:
    """The pattern for a key of rank_pattern or alpha_pattern; it matches a path's end from a dot on. Raises as Pattern.
    """
    return pattern_of(rf"(.*\.)?({key})$")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"LoRA tensor {name!r} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"LoRA tensor {name!r} has dtype {tensor.dtype}, expected a floating-point dtype of 16 bits or more"
        )
    if tensor.dim() not in (2, 3) or tuple(tensor.shape[-2:]) != shape:
        expected = f"{shape} or (G, {shape[0]}, {shape[1]})"
        raise ValueError(f"LoRA tensor {name!r} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.dim() == 3 and tensor.shape[0] == 0:
        raise ValueError(f"LoRA tensor {name!r} holds no adapter: shape {tuple(tensor.shape)}, expected G of 1 or more")


def _common_batch(tensors: Mapping[str, Tensor], shapes: Sequence[tuple[int, int]]) -> tuple[int, bool]:
    """(G, whether tensors have a G dimension), the same for all, which have these shapes; or a ``ValueError``."""
    if not tensors:
        return 1, False
    first_name, first = next(iter(tensors.items()))
    _check_tensor(first_name, first, shapes[0])
    lead, device = tuple(first.shape[:-2]), first.device
    for (name, tensor), shape in zip(tensors.items(), shapes, strict=True):
        # One comparison for each of the hundreds of tensors that are valid.
        fits = isinstance(tensor, Tensor) and tensor.shape == (*lead, *shape) and tensor.dtype in _DTYPES
        if fits and tensor.device == device:
            continue
        _check_tensor(name, tensor, shape)
        if tensor.shape[:-2] != first.shape[:-2]:
            raise ValueError(
                f"LoRA tensors have different G: {first_name!r} has shape {tuple(first.shape)}, "
                f"{name!r} has shape {tuple(tensor.shape)}; expected the same G for all"
            )
        if tensor.device != device:
            raise ValueError(f"LoRA tensor {name!r} is on {tensor.device}, expected {device} like {first_name!r}")
    return (first.shape[0], True) if first.dim() == 3 else (1, False)
