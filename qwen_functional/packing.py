"""Token sequences packed into one row: a prefix tree, its positions, who attends to whom, where to read out.

A token's hidden state depends on its own prefix only, so tokens that share a prefix are computed once. The
sequences are laid out as a prefix tree, one node per distinct prefix, every node after its parent: a node's depth
is its position, and it attends to its ancestors and itself. The result is exact.

Attention over the row is cut into tiles of consecutive queries. A tile's keys are the ancestors of its queries
and nothing else, so the work per token does not grow with the number of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Qwen2Config

TILE = 64  # queries per tile: large enough for a GEMM, small enough that few keys are masked out


@dataclass(frozen=True)
class AttentionTile:
    """Consecutive queries, and the keys that any of them attends to.

    ``keys`` is a slice where the keys are consecutive (nothing is copied then), else an index tensor (n_keys,).
    ``blocked`` (n_queries, n_keys) bool is true where a query must not see a key; None where all see all.
    """

    queries: slice
    keys: slice | Tensor
    blocked: Tensor | None

    def to(self, device: torch.device) -> AttentionTile:
        keys = self.keys.to(device) if isinstance(self.keys, Tensor) else self.keys
        return AttentionTile(self.queries, keys, None if self.blocked is None else self.blocked.to(device))


@dataclass(frozen=True)
class PackedTokens:
    """P token sequences as one row of S tokens. Made by :func:`pack`; held on the CPU.

    Attributes:
        input_ids: (S,) int64, the token of every node.
        positions: (S,) int64, the depth of every node.
        parents: the node before each node in its sequence, −1 for a first token.
        last: the node of each of the P sequences' last token, where its hidden state is read out.
        lengths: the P sequences' lengths; their sum is what packing without the tree would compute.
    """

    input_ids: Tensor
    positions: Tensor
    parents: tuple[int, ...]
    last: tuple[int, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.parents)

    def check_fits(self, config: Qwen2Config) -> None:
        """Raises ``ValueError`` for an id outside the vocabulary, or a sequence longer than the model's positions."""
        low, high = int(self.input_ids.min()), int(self.input_ids.max())
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary, expected 0 to {config.vocab_size - 1}")
        longest = max(self.lengths)
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"sequence {self.lengths.index(longest)} has {longest} tokens, expected at most "
                f"max_position_embeddings = {config.max_position_embeddings}"
            )

    def tiles(self, window: int | None = None, size: int = TILE) -> list[AttentionTile]:
        """Attention of the whole row, ``size`` queries to a tile.

        ``window``: as :meth:`Qwen2Config.window`, a node sees only ancestors less than so many positions before it.
        """
        starts = range(0, len(self), size)
        return [self._tile(slice(start, min(start + size, len(self))), window) for start in starts]

    def readout_tile(self, nodes: Sequence[int], window: int | None = None) -> AttentionTile:
        """Attention of the queries ``nodes`` alone, which the tile numbers from 0."""
        return self._tile(nodes, window)

    def _tile(self, queries: slice | Sequence[int], window: int | None) -> AttentionTile:
        nodes = range(len(self))[queries] if isinstance(queries, slice) else queries
        seen = torch.zeros(len(nodes), len(self), dtype=torch.bool)
        row_of: dict[int, int] = {}
        for row, node in enumerate(nodes):
            ancestor, path = node, []
            while ancestor >= 0 and ancestor not in row_of:
                path.append(ancestor)
                ancestor = self.parents[ancestor]
            if ancestor >= 0:  # what it sees is known
                seen[row] = seen[row_of[ancestor]]
            seen[row, path] = True
            row_of[node] = row
        if window is not None:
            seen &= self.positions[list(nodes), None] - self.positions[None, :] < window
        keys = seen.any(0).nonzero().flatten()
        blocked = ~seen[:, keys]
        first, stop = int(keys[0]), int(keys[-1]) + 1
        return AttentionTile(
            queries if isinstance(queries, slice) else slice(0, len(nodes)),
            slice(first, stop) if stop - first == keys.numel() else keys,
            blocked if bool(blocked.any()) else None,
        )


def pack(sequences: Sequence[Sequence[int]]) -> PackedTokens:
    """Pack token sequences into a prefix tree.

    Args:
        sequences: P sequences of token ids; lists, or 1-D integer tensors.

    Raises:
        ValueError: no sequence, an empty sequence, a token that is not an integer.
    """
    if isinstance(sequences, Tensor) and sequences.dim() != 2:
        raise ValueError(f"sequences has shape {tuple(sequences.shape)}, expected a list of token id lists")
    if not isinstance(sequences, (Sequence, Tensor)) or isinstance(sequences, str):
        raise ValueError(f"sequences is a {type(sequences).__name__}, expected a list of token id lists")
    lists = [_token_list(index, sequence) for index, sequence in enumerate(sequences)]
    if not lists:
        raise ValueError("sequences is empty, expected at least one token sequence")
    ids: list[int] = []
    parents: list[int] = []
    positions: list[int] = []
    last = [-1] * len(lists)
    children: dict[tuple[int, int], int] = {}
    # In sorted order sequences with a common prefix are neighbours: a tile then has few keys.
    for index in sorted(range(len(lists)), key=lambda i: lists[i]):
        node = -1
        for position, token in enumerate(lists[index]):
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(ids)
                ids.append(token)
                parents.append(node)
                positions.append(position)
            node = child
        last[index] = node
    return PackedTokens(
        torch.tensor(ids), torch.tensor(positions), tuple(parents), tuple(last), tuple(len(s) for s in lists)
    )


def _token_list(index: int, sequence: Sequence[int]) -> list[int]:
    tokens = sequence.tolist() if isinstance(sequence, Tensor) else sequence
    if not isinstance(tokens, (list, tuple)):
        kind = "one number" if isinstance(tokens, int) else f"a {type(tokens).__name__}"
        raise ValueError(f"sequence {index} is {kind}, expected a list of token ids")
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"sequence {index} holds {token!r}, expected integer token ids")
    if not tokens:
        raise ValueError(f"sequence {index} is empty, expected at least one token")
    return list(tokens)
