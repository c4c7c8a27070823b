"""Learned maps from a generator's tokens to LoRA tensors, to improve on the fixed detokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .tokens import TokenFormat, named_format


class SimpleLoRAReconstructor(nn.Module):
    """Tokens to LoRA tensors by learned linear maps, as a correction to the fixed detokenizer.

    A dense layer from all tokens to each LoRA tensor would have 2·10¹³ weights for a Qwen2.5-0.5B at rank 8. Here that
    dense map is factored along the axes of the token stack. Every chunk of a LoRA still depends linearly on every
    token, through

    * ``down`` (w → width), ``rows`` (h → rank) and ``up`` (width → c): one for each projection and side, shared by all
      its tokens in all layers, since chunks of one kind of matrix are alike;
    * ``gain`` and ``bias`` (L, width): specific to a token's layer and chunk;
    * ``gather`` (mixing, L) and ``spread`` (L, mixing): what a chunk takes from the other tokens.

    The correction is added to the normalized chunk, before the token's own mean and standard deviation are applied
    (arXiv 2506.16406), so a learning rate means the same for small and large LoRAs. ``up`` starts at zero: a new module
    gives exactly what :meth:`TokenFormat.detokenize` gives, and training starts from there. (At the very first step the
    gradients of the other maps are therefore zero, as are those of a LoRA's A.)

    Args:
        token_shape: (L, h, w) of a token stack.
        lora_shapes: {PEFT name: (rows, cols)} of the tensors to write, such as ``LoraSpec.shapes(config)``.
        format: the token format, if its order or constants are not the published ones; by default it is found from the
            shapes. :meth:`from_format` takes a format alone.
        width: size of the bottleneck between ``down`` and ``up``.
        mixing: how many mixtures of tokens all chunks share; 0 for none.

    Raises:
        ValueError: the shapes belong to no token format, or not to the one given; a width below 1, a mixing below 0.
    """

    def __init__(
        self,
        token_shape: tuple[int, int, int],
        lora_shapes: Mapping[str, tuple[int, int]],
        *,
        format: str | TokenFormat | None = None,
        width: int = 64,
        mixing: int = 32,
    ) -> None:
        super().__init__()
        self.token_shape = tuple(token_shape)
        self.lora_shapes = {name: tuple(shape) for name, shape in lora_shapes.items()}
        if format is None:
            format = TokenFormat.for_shapes(token_shape, lora_shapes)
        self.format = named_format(format)
        L, (h, w), r, c = self.format.n_tokens, self.format.token_shape, self.format.rank, self.format.chunk_width
        if self.token_shape != (L, h, w) or self.lora_shapes != self.format.shapes:
            raise ValueError(
                f"token_shape {self.token_shape} and lora_shapes are not those of format {self.format.name!r}, "
                f"expected {(L, h, w)} and its shapes"
            )
        for name, value, least in (("width", width, 1), ("mixing", mixing, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of {least} or more")
        n = len(self.format.groups)
        self.down = nn.Parameter(torch.randn(n, w, width) / math.sqrt(w))
        self.rows = nn.Parameter(torch.eye(r, h).repeat(n, 1, 1))
        self.up = nn.Parameter(torch.zeros(n, width, c))
        self.gain = nn.Parameter(torch.ones(L, width))
        self.bias = nn.Parameter(torch.zeros(L, width))
        self.gather = nn.Parameter(torch.randn(mixing, L) / math.sqrt(L))
        self.spread = nn.Parameter(torch.randn(L, mixing) / math.sqrt(max(mixing, 1)))

    @classmethod
    def from_format(cls, format: str | TokenFormat, *, width: int = 64, mixing: int = 32) -> SimpleLoRAReconstructor:
        """The module of a format, or of a name in ``FORMATS``. Raises as the constructor."""
        format = named_format(format)
        token_shape = (format.n_tokens, *format.token_shape)
        return cls(token_shape, format.shapes, format=format, width=width, mixing=mixing)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """LoRA tensors of one token stack, or of G stacks.

        Args:
            tokens: (L, h, w) or (G, L, h, w), finite.

        Returns:
            {PEFT name: (r, in) or (out, r)}, or with a G in front, in the tokens' dtype. The correction is computed
            in the parameters' dtype.

        Raises:
            ValueError: as :meth:`TokenFormat.detokenize`.
        """
        parts = self.format.split(tokens)
        read = [self.format.read(part) for part in parts]
        chunks = [corner + more for (corner, *_), more in zip(read, self.correction(parts), strict=True)]
        corrected = [(chunk, mean, std) for chunk, (_, mean, std) in zip(chunks, read, strict=True)]
        return self.format.join(corrected, tokens.dtype)

    def correction(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What is added to the normalized chunks, affine in the tokens: (…, layers, n, r, c) for each part.

        Args:
            parts: (…, layers, n, h, w) each, as returned by :meth:`TokenFormat.split`.
        """
        dtype, sizes = self.down.dtype, [part.shape[-3] for part in parts]
        narrow = [rows @ (part.to(dtype) @ down) for part, down, rows in zip(parts, self.down, self.rows, strict=True)]
        hidden = torch.cat(narrow, -3)  # (…, layers, tokens of a layer, r, width)
        own = hidden.flatten(-4, -3)  # (…, L, r, width)
        mixtures = torch.einsum("ml,...lrk->...mrk", self.gather, own)
        mixed = torch.einsum("lm,...mrk->...lrk", self.spread, mixtures)
        own = (own * self.gain[:, None] + mixed + self.bias[:, None]).unflatten(-3, hidden.shape[-4:-2])
        return [part @ up for part, up in zip(own.split(sizes, -3), self.up, strict=True)]
