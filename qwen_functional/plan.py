"""All that a step depends on besides values: made once, and kept by a caller that repeats the step.

A plan depends on the sizes of the model, the tokens, the LoRA and the read-outs, on which gradients are wanted and on
what is kept. Token ids, positions, who attends to whom and which rows are read are tables on the device;
:meth:`Plan.fill` overwrites them for other tokens of the same sizes, so that nothing is captured again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import choose
from .config import Qwen2Config
from .cost import Cost
from .dtypes import accumulation_dtype
from .heads import BoundHidden, Head, Hidden
from .lora import Lora, parse_name
from .memory import free_bytes
from .packing import PackedTokens
from .stacking import Side
from .tables import Tables
from .weights import Qwen2Weights

if TYPE_CHECKING:
    from .backends.graph import Captured

Tokens = PackedTokens | Sequence[PackedTokens]  # shared by all adapters, or one for each
CHECKPOINTS = ("none", "block", "auto")
READS = ("last", "all")


@dataclass(frozen=True)
class Group:
    """Adapters that go through a block together, and the row of tokens that they share, or the rows of each.

    ``at``: the place of their read-out rows among those of all adapters, (G, R, H), or (1, ΣR, H) where each adapter
    has its own row.
    """

    adapters: slice
    tables: Tables
    at: tuple[slice, slice]


class Plan:
    """A step of :func:`forward_vjp` on tokens and a LoRA of given sizes.

    Args:
        config, weights: the base model.
        tokens: P sequences, from :func:`pack`, which give the sizes and the first values of the tables; or those of
            each adapter, from :func:`pack_each`, and then the plan is for these texts alone.
        lora: G adapters, for their places, ranks, scales and dtypes.
        layer, read, heads, wrt, checkpoint, memory_budget, graph: as for :func:`forward_vjp`.

    Attributes:
        backend: what computes the step.
        groups: which adapters go through a block together.
        n_keep: how many of the highest blocks are kept whole.
        cost: its bytes and FLOP.

    Raises:
        ValueError: as for :func:`forward_vjp`.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        tokens: Tokens,
        lora: Lora | None = None,
        *,
        layer: int | Sequence[int] = -1,
        read: str = "last",
        heads: Sequence[Head] | None = None,
        wrt: Collection[str] | None = None,
        checkpoint: str = "auto",
        memory_budget: int | None = None,
        graph: bool | str = "auto",
    ) -> None:
        self.own_texts = not isinstance(tokens, PackedTokens)
        trees = (tokens,) if isinstance(tokens, PackedTokens) else tuple(tokens)
        lora = bare(tokens) if lora is None else lora
        check_options(checkpoint, read, graph)
        if self.own_texts and len(trees) != lora.n_adapters:
            raise ValueError(f"tokens are for {len(trees)} adapters, expected {lora.n_adapters} as in the LoRA")
        self.single_head = heads is None
        self.heads = (Hidden(layer, read),) if heads is None else tuple(heads)
        if not self.heads:
            raise ValueError("heads is empty, expected at least one")
        self.layers = tuple(dict.fromkeys(one for head in self.heads for one in checked_layers(config, head.layer)))
        self.weights = weights
        self.parallel = weights.parallel
        self.config = config if self.parallel is None else self.parallel.local_config(config)
        self.n_adapters, self.batched, self.structure = lora.n_adapters, lora.batched, lora.structure
        self.wanted = _wanted(lora, wrt)
        self.backend = choose(self.config, weights, lora)
        self.graph = False if self.own_texts or heads is not None else graph  # sizes that seldom recur
        self.captured: Captured | None = None
        self.uses = self.fills = 0
        config = self.config
        self.top = config.num_hidden_layers - 1 if -1 in self.layers else max(self.layers)
        self.lowest = min((layer for (layer, _), _ in self.wanted), default=self.top + 1)
        compute = weights.compute_dtype
        self._sizes = tuple(map(len, trees))
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be refilled outside that mode
            self.tables, places = self._made(trees)
            self.bound = [head.bind(self, own) for head, own in zip(self.heads, places, strict=True)]
        self._n_reads = [len(own) for own in places]
        self.groups = self._grouped(compute)
        self.n_rows = sum(len(tables.rows) for tables in self.tables)
        ranks = {key: rank for key, rank, *_ in self.structure}
        casts_B = any(B is not compute for _, _, _, _, B, *_ in self.structure)
        n_tokens = sum(tables.ids.numel() for tables in self.tables)  # with padding
        self.cost = Cost(
            config, self.n_adapters, n_tokens / len(trees), (n_tokens if self.joint else self.n_rows) / len(trees),
            compute.itemsize, ranks,
            top=self.top, lowest=self.lowest, kept_numbers=self._kept_numbers(),
            copies_adapters=self.backend.captures,
            bound="" if weights.streamed else "AB" if casts_B else "A",
            casts_weights=not weights.streamed and weights.packed is None and weights.dtype is not compute,
            own_texts=self.own_texts,
        )  # fmt: skip
        self.n_blocks = max(0, self.top + 1 - self.lowest)
        self.n_keep = self._n_blocks_to_keep(checkpoint, memory_budget)

    def _kept_numbers(self) -> tuple[float, float]:
        """:meth:`Plain.kept_numbers` of the block that keeps most, averaged over adapters."""
        sums = [0, 0]
        for tables in self.tables:
            n_rows, n_tokens = (len(tables.ids), tables.ids.shape[1]) if tables.joint else (1, len(tables.ids))
            rows = {id(row): row for row in tables.row_at[min(self.lowest, self.top) :]}.values()  # by window
            numbers = max(self.backend.kept_numbers(self.config, row.tiles, n_tokens) for row in rows)
            sums = [total + n_rows * number for total, number in zip(sums, numbers, strict=True)]
        return sums[0] / len(self._sizes), sums[1] / len(self._sizes)

    def _n_blocks_to_keep(self, checkpoint: str, memory_budget: int | None) -> int:
        if checkpoint != "auto":
            return self.n_blocks if checkpoint == "none" else 0
        budget = free_bytes(self.weights.device) // 2 if memory_budget is None else memory_budget
        return self.cost.blocks_within(budget)

    def _made(self, trees: Sequence[PackedTokens]) -> tuple[list[Tables], list[Tensor]]:
        """The tables of each row, and for each head the index of each of its reads among all rows that are read out."""
        for index, tokens in enumerate(trees):
            try:
                tokens.check_fits(self.config)
            except ValueError as error:
                raise ValueError(f"adapter {index}: {error}" if self.own_texts else str(error)) from None
        nodes, places = _places([[head.reads(tree, index) for head in self.heads] for index, tree in enumerate(trees)])
        # Where all tokens are read, the highest block needs no separate rows.
        self.all_rows = all(len(read) == len(tree) for read, tree in zip(nodes, trees, strict=True))
        self._together = [slice(index, index + 1) for index in range(len(trees))]
        if self.own_texts and self.parallel is None:
            self._together = self.backend.together(self._sizes)
        # Rows that are computed together are read out at the end.
        self.joint = any(own.stop - own.start > 1 for own in self._together)
        tables = []
        for own in self._together:
            if own.stop - own.start == 1:
                tables.append(self._tables(trees[own.start], nodes[own.start]))
            else:
                size = max(self._sizes[own])
                tables.append(self._tables([tree.padded(size) for tree in trees[own]], nodes[own]))
        return tables, places

    def _tables(self, tokens: PackedTokens | Sequence[PackedTokens], read: Tensor | Sequence[Tensor]) -> Tables:
        dtype = accumulation_dtype(self.weights.compute_dtype)
        return Tables(
            self.config, tokens, read, self.top, apart=self.apart, dtype=dtype, device=self.weights.device,
            by_tile=not self.backend.captures,
        )  # fmt: skip

    @property
    def apart(self) -> bool:
        """Whether the top block continues with the read-out rows only."""
        return not self.all_rows and not self.joint

    def _grouped(self, compute: torch.dtype) -> list[Group]:
        if self.own_texts:
            groups, first = [], 0
            for own, tables in zip(self._together, self.tables, strict=True):
                last = first + len(tables.rows)
                groups.append(Group(own, tables, (slice(None), slice(first, last))))
                first = last
            return groups
        chunks = [slice(0, self.n_adapters)]
        if self.parallel is None:  # with a single chunk, ranks wait only once for each sum
            chunks = self.backend.chunks(self.config, self._sizes[0], self.n_adapters, compute)
        return [Group(chunk, self.tables[0], (chunk, slice(None))) for chunk in chunks]

    def fits(self, tokens: Tokens, lora: Lora | None) -> bool:
        """Whether these have the sizes that the plan was made for."""
        lora = bare(tokens) if lora is None else lora
        trees = (tokens,) if isinstance(tokens, PackedTokens) else tuple(tokens)
        sizes = tuple(map(len, trees)), lora.n_adapters, lora.batched, lora.structure
        if sizes != (self._sizes, self.n_adapters, self.batched, self.structure):
            return False
        reads = (sum(len(head.reads(tree, index)) for index, tree in enumerate(trees)) for head in self.heads)
        return list(reads) == self._n_reads

    def fill(self, tokens: PackedTokens) -> None:
        """Replace the tokens with others of the same sizes: as many tokens, sequences, and rows that are read.

        Raises:
            ValueError: other sizes, tokens that the model cannot take, or a plan for each adapter's own texts or for
                other heads than a single :class:`Hidden`.
        """
        (bound, *others), (tables, *_), (head, *_) = self.bound, self.tables, self.heads
        if self.own_texts or others or not isinstance(bound, BoundHidden):
            raise ValueError("the plan is for each adapter's texts or for other heads, expected one for hidden states")
        read = head.reads(tokens, 0)
        (nodes,), _ = _places([[read]])
        sizes = len(tokens), len(read), len(nodes)
        if sizes != (self._sizes[0], len(bound.row_of), self.n_rows):
            expected = f"{self._sizes[0]} tokens, {len(bound.row_of)} sequences and {self.n_rows} rows that are read"
            found = "{} tokens, {} sequences and {} rows that are read".format(*sizes)
            raise ValueError(f"tokens have {found}, expected {expected} as in the plan")
        with torch.inference_mode(False), torch.no_grad():
            (made,), (new,) = self._made((tokens,))
            bound.row_of.copy_(new)
            tables.fill(made, tokens, nodes)
        self.fills += 1

    def release(self) -> None:
        """Release what was captured, and its memory; later uses capture it again."""
        self.captured, self.uses = None, 0


def _places(reads: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """For each row of tokens, the nodes that any head reads, ascending; for each head, where its reads are among them.

    Args:
        reads: for each row and each head, the nodes; on the CPU.
    """
    nodes = [torch.cat(list(of_row)).unique() for of_row in reads]
    places: list[list[Tensor]] = [[] for _ in reads[0]]
    first = 0
    for of_row, read in zip(reads, nodes, strict=True):
        for own, asked in zip(places, of_row, strict=True):
            own.append(first + torch.searchsorted(read, asked))
        first += len(read)
    return nodes, [torch.cat(own) for own in places]


def bare(tokens: Tokens) -> Lora:
    """No adapters: the bare model, once, or once for each adapter's own texts."""
    own = not isinstance(tokens, PackedTokens)
    return Lora({}, len(tokens) if own else 1, batched=own)


def _wanted(lora: Lora, wrt: Collection[str] | None) -> frozenset[Side]:
    if wrt is None:
        return frozenset((key, side) for key in lora.pairs for side in "AB")
    names = frozenset(lora.names())
    wanted = set()
    for name in wrt:
        if name not in names:
            raise ValueError(f"wrt names {name!r}, expected names of the bound LoRA tensors")
        parsed = parse_name(name)
        assert parsed is not None
        layer, projection, side = parsed
        wanted.add(((layer, projection), side))
    return frozenset(wanted)


def checked_layers(config: Qwen2Config, layer: int | Sequence[int]) -> tuple[int, ...]:
    """``layer`` of :func:`forward_vjp` as a tuple, or a ``ValueError`` for one that the model lacks."""
    highest = config.num_hidden_layers - 1
    if not isinstance(layer, (int, Sequence)):
        raise ValueError(f"layer is {layer!r}, expected -1, 0 to {highest}, or several of these")
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if not layers:
        raise ValueError("layer is empty, expected at least one layer")
    for one in layers:
        if not isinstance(one, int) or not -1 <= one <= highest:
            raise ValueError(f"layer is {one!r}, expected -1 or 0 to {highest}")
    return layers


def check_options(checkpoint: str = "auto", read: str = "last", graph: Any = "auto") -> None:
    """Raises ``ValueError`` for an option that :func:`forward_vjp` does not know."""
    known: tuple[tuple[str, Any, tuple], ...] = (
        ("checkpoint", checkpoint, CHECKPOINTS), ("read", read, READS), ("graph", graph, ("auto", True, False)),
    )  # fmt: skip
    for name, value, choices in known:
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {choices}")


class Plans:
    """The plans of one caller, keyed by what they depend on; the most recently used are kept.

    Args:
        make: makes the plan for a LoRA and the names that are wanted.
        most: how many are kept; of captured ones, which hold memory, ``most_captured``.
    """

    def __init__(self, make: Callable[..., Plan], most: int = 16, most_captured: int = 4) -> None:
        self._make, self._most, self._most_captured = make, most, most_captured
        self._plans: dict[tuple, Plan] = {}

    def __call__(self, lora: Lora | None, wanted: Sequence[str] | None) -> Plan:
        key = (None, None, ()) if lora is None else (lora.n_adapters, lora.batched, lora.structure)
        key = (*key, None if wanted is None else tuple(wanted))
        plan = self._plans.pop(key, None)
        if plan is None:
            plan = self._make(lora, wrt=wanted)
        self._plans[key] = plan
        while len(self._plans) > self._most:
            self._plans.pop(next(iter(self._plans))).release()
        captured = [plan for plan in self._plans.values() if plan.captured is not None]
        for old in captured[: max(0, len(captured) - self._most_captured)]:
            if old is not plan:
                old.release()
        return plan

    def release(self) -> None:
        """Drop all of them, and release the memory of those that were captured."""
        for plan in self._plans.values():
            plan.release()  # a vjp may still hold the plan
        self._plans.clear()
