"""Token sequences packed into one row: a prefix tree, its positions, who attends to whom, where to read out.

A token's hidden state depends on its own prefix only, so tokens that share a prefix are computed once. The
sequences are laid out as a prefix tree, one node per distinct prefix, every node after its parent: a node's depth
is its position, and it attends to its ancestors and itself. The result is exact.

Attention over the row is cut into tiles of consecutive queries. A tile's keys are the ancestors of its queries
and nothing else, so the work per token does not grow with the number of sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Qwen2Config
from .memory import to_device

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TILE = 64  # queries per tile: large enough for a GEMM, small enough that few keys are masked out


@dataclass(frozen=True)
class AttentionTile:
    """Consecutive queries, and the keys that any of them attends to.

    ``keys`` is a slice where the keys are consecutive (nothing is copied then), else an index tensor (n_keys,).
    The first ``free`` keys are seen by all queries. ``blocked`` (n_queries, n_keys − free) bool is true where a query
    must not see one of the others; None where all see all. For several rows at once it is (rows, n_queries, n_keys −
    free).
    """

    queries: slice
    keys: slice | Tensor
    free: int
    blocked: Tensor | None

    def to(self, device: torch.device) -> AttentionTile:
        keys = to_device(self.keys, device) if isinstance(self.keys, Tensor) else self.keys
        blocked = None if self.blocked is None else to_device(self.blocked, device)
        return AttentionTile(self.queries, keys, self.free, blocked)


@dataclass(frozen=True)
class PackedTokens:
    """P token sequences as one row of S tokens. Made by :func:`pack`; held on the CPU.

    Attributes:
        input_ids: (S,) int64, the token of every node.
        positions: (S,) int64, the depth of every node.
        end: (S,) int64, one past each node's subtree: node j is i or an ancestor of it exactly when j <= i < end[j].
        paths: the nodes (length,) int64 of each sequence, from its first token to its last.
    """

    input_ids: Tensor
    positions: Tensor
    end: Tensor
    paths: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The P sequences' lengths; their sum is the number of tokens that would be computed without the tree."""
        return tuple(map(len, self.paths))

    @functools.cached_property
    def last(self) -> tuple[int, ...]:
        """The node of each of the P sequences' last token."""
        return tuple(self._last_nodes.tolist())

    @functools.cached_property
    def _last_nodes(self) -> Tensor:
        return torch.stack([path[-1] for path in self.paths])

    @functools.cached_property
    def _all_nodes(self) -> Tensor:
        return torch.cat(self.paths)

    @functools.cached_property
    def parents(self) -> tuple[int, ...]:
        """The node before each node in its sequence, −1 for a first token."""
        parents = torch.full((len(self),), -1)
        for path in self.paths:
            parents[path[1:]] = path[:-1]
        return tuple(parents.tolist())

    def check_fits(self, config: Qwen2Config) -> None:
        """Raises ``ValueError`` for an id outside the vocabulary, or a sequence longer than max_position_embeddings."""
        check_ids(self.input_ids, config.vocab_size)
        longest = max(self.lengths)
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"sequence {self.lengths.index(longest)} has {longest} tokens, expected at most "
                f"max_position_embeddings = {config.max_position_embeddings}"
            )

    def reads(self, read: str) -> Tensor:
        """The node of each hidden state that is read: the sequences' last tokens, or ``"all"`` tokens one sequence
        after the other.
        """
        return self._last_nodes if read == "last" else self._all_nodes

    def padded(self, size: int) -> PackedTokens:
        """The same row padded to ``size`` nodes: those added are one-token texts that nothing reads."""
        more = torch.arange(len(self), size)
        none = torch.zeros_like(more)
        ids, positions, end = torch.cat((self.input_ids, none)), torch.cat((self.positions, none)), self.end
        return PackedTokens(ids, positions, torch.cat((end, more + 1)), self.paths)

    def tiles(self, window: int | None = None, size: int = TILE) -> list[AttentionTile]:
        """Attention of the whole row, ``size`` queries to a tile.

        ``window``: as in :meth:`Qwen2Config.window`, a node sees only ancestors fewer than ``window`` positions back.
        """
        return self._tiles(torch.arange(len(self)), window, size)

    def readout_tiles(self, nodes: Tensor, window: int | None = None, size: int = TILE) -> list[AttentionTile]:
        """Attention of the queries ``nodes`` only, in ascending order; the tiles number them from 0."""
        return self._tiles(nodes, window, size)

    def _tiles(self, nodes: Tensor, window: int | None, size: int) -> list[AttentionTile]:
        starts = range(0, len(nodes), size)
        return [self._tile(nodes[start : start + size], start, window) for start in starts]

    def _tile(self, nodes: Tensor, start: int, window: int | None) -> AttentionTile:
        root, stop = int(self._roots[nodes[0]]), int(nodes[-1]) + 1  # no query has an ancestor before this root
        query, key = nodes[:, None], torch.arange(root, stop)
        seen = (key <= query) & (query < self.end[root:stop])
        if window is not None:
            seen &= self.positions[nodes, None] - self.positions[root:stop] < window
        keys = seen.any(0).nonzero().flatten()
        blocked = ~seen[:, keys]
        anywhere = blocked.any(0).nonzero()
        free = int(anywhere[0]) if len(anywhere) else len(keys)
        first, last = root + int(keys[0]), root + int(keys[-1])
        return AttentionTile(
            slice(start, start + len(nodes)),
            slice(first, last + 1) if last + 1 - first == keys.numel() else root + keys,
            free,
            blocked[:, free:].clone() if free < len(keys) else None,
        )

    @functools.cached_property
    def _roots(self) -> Tensor:
        """(S,), the first token of each node's sequence."""
        return torch.where(self.positions == 0, torch.arange(len(self)), 0).cummax(0).values


def joint_tiles(
    trees: Sequence[PackedTokens], window: int | None = None, size: int = TILE
) -> list[AttentionTile]:
    """Attention of several rows of equal length, each over its own texts: tiles at the same places in all of them."""
    n, tiles = len(trees[0]), list[AttentionTile]()
    ends, positions = (torch.stack([getattr(tree, name) for tree in trees]) for name in ("end", "positions"))
    roots = torch.stack([tree._roots for tree in trees])
    for start in range(0, n, size):
        stop = min(start + size, n)
        first = int(roots[:, start].min())  # no query has an ancestor before the root of its row's first query
        query, key = torch.arange(start, stop)[:, None], torch.arange(first, stop)
        seen = (key <= query) & (query < ends[:, None, first:stop])
        if window is not None:
            seen &= positions[:, start:stop, None] - positions[:, None, first:stop] < window
        there = seen.any(0).any(0).nonzero().flatten()
        low, high = int(there[0]), int(there[-1]) + 1
        blocked = ~seen[:, :, low:high]
        anywhere = blocked.any(0).any(0).nonzero()
        free = int(anywhere[0]) if len(anywhere) else high - low
        mask = blocked[:, :, free:].clone() if free < high - low else None
        tiles.append(AttentionTile(slice(start, stop), slice(first + low, first + high), free, mask))
    return tiles


def pack(sequences: Sequence[Sequence[int] | Tensor]) -> PackedTokens:
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
    rows = [token_row(f"sequence {index}", sequence) for index, sequence in enumerate(sequences)]
    if not rows:
        raise ValueError("sequences is empty, expected at least one token sequence")
    return _tree(rows)


def pack_each(sequences: Sequence[Sequence[Sequence[int] | Tensor]]) -> tuple[PackedTokens, ...]:
    """Pack the token sequences of each adapter separately: G adapters, each with its own prefix tree.

    Nothing is padded: the trees may differ in size, and a prefix that an adapter's sequences share is computed once.

    Args:
        sequences: for each of G adapters, what :func:`pack` takes.

    Raises:
        ValueError: no adapter, or as for :func:`pack`; the message names the adapter.
    """
    if not isinstance(sequences, Sequence) or isinstance(sequences, str) or not sequences:
        what = "empty" if isinstance(sequences, Sequence) and not sequences else f"a {type(sequences).__name__}"
        raise ValueError(f"sequences is {what}, expected a list of token sequences for each adapter")
    packed = []
    for index, own in enumerate(sequences):
        try:
            packed.append(pack(own))
        except ValueError as error:
            raise ValueError(f"adapter {index}: {error}") from None
    return tuple(packed)


def _tree(rows: Sequence[Tensor]) -> PackedTokens:
    """Depth first, in sorted order: sequences with a common prefix are adjacent, so that a tile has few keys."""
    lists = [row.tolist() for row in rows]
    ids, positions, ends, n = list[Tensor](), list[Tensor](), torch.empty(sum(map(len, rows)), dtype=torch.int64), 0
    paths = [torch.empty(0, dtype=torch.int64)] * len(rows)
    before, path = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    for index in sorted(range(len(rows)), key=lists.__getitem__):
        row = rows[index]
        shared = _common_prefix(before, row)
        ends[path[shared:]] = n  # their subtrees end where another branch begins
        new = len(row) - shared
        path = torch.cat((path[:shared], torch.arange(n, n + new)))
        ids.append(row[shared:])
        positions.append(torch.arange(shared, len(row)))
        paths[index], before, n = path, row, n + new
    ends[path] = n
    return PackedTokens(torch.cat(ids), torch.cat(positions), ends[:n].clone(), tuple(paths))


def _common_prefix(one: Tensor, other: Tensor) -> int:
    n = min(len(one), len(other))
    differ = (one[:n] != other[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ``ValueError`` for an id outside the vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary, expected 0 to {vocab_size - 1}")


def token_row(name: str, sequence: Sequence[int] | Tensor, least: int = 1) -> Tensor:
    """A sequence of at least ``least`` tokens as int64 on the CPU, or a ``ValueError`` that begins with ``name``."""
    if isinstance(sequence, Tensor) and sequence.dim() == 1 and sequence.dtype in _INTEGERS and len(sequence) >= least:
        return sequence.cpu().to(torch.int64)
    tokens = sequence.tolist() if isinstance(sequence, Tensor) else sequence
    if not isinstance(tokens, (list, tuple)):
        kind = "one number" if isinstance(tokens, int) else f"a {type(tokens).__name__}"
        raise ValueError(f"{name} is {kind}, expected a list of token ids")
    if not set(map(type, tokens)) <= {int}:
        odd = next((token for token in tokens if not isinstance(token, int) or isinstance(token, bool)), None)
        if odd is not None or None in tokens:
            raise ValueError(f"{name} holds {odd!r}, expected integer token ids")
    if len(tokens) < least:
        what = f"has {len(tokens)} tokens" if tokens else "is empty"
        raise ValueError(f"{name} {what}, expected at least {least if least > 1 else 'one'} token{'s' * (least > 1)}")
    try:
        return torch.tensor(tokens, dtype=torch.int64)
    except (OverflowError, RuntimeError):
        raise ValueError(f"{name} holds {max(tokens, key=abs)}, expected token ids") from None
