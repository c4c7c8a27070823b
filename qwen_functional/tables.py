"""What a block needs to know about a packed row, or several that it computes together: tables on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Qwen2Config
from .memory import to_device
from .ops.rope import rope_tables
from .packing import AttentionTile, PackedTokens, joint_tiles


@dataclass(frozen=True)
class Row:
    """The row as one block sees it: rope tables, who attends to whom, and which rows to continue with.

    ``rows`` is None for all S; else the (R,) nodes that are read out, and the block computes o_proj and MLP only for
    them. ``tiles`` cover those queries, and are empty on a backend that attends by ``end``.
    """

    q_rope: tuple[Tensor, Tensor]  # cos, sin (S or R, 1, head_dim/2), times 1/sqrt(head_dim); several: (G, 1, S, …)
    k_rope: tuple[Tensor, Tensor]  # cos, sin (S, head_dim/2)
    tiles: Sequence[AttentionTile]
    rows: Tensor | None
    end: Tensor  # (S,) int32, one past each node's subtree
    nodes: Tensor  # (S,) int32, 0 to S - 1
    positions: Tensor  # (S,) int32
    window: int | None


class Tables:
    """A packed row on the device, or several rows of one length.

    Args:
        tokens: the row, or the rows.
        read: (R,) the nodes that are read out, ascending; for several rows, those of each.
        top: the highest block that is computed; with ``apart`` it continues with only the nodes that are read out,
            which is not done for several rows.
        dtype: of the rope tables.
        by_tile: whether attention is cut into tiles; otherwise it uses ``end``.

    Attributes:
        ids: (S,) int64, or (G, S).
        rows: ``read`` on the device; for several rows numbered consecutively, row·S + node.
        row_at: the :class:`Row` of each layer.
    """

    def __init__(
        self,
        config: Qwen2Config,
        tokens: PackedTokens | Sequence[PackedTokens],
        read: Tensor | Sequence[Tensor],
        top: int,
        *,
        apart: bool,
        dtype: torch.dtype,
        device: torch.device,
        by_tile: bool,
    ) -> None:
        self.joint = not isinstance(tokens, PackedTokens)
        if not isinstance(tokens, PackedTokens):
            self._init_joint(config, tokens, list(read), top, dtype, device)
            return
        assert isinstance(read, Tensor)
        self._config, self._top, self._apart, self._by_tile = config, top, apart, by_tile
        self.rows, self.ids = to_device(read, device), to_device(tokens.input_ids, device)
        self.end = to_device(tokens.end.to(torch.int32), device)
        self.positions = to_device(tokens.positions.to(torch.int32), device)
        self.nodes = torch.arange(len(tokens), dtype=torch.int32, device=device)
        self.rope = rope_tables(config, tokens.positions, dtype, device)
        cos, sin = (table * config.head_dim**-0.5 for table in self.rope)
        self.q_rope = cos[:, None], sin[:, None]
        self._see(tokens, read)

    def _init_joint(
        self,
        config: Qwen2Config,
        trees: Sequence[PackedTokens],
        read: Sequence[Tensor],
        top: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        n = len(trees[0])
        self.ids = to_device(torch.stack([tree.input_ids for tree in trees]), device)
        self.rows = to_device(torch.cat([index * n + nodes for index, nodes in enumerate(read)]), device)
        positions = torch.stack([tree.positions for tree in trees])
        cos, sin = rope_tables(config, positions[:, None], dtype, device)  # (G, 1, S, head_dim/2)
        q_rope = tuple((table * config.head_dim**-0.5)[:, :, :, None] for table in (cos, sin))
        empty = torch.empty(0, dtype=torch.int32, device=device)  # only for backends that attend by these
        windows = {config.window(layer) for layer in range(top + 1)}
        rows = {
            window: Row(
                (q_rope[0], q_rope[1]), (cos, sin), [tile.to(device) for tile in joint_tiles(trees, window)], None,
                empty, empty, empty, window,
            )
            for window in windows
        }  # fmt: skip
        self.row_at = [rows[config.window(layer)] for layer in range(top + 1)]

    def of(self, x: Tensor) -> Tensor:
        """What is read out of a residual stream (G, S, H): (G, R, H), or (1, R, H) for several rows, concatenated."""
        return x.flatten(0, 1)[self.rows][None] if self.joint else x[:, self.rows]

    def add_(self, x: Tensor, d: Tensor) -> Tensor:
        """Add cotangents of what was read out, shaped as :meth:`of` gives it, to those of the stream, in place."""
        if self.joint:
            x.view(-1, x.shape[-1]).index_add_(0, self.rows, d[0])
            return x
        return x.index_add_(1, self.rows, d)

    def spread(self, d: Tensor) -> Tensor:
        """Cotangents (1, R, H) of what was read out, as those of the stream: (1, S, H), or (G, S, H) of several."""
        shape = self.ids.shape if self.joint else (1, *self.ids.shape)
        return self.add_(d.new_zeros(*shape, d.shape[-1]), d)

    def _see(self, tokens: PackedTokens, read: Tensor) -> None:
        """The row as each layer sees it: whole, by sliding window, and in the top block the read-out nodes only."""
        windows: dict[int | None, Row] = {}

        def row(window: int | None, at: Tensor | None) -> Row:
            tiles: list[AttentionTile] = []
            if self._by_tile:
                made = tokens.tiles(window) if at is None else tokens.readout_tiles(at, window)
                tiles = [tile.to(self.ids.device) for tile in made]
            rows = None if at is None else self.rows
            cos, sin = self.q_rope if at is None else (table[self.rows] for table in self.q_rope)
            return Row((cos, sin), self.rope, tiles, rows, self.end, self.nodes, self.positions, window)

        for layer in range(self._top):
            window = self._config.window(layer)
            if window not in windows:
                windows[window] = row(window, None)
        top = row(self._config.window(self._top), read if self._apart else None)
        self.row_at = [*(windows[self._config.window(layer)] for layer in range(self._top)), top]

    def fill(self, made: Tables, tokens: PackedTokens, read: Tensor) -> None:
        """Copy the values of tables of the same sizes into these tensors, which captured graphs read."""
        for old, new in zip(self.tensors(), made.tensors(), strict=True):
            old.copy_(new)
        self._see(tokens, read)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.end, self.positions, self.nodes, self.rows, *self.rope, *self.q_rope
