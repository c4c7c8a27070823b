"""The reference generator: a transformer over token slots with cross-attention to a condition.

Any ``nn.Module`` from (states, mask) to LoRA tokens (B, L, h, w) takes its place in the training loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fields import Range, check_value
from .tokens import TokenFormat


class LoRAGenerator(nn.Module):
    """Maps conditions to LoRA tokens, all slots at once.

    A slot is a place in the format: its embedding is the sum of one for the layer and one for the place within the
    layer. Slots attend to each other and to the condition, and each writes its token as a mean and a mixture of a
    few tokens of its own, which are learned. They start as the principal components of the teachers' tokens at that
    place (:meth:`fit`): LoRA weights are noise to anything smoother, and slots have little in common.

    Args:
        format: of the tokens.
        condition_size: H of the conditions.
        width, depth, heads: of the transformer.
        components: tokens that each slot mixes; there are L·components·h·w parameters in them.
    """

    def __init__(
        self,
        format: TokenFormat,
        condition_size: int,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        components: int = 8,
    ) -> None:
        super().__init__()
        self.sizes = {"width": width, "depth": depth, "heads": heads, "components": components}
        for name, value in self.sizes.items():
            check_value(name, value, int, Range(least=1))
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.format = format
        layers = format.num_hidden_layers
        self.layer_embedding = nn.Parameter(0.5 * torch.randn(layers, 1, width))
        self.slot_embedding = nn.Parameter(0.5 * torch.randn(1, format.n_tokens // layers, width))
        self.condition = nn.Sequential(nn.LayerNorm(condition_size), nn.Linear(condition_size, width))
        block = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerDecoder(block, depth, norm=nn.LayerNorm(width))
        self.mixture = nn.Linear(width, components)
        height, token_width = format.token_shape
        self.mean = nn.Parameter(torch.zeros(format.n_tokens, height, token_width))
        self.components = nn.Parameter(0.02 * torch.randn(format.n_tokens, components, height * token_width))

    @torch.no_grad()
    def fit(self, tokens: Tensor) -> None:
        """Start from teachers' tokens (N, L, h, w): their mean, and as many principal components as there are.

        A component is scaled so that the teachers' shares in it have a mean square of one. NaN padding counts as
        the mean.

        Raises:
            ValueError: no teachers, or tokens of another shape than the format's.
        """
        shape = tuple(self.mean.shape)
        if tokens.dim() != 4 or not len(tokens) or tuple(tokens.shape[1:]) != shape:
            expected = f"(N, {', '.join(map(str, shape))})"
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected {expected} with an N of 1 or more")
        tokens = tokens.to("cpu", self.mean.dtype)  # devices choose other signs of eigenvectors: so all start alike
        mean = tokens.nanmean(0).nan_to_num()
        rows = (tokens - mean).nan_to_num().flatten(2).transpose(0, 1)  # (L, N, h·w)
        _, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending
        chosen = vectors.flip(-1)[..., : self.components.shape[1]]
        self.mean.copy_(mean)
        self.components[:, : chosen.shape[-1]].copy_((chosen.mT @ rows) / len(tokens) ** 0.5)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, L, h, w) float32 for ``states`` (B, T, H) and ``mask`` (B, T), true where there is a token."""
        slots = (self.layer_embedding + self.slot_embedding).flatten(0, 1)
        x = self.blocks(slots.expand(len(states), -1, -1), self.condition(states), memory_key_padding_mask=~mask)
        mixture = self.mixture(x).float()
        tokens = torch.einsum("blk,lkd->bld", mixture, self.components)
        return self.mean + tokens.unflatten(-1, self.format.token_shape)
