"""The LoRA tokens of Drag-and-Drop LLMs (arXiv 2506.16406): a LoRA as a stack of equal 2-D tokens, and back.

A is cut along its input features, and Bᵀ along its output features, into chunks w of (rank, chunk_width). With m the
mean and s the unbiased standard deviation of w, a token (rank + 2, chunk_width + 2) is ``(w − m) / s``, framed below
and on the right by copies of a 2×2 block that encodes m and s. The frame that a generator writes is noisy, so all its
blocks are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from qwen_functional import Qwen2Config
from qwen_functional.architecture import PROJECTIONS, TOKEN_ORDER, projection_shape
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.finite import is_symbolic
from qwen_functional.lora import parse_name, peft_name


@dataclass(frozen=True)
class TokenFormat:
    """A token format: one of ``FORMATS``, or your own with other values.

    Tokens are ordered by layer; within a layer by ``order``; within a projection A's chunks come first, then Bᵀ's.

    Args:
        projection_shapes: {projection: (out_features, in_features)} of the base model.
        rank: the LoRA's rank, the same for all projections; even, since the frame consists of 2×2 blocks.
        chunk_width: features in a token; even, and a divisor of every in_features and out_features.
        order: the projections that have tokens, in order. The others have no LoRA.
        mean_scale, std_slope, std_floor, log_offset: both rows of the frame's block are
            ``[mean_scale · m, log(std_slope · s + std_floor) + log_offset]``.

    Raises:
        ValueError: a value that is not as above; the message names it.
    """

    name: str
    num_hidden_layers: int
    projection_shapes: Mapping[str, tuple[int, int]]
    rank: int
    chunk_width: int
    order: tuple[str, ...] = TOKEN_ORDER
    mean_scale: float = 8.0
    std_slope: float = 0.9
    std_floor: float = 0.1
    log_offset: float = 1.6

    def __post_init__(self) -> None:
        for field in ("num_hidden_layers", "rank", "chunk_width"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} is {value!r}, expected a positive integer")
        for field in ("rank", "chunk_width"):
            if getattr(self, field) % 2:
                raise ValueError(f"{field} is {getattr(self, field)}, expected an even number: scales are 2×2 blocks")
        for field in ("mean_scale", "std_slope", "std_floor"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)!r}, expected a finite number above 0")
        if not math.isfinite(self.log_offset):
            raise ValueError(f"log_offset is {self.log_offset!r}, expected a finite number")
        if not self.order or len(set(self.order)) < len(self.order):
            raise ValueError(f"order is {self.order!r}, expected projections, each once")
        for projection in self.order:
            if projection not in PROJECTIONS or projection not in self.projection_shapes:
                known = [name for name in PROJECTIONS if name in self.projection_shapes]
                raise ValueError(f"order names {projection!r}, expected some of projection_shapes: {known}")
            for features in self.projection_shapes[projection]:
                if features < 1 or features % self.chunk_width:
                    raise ValueError(
                        f"chunk_width is {self.chunk_width}, expected a divisor of all features; "
                        f"{projection} has {features}"
                    )

    @classmethod
    def for_config(cls, config: Qwen2Config, rank: int, chunk_width: int, name: str = "custom") -> TokenFormat:
        """The format for all seven projections of a Qwen2 of any size. Raises as the constructor."""
        shapes = {projection: projection_shape(config, projection) for projection in PROJECTIONS}
        return cls(name, config.num_hidden_layers, shapes, rank, chunk_width)

    @classmethod
    def for_shapes(
        cls, token_shape: tuple[int, int, int], lora_shapes: Mapping[str, tuple[int, int]], name: str = "custom"
    ) -> TokenFormat:
        """The format whose tokens (L, h, w) make up LoRA tensors of these shapes.

        Args:
            lora_shapes: {PEFT name: (rows, cols)}, as returned by :meth:`qwen_functional.LoraSpec.shapes`.

        Raises:
            ValueError: no format has both, or as the constructor.
        """
        given: dict[str, tuple[int, ...]] = {key: tuple(shape) for key, shape in lora_shapes.items()}
        shapes: dict[str, tuple[int, int]] = {}
        for projection in TOKEN_ORDER:
            A, B = (given.get(peft_name(0, projection, side)) for side in "AB")
            if A is not None and B is not None:
                shapes[projection] = (B[0], A[1])
        layers = max(1, len(given) // max(1, 2 * len(shapes)))
        found = cls(name, layers, shapes, token_shape[1] - 2, token_shape[2] - 2, tuple(shapes))
        odd = next((key for key in {**found.shapes, **given} if found.shapes.get(key) != given.get(key)), None)
        if odd is not None:
            raise ValueError(
                f"lora_shapes has {given.get(odd)} for {odd!r}, expected {found.shapes.get(odd)}: tokens of shape "
                f"{tuple(token_shape)} need rank {found.rank} and the same projections in all layers"
            )
        if found.n_tokens != token_shape[0]:
            raise ValueError(f"token_shape is {tuple(token_shape)}, expected {found.n_tokens} tokens for these LoRAs")
        return found

    @property
    def token_shape(self) -> tuple[int, int]:
        """(rank + 2, chunk_width + 2)."""
        return self.rank + 2, self.chunk_width + 2

    @property
    def n_tokens(self) -> int:
        """How many tokens a LoRA has."""
        return self.num_hidden_layers * sum(n for *_, n in self.groups)

    @property
    def groups(self) -> list[tuple[str, str, int]]:
        """(projection, side, number of tokens) for a layer's groups of tokens, in order; side is ``"A"`` or ``"B"``."""
        c, shapes = self.chunk_width, self.projection_shapes
        return [(p, side, shapes[p][side == "A"] // c) for p in self.order for side in "AB"]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{PEFT name: (rows, cols)} of the LoRA tensors, in the order of :meth:`qwen_functional.LoraSpec.shapes`."""
        sizes, r = self.projection_shapes, self.rank
        return {
            peft_name(layer, p, side): (r, sizes[p][1]) if side == "A" else (sizes[p][0], r)
            for layer, p, side in self._places()
        }

    def names(self) -> list[str]:
        """PEFT names of the LoRA tensors, in order."""
        return list(self.shapes)

    def _places(self) -> Iterator[tuple[int, str, str]]:
        projections = [projection for projection in PROJECTIONS if projection in self.order]
        return ((i, projection, s) for i in range(self.num_hidden_layers) for projection in projections for s in "AB")

    def tokenize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """LoRA tensors to tokens, differentiably.

        The published tokenizer pads incomplete chunks with NaN; here chunks divide the features, so there are none. For
        a constant chunk (a B of zeros) it divides 0 by 0; here such a token holds 0, and is detokenized exactly.

        Args:
            tensors: {name: (r, in) or (out, r)}, or with a G in front of all; named as
                :meth:`qwen_functional.LoraSpec.bind` reads them.

        Returns:
            (L, h, w) or (G, L, h, w), in the tensors' dtype; computed in float32 if that is a half precision.

        Raises:
            ValueError: a tensor is missing, is not of this format, is of another shape or is not finite.
        """
        given = self._checked_tensors(tensors)
        r, c, tokens, scales = self.rank, self.chunk_width, [], []
        for projection, side, n in self.groups:
            layers = torch.stack([given[peft_name(i, projection, side)] for i in range(self.num_hidden_layers)], -3)
            wide = (layers if side == "A" else layers.mT).unflatten(-1, (n, c)).transpose(-3, -2)
            chunks = wide.to(accumulation_dtype(wide.dtype))  # (…, layers, n, r, c)
            # Computed over views in the tensors' own layout, which gives the published order of summation.
            mean, std = (f((-2, -1), keepdim=True) for f in (chunks.mean, chunks.std))
            scales.append(mean + std)
            corner = (chunks - mean) / torch.where(std == 0, 1.0, std)
            log_std = torch.log(self.std_slope * std + self.std_floor) + self.log_offset
            row = torch.cat([self.mean_scale * mean, log_std], -1).expand(*mean.shape[:-2], r + 2, 2)
            left = torch.cat([corner, row[..., :2, :].tile(c // 2)], -2)
            tokens.append(torch.cat([left, row], -1).to(wide.dtype))
        self._check_finite("LoRA tensors", torch.cat(scales, -3).isfinite()[..., 0, 0])
        return torch.cat(tokens, -3).flatten(-4, -3)

    def detokenize(self, tokens: Tensor, *, validate: bool = True) -> dict[str, Tensor]:
        """Tokens to LoRA tensors, differentiably: the inverse of :meth:`tokenize`, for tokens with noise too.

        Args:
            tokens: (L, h, w), or (G, L, h, w) for G adapters.
            validate: False skips the check that every number is finite, which on a GPU forces a synchronization.

        Returns:
            {PEFT name: (r, in) or (out, r)}, or with a G in front; in the tokens' dtype and in the order of
            ``shapes``. Means and standard deviations are computed in at least float32.

        Raises:
            ValueError: tokens of another shape, not floating point, or not finite. Every entry is read, so none
                may be NaN; see :func:`real_places`.
        """
        parts = [self.read(part) for part in self.split(tokens, validate=validate)]
        return self.join(parts, tokens.dtype, validate=validate)

    def split(self, tokens: Tensor, *, validate: bool = True) -> list[Tensor]:
        """Check a stack (L, h, w) or (G, L, h, w) and split it by ``groups``, into views (…, layers, n, h, w)."""
        self._check_tokens(tokens)
        by_layer = tokens.unflatten(-3, (self.num_hidden_layers, -1))
        if validate and not is_symbolic(tokens):
            ends = torch.stack(tokens.detach().aminmax())  # a NaN makes both NaN
            if not torch.isfinite(ends).all():
                self._check_finite("tokens", torch.isfinite(by_layer).all(-1).all(-1))
        return list(by_layer.split([n for *_, n in self.groups], -3))

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized chunks (…, r, c) of tokens (…, h, w), and the mean and standard deviation (…, 1, 1) of each.

        The chunks are a view; the other two are at least float32.
        """
        r, c, wide = self.rank, self.chunk_width, accumulation_dtype(tokens.dtype)
        # Split, since the gradient of each slice would allocate a stack of zeros; sums are in the published order.
        left, right = tokens.split([c, 2], -1)
        corner, below = left.split([r, 2], -2)
        bottom = torch.cat([below, right[..., r:, :]], -1).to(wide).unflatten(-1, (c // 2 + 1, 2)).mean(-2)
        block = (bottom + right.to(wide).unflatten(-2, (r // 2 + 1, 2)).mean(-3)) * 0.5  # (…, 2, 2)
        m, log_std = block.unbind(-1)  # (…, 2): both rows are the same, up to noise
        std = (torch.exp(log_std - self.log_offset) - self.std_floor) / self.std_slope
        return corner, (m / self.mean_scale).mean(-1)[..., None, None], std.mean(-1)[..., None, None]

    def join(
        self, parts: Sequence[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, *, validate: bool = True
    ) -> dict[str, Tensor]:
        """LoRA tensors, all contiguous, from the results of :meth:`read` for each part of :meth:`split`."""
        if validate:
            self._check_finite("tokens", torch.cat([mean + std for _, mean, std in parts], -3).isfinite()[..., 0, 0])
        joined = {}
        for (projection, side, _), (chunks, mean, std) in zip(self.groups, parts, strict=True):
            wide = torch.addcmul(mean, chunks.to(std.dtype), std).to(dtype).movedim(-4, 0)
            # Layers first, then G: a layer's adapters are contiguous.
            wide = wide.transpose(-3, -2).flatten(-2) if side == "A" else wide.mT.flatten(-3, -2)
            joined[projection, side] = wide.contiguous().unbind(0)
        return {peft_name(layer, p, side): joined[p, side][layer] for layer, p, side in self._places()}

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens are of {kind}, expected a floating-point torch.Tensor")
        shape = (self.n_tokens, *self.token_shape)
        if tokens.dim() not in (3, 4) or tokens.shape[-3:] != shape or tokens.shape[0] == 0:
            expected = f"{shape} or (G, {', '.join(map(str, shape))})"
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected {expected} in format {self.name!r}")

    def _checked_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by PEFT name, each with the right shape and all with the same G; or a ``ValueError``."""
        if not isinstance(tensors, Mapping):
            raise ValueError(f"tensors is a {type(tensors).__name__}, expected a dict of LoRA tensors")
        shapes = self.shapes
        given: dict[str, Tensor] = {}
        first: Tensor | None = None
        for name, tensor in tensors.items():
            parsed = parse_name(name) if isinstance(name, str) else None
            canonical = peft_name(*parsed) if parsed else name
            if canonical not in shapes:
                expected = f"names such as {next(iter(shapes))!r}"
                raise ValueError(f"LoRA tensor {name!r} is not in format {self.name!r}, expected {expected}")
            if canonical in given:
                raise ValueError(f"LoRA tensor {name!r} is given twice, in two spellings")
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"LoRA tensor {name!r} is of {kind}, expected a floating-point torch.Tensor")
            shape = shapes[canonical]
            first = tensor if first is None else first
            batch = first.shape[:-2]
            if tensor.shape[-2:] != shape or tensor.shape[:-2] != batch or len(batch) > 1 or 0 in batch:
                raise ValueError(
                    f"LoRA tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape} or "
                    f"(G, {shape[0]}, {shape[1]}) in format {self.name!r}, with the same G for all"
                )
            if tensor.device != first.device:
                raise ValueError(f"LoRA tensor {name!r} is on {tensor.device}, expected {first.device} like the others")
            given[canonical] = tensor
        missing = [name for name in shapes if name not in given]
        if missing:
            raise ValueError(
                f"{len(missing)} LoRA tensors are missing, the first {missing[0]!r}; expected all "
                f"{len(shapes)} of format {self.name!r}"
            )
        return given

    def _check_finite(self, what: str, finite: Tensor) -> None:
        """Raise where ``finite`` (…, layers, tokens of a layer) is false, and name the token."""
        if is_symbolic(finite) or finite.all():
            return
        index = int((~finite).flatten(-2).nonzero()[0, -1])
        in_layer = [(projection, side, chunk) for projection, side, n in self.groups for chunk in range(n)]
        projection, side, chunk = in_layer[index % len(in_layer)]
        raise ValueError(
            f"{what} hold NaN, infinity or a scale that overflows at token {index}, chunk {chunk} of "
            f"{peft_name(index // len(in_layer), projection, side)!r}; expected finite numbers"
        )


def _published(name: str, layers: int, hidden: int, kv: int, intermediate: int, rank: int, chunk: int) -> TokenFormat:
    sizes = SimpleNamespace(hidden_size=hidden, q_size=hidden, kv_size=kv, intermediate_size=intermediate)
    return TokenFormat(name, layers, {p: projection_shape(sizes, p) for p in PROJECTIONS}, rank, chunk)


FORMATS = {
    format.name: format
    for format in (
        _published("qwen2.5-0.5b", 24, 896, 128, 4864, rank=8, chunk=128),
        _published("qwen2.5-1.5b", 28, 1536, 256, 8960, rank=16, chunk=256),
        _published("qwen2.5-vl-3b", 36, 2048, 256, 11008, rank=16, chunk=256),  # its language model
        _published("qwen2.5-7b", 28, 3584, 512, 18944, rank=16, chunk=512),
    )
}


def named_format(format: str | TokenFormat) -> TokenFormat:
    """The format given, or the one in ``FORMATS`` with this name. ``ValueError`` for an unknown name."""
    if isinstance(format, TokenFormat):
        return format
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected a TokenFormat or one of {list(FORMATS)}")
    return FORMATS[format]


def real_places(tokens: Tensor) -> Tensor:
    """Boolean, in the tokens' shape: which entries a loss may compare. The published files pad with NaN."""
    return ~torch.isnan(tokens)


class DifferentiableDetokenizer:
    """Tokens of one format to LoRA tensors and back, with gradients in both directions.

    Args:
        format: a name in ``FORMATS``, or a custom format.

    Raises:
        ValueError: a name that is not in ``FORMATS``.
    """

    def __init__(self, format: str | TokenFormat = "qwen2.5-1.5b") -> None:
        self.format = named_format(format)

    def detokenize(self, tokens: Tensor) -> dict[str, Tensor]:
        """See :meth:`TokenFormat.detokenize`."""
        return self.format.detokenize(tokens)

    def tokenize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`TokenFormat.tokenize`."""
        return self.format.tokenize(tensors)
