"""Which projections carry a LoRA, of what rank and scale, and the tensors that fill it in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import Qwen2Config

# Order of a block's projections in every dict of LoRA tensors, and where PEFT finds each in a block.
PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_NAME = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.lora_([AB])(?:\.default)?\.weight"
)


def projection_shape(config: Qwen2Config, projection: str) -> tuple[int, int]:
    """(out_features, in_features) of a projection's base weight."""
    h, q, k, i = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    return {
        "q_proj": (q, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, q),
        "gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i),
    }[projection]  # fmt: skip


def peft_name(layer: int, projection: str, side: str) -> str:
    """The tensor's name in PEFT's ``adapter_model.safetensors``; ``side`` is ``"A"`` or ``"B"``."""
    return f"base_model.model.model.layers.{layer}.{PROJECTIONS[projection]}.lora_{side}.weight"


def parse_name(name: str) -> tuple[int, str, str] | None:
    """(layer, projection, side) of a LoRA tensor's name, in any spelling that is read; None if it is none."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in PROJECTIONS or PROJECTIONS[match[2]] not in name:
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
    """G adapters bound to a config: what :meth:`LoraSpec.bind` gives and ``forward`` takes.

    ``pairs`` maps (layer, projection) to its tensors, in the order of :meth:`LoraSpec.shapes`. ``batched`` says
    whether the tensors came with a leading G; if not, G is 1 and gradients come back without it.
    """

    pairs: Mapping[tuple[int, str], LoraPair]
    n_adapters: int
    batched: bool

    def names(self) -> list[str]:
        """PEFT names of all tensors, in order."""
        return [peft_name(*key, side) for key in self.pairs for side in "AB"]

    def tensors(self) -> dict[str, Tensor]:
        """{PEFT name: tensor}, shaped as given to ``bind``."""
        sides = {peft_name(*key, s): getattr(pair, s) for key, pair in self.pairs.items() for s in "AB"}
        return sides if self.batched else {name: tensor[0] for name, tensor in sides.items()}

    def __getitem__(self, adapters: slice) -> Lora:
        """The adapters of a slice, as views."""
        pairs = {k: LoraPair(p.A[adapters], p.B[adapters], p.scaling) for k, p in self.pairs.items()}
        return Lora(pairs, len(range(self.n_adapters)[adapters]), batched=True)


@dataclass(frozen=True)
class LoraSpec:
    """Ranks, scales and places of a LoRA, under PEFT's field names (``rank`` and ``alpha`` are its r, lora_alpha).

    Args:
        rank: rank of every projection that ``rank_pattern`` does not name.
        alpha: numerator of the scale, ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        target_modules: which of the seven projections carry an adapter.
        rank_pattern: {pattern: rank}. As in PEFT, a pattern is a regular expression that must match the end of
            the module's path (``model.layers.3.self_attn.q_proj``) from a dot on; the first that fits is taken.
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
            if not isinstance(a, (int, float)) or not math.isfinite(a):
                raise ValueError(f"{where} is {a!r}, expected a finite number")
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(f"target_modules is {self.target_modules!r}, expected some of {list(PROJECTIONS)}")
        for module in self.target_modules:
            if module not in PROJECTIONS:
                raise ValueError(f"target_modules names {module!r}, expected some of {list(PROJECTIONS)}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(_path_end(pattern))
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
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
        path = f"model.layers.{layer}.{PROJECTIONS[projection]}"
        rank = self.rank_pattern.get(matching_pattern(self.rank_pattern, path), self.rank)
        alpha = self.alpha_pattern.get(matching_pattern(self.alpha_pattern, path), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def modules(self, config: Qwen2Config) -> list[tuple[int, str]]:
        """(layer, projection) of every adapter, in the order of :meth:`shapes`.

        Raises:
            ValueError: ``layers_to_transform`` names a layer that the config lacks, or a pattern fits no module.
        """
        every = range(config.num_hidden_layers)
        layers = every if self.layers_to_transform is None else sorted(self._chosen_layers())
        for layer in layers:
            if not 0 <= layer < config.num_hidden_layers:
                raise ValueError(
                    f"layers_to_transform names layer {layer}, expected 0 to {config.num_hidden_layers - 1}"
                )
        modules = [(layer, name) for layer in layers for name in PROJECTIONS if name in self.target_modules]
        paths = [f"model.layers.{layer}.{PROJECTIONS[name]}" for layer, name in modules]
        for where, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(matching_pattern((pattern,), path) for path in paths):
                    raise ValueError(f"{where} names {pattern!r}, which fits none of the adapted modules")
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

    def bind(self, config: Qwen2Config, tensors: Mapping[str, Tensor]) -> Lora:
        """Check LoRA tensors against this spec and a config, and give them their places. Nothing is copied.

        Args:
            tensors: {name: (r, in) or (out, r)} is one adapter, {name: (G, r, in) or (G, out, r)} is G of them.
                Names as PEFT writes them; ``.default.`` before ``weight`` and a missing ``base_model.model.`` in
                front are read as well. Modules may be left out: they have no adapter.

        Raises:
            ValueError: a name that fits nothing, an A without its B, a shape that is off, different G, a tensor
                that is not floating point of 16 bits or more, or not finite, different devices.
        """
        if not isinstance(tensors, Mapping):
            raise ValueError(f"tensors is a {type(tensors).__name__}, expected a dict of LoRA tensors")
        shapes = self.shapes(config)
        given: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parsed = parse_name(name) if isinstance(name, str) else None
            canonical = peft_name(*parsed) if parsed else name
            if canonical not in shapes:
                raise ValueError(f"LoRA tensor {name!r} fits nothing; expected names such as {next(iter(shapes))!r}")
            if canonical in given:
                raise ValueError(f"LoRA tensor {name!r} is given twice, in two spellings")
            _check_tensor(name, tensor, shapes[canonical])
            given[canonical] = tensor
        n_adapters, batched = _common_batch(given)
        check_finite(given)
        pairs = {}
        for layer, projection in self.modules(config):
            a, b = (peft_name(layer, projection, side) for side in "AB")
            if (a in given) != (b in given):
                have, lack = (a, b) if a in given else (b, a)
                raise ValueError(f"LoRA tensor {have!r} is given without {lack!r}, expected both or neither")
            if a in given:
                _, scaling = self.rank_and_scaling(layer, projection)
                A, B = (t if batched else t.unsqueeze(0) for t in (given[a], given[b]))
                pairs[layer, projection] = LoraPair(A, B, scaling)
        return Lora(pairs, n_adapters, batched)


def matching_pattern(patterns: Iterable[str], path: str) -> str:
    """The first pattern that fits the end of a module path, as PEFT's ``get_pattern_key`` chooses; else ""."""
    return next((p for p in patterns if re.match(_path_end(p), path)), "")


def _path_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"LoRA tensor {name!r} is a {type(tensor).__name__}, expected a torch.Tensor")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:  # torch multiplies no float8 by itself
        raise ValueError(f"LoRA tensor {name!r} has dtype {tensor.dtype}, expected a floating-point dtype, float16 up")
    if tensor.dim() not in (2, 3) or tuple(tensor.shape[-2:]) != shape:
        expected = f"{shape} or (G, {shape[0]}, {shape[1]})"
        raise ValueError(f"LoRA tensor {name!r} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.dim() == 3 and tensor.shape[0] == 0:
        raise ValueError(f"LoRA tensor {name!r} holds no adapter: shape {tuple(tensor.shape)}, expected G of 1 or more")


def _common_batch(tensors: Mapping[str, Tensor]) -> tuple[int, bool]:
    """(G, whether G is written out), the same for all tensors, or a ``ValueError``."""
    if not tensors:
        return 1, False
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dim() != first.dim() or tensor.shape[:-2] != first.shape[:-2]:
            raise ValueError(
                f"LoRA tensors are of different G: {first_name!r} has shape {tuple(first.shape)}, "
                f"{name!r} has shape {tuple(tensor.shape)}; expected the same G for all"
            )
        if tensor.device != first.device:
            raise ValueError(f"LoRA tensor {name!r} is on {tensor.device}, expected {first.device} as {first_name!r}")
    return (first.shape[0], True) if first.dim() == 3 else (1, False)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for a tensor that holds NaN or infinity; one synchronization on a GPU for all."""
    if not tensors or any(is_symbolic(tensor) for tensor in tensors.values()):
        return
    extremes = [torch.stack(tensor.detach().aminmax()).double() for tensor in tensors.values()]  # NaN is both
    finite = torch.isfinite(torch.stack(extremes)).all(1).tolist()
    for name, is_finite in zip(tensors, finite, strict=True):
        if not is_finite:
            raise ValueError(f"LoRA tensor {name!r} is not finite: it holds NaN or infinity")


def is_symbolic(tensor: Tensor) -> bool:
    """Whether the values cannot be read: inside torch.func transforms, a fake tensor, or one on meta."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or tensor.is_meta or type(tensor).__name__ == "FakeTensor"
