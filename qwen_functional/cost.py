"""What a step computes and holds: one count of FLOP and bytes for ``checkpoint="auto"``, benchmarks and plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .architecture import STACKS, projection_shape, stack_shape
from .config import Qwen2Config
from .stacking import Key

ACCUMULATED = 4  # bytes of the residual stream's numbers; 8 for float64


@dataclass(frozen=True)
class Cost:
    """The cost of G adapters on S tokens each, R of which are read out, in one pass; S and R are averages where
    adapters have texts of their own.

    Attributes:
        config: that of one rank's part of the model.
        itemsize: bytes of the numbers that are multiplied.
        ranks: the LoRA rank of each adapted (layer, projection).
        top, lowest: the highest block that is computed, and the lowest that the gradient passes through.
        kept_numbers: how many numbers a block that is kept whole holds for each adapter, in the accumulation and in the
            compute dtype; see :meth:`Plain.kept_numbers`.
        copies_adapters: whether A and B of all blocks are held a second time, in the compute dtype.
        bound: which of its adapters' A and B a kept block holds a second time, where not all blocks do: A, which is
            scaled and stacked, and B, where its dtype is not the compute dtype; none where weights are streamed.
        casts_weights: whether a block that is held holds its weights a second time, in the compute dtype.
        own_texts: whether adapters share no token, not even below the first adapted block.
    """

    config: Qwen2Config
    adapters: int
    tokens: float
    rows: float
    itemsize: int
    ranks: Mapping[Key, int]
    top: int
    lowest: int
    kept_numbers: tuple[float, float]
    copies_adapters: bool = False
    bound: str = "AB"
    casts_weights: bool = False
    own_texts: bool = False

    @property
    def accumulated(self) -> int:
        return max(ACCUMULATED, self.itemsize)

    @property
    def n_blocks(self) -> int:
        return max(0, self.top + 1 - self.lowest)

    @property
    def few(self) -> bool:
        """Whether the highest block computes the read-out rows only, except for k and v."""
        return self.rows < self.tokens

    # Elements

    def base_elements(self) -> int:
        """Elements of a block's weight matrices."""
        return sum(math.prod(stack_shape(self.config, stack)) for stack in STACKS)

    def adapter_elements(self, halves: str = "AB") -> int:
        """Elements of the A, the B or both of one adapter."""
        return sum(self._elements(halves).values())

    def _elements(self, halves: str) -> dict[int, int]:
        """{layer: elements of an adapter's halves in it}."""
        elements: dict[int, int] = {}
        for (layer, name), rank in self.ranks.items():
            outputs, inputs = projection_shape(self.config, name)
            each = inputs * ("A" in halves) + outputs * ("B" in halves)
            elements[layer] = elements.get(layer, 0) + rank * each
        return elements

    # Bytes

    def input_bytes(self) -> int:
        """Bytes that are always kept: the inputs of blocks that the gradient passes through, and what is read out."""
        if not self.n_blocks:
            return 0
        rows = round(self.adapters * (self.n_blocks * self.tokens + self.rows))
        return rows * self.config.hidden_size * self.accumulated

    def block_bytes(self) -> int:
        """Bytes that a block kept whole holds besides its input; for the layer with the largest adapters.

        Its copies of the adapters count where they are held for it alone.
        """
        accumulated, computed = self.kept_numbers
        accumulated += 2 * self.tokens  # for rstd of its norms
        ranks: dict[int, int] = {}
        for (layer, _), rank in self.ranks.items():
            ranks[layer] = ranks.get(layer, 0) + rank
        computed += self.tokens * self._most(ranks)
        if not self.copies_adapters:
            computed += self._most(self._elements(self.bound))
        cast = 0 if self.copies_adapters else self._cast_bytes()
        return round(self.adapters * (accumulated * self.accumulated + computed * self.itemsize)) + cast

    def _cast_bytes(self) -> int:
        biases = sum(projection_shape(self.config, name)[0] for name in self.config.family.biased)
        return (self.base_elements() + biases) * self.itemsize if self.casts_weights else 0

    def _most(self, by_layer: Mapping[int, int]) -> int:
        return max((n for layer, n in by_layer.items() if self.lowest <= layer <= self.top), default=0)

    def _top_bytes(self) -> int:
        """Bytes by which the highest block exceeds the others: what q reads separately, less what its few rows save.

        The result may be negative, as fewer rows enter its MLP; its other savings only offset what q reads.
        """
        if not self.few:
            return 0
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        beyond = self.rows * hidden - (self.tokens - self.rows) * (hidden + 2 * intermediate)
        cast = math.prod(stack_shape(self.config, "qkv")) if self.casts_weights else 0  # cast whole for q, and for k|v
        less = round(self.adapters * (self.tokens - self.rows)) * hidden * self.accumulated
        return (round(self.adapters * max(0, beyond)) + cast) * self.itemsize - less

    def adapter_bytes(self) -> int:
        """Bytes of all A and B in the compute dtype, where they are held a second time, and the weights with them."""
        if not self.copies_adapters:
            return 0
        return self.adapters * self.adapter_elements() * self.itemsize + (self.top + 1) * self._cast_bytes()

    def kept_bytes(self, n_keep: int | None = None) -> int:
        """Bytes that the way back needs, where the ``n_keep`` highest blocks are kept whole; by default all."""
        n_keep = self.n_blocks if n_keep is None else n_keep
        whole = n_keep * self.block_bytes() + self._top_bytes() if n_keep else 0
        return self.input_bytes() + self.adapter_bytes() + whole

    def blocks_within(self, budget: int) -> int:
        """How many blocks can be kept whole in ``budget`` bytes."""
        left = max(0, budget - self.kept_bytes(0) - self._top_bytes())
        return min(self.n_blocks, left // max(1, self.block_bytes()))

    # FLOP

    def base_flop(self, n_keep: int | None = None, *, forwards: bool = True, backwards: bool = True) -> int:
        """FLOP of products with base weights, forward and backward, on a backend that computes q separately.

        All adapters share the products of the first adapted stack and below. The highest block multiplies only the
        read-out rows, except for k and v. On the way back nothing below the lowest adapted stack is needed; and blocks
        that are not among the ``n_keep`` highest multiply again, except for down_proj, whose output no vjp reads.
        """
        n_keep = self.n_blocks if n_keep is None else n_keep
        first = min((layer for layer, _ in self.ranks), default=self.top + 1)
        total = 0.0
        for layer in range(self.top + 1):
            inner = False  # whether an adapted stack of the block has been passed
            for stack in STACKS:
                work = sum(rows * area for rows, area in self._products(layer, stack))
                apart = self.own_texts or layer > first or (layer == first and inner)
                there = work * (self.adapters if apart else 1)
                if forwards:
                    total += there
                if backwards and (layer > self.lowest or (layer == self.lowest and inner)):
                    total += work * self.adapters
                if backwards and self.lowest <= layer <= self.top - n_keep and stack != "down":
                    total += there
                inner |= any((layer, name) in self.ranks for name in STACKS[stack])
        return round(2 * total)

    def _products(self, layer: int, stack: str) -> Iterator[tuple[float, int]]:
        """(rows of one adapter, elements of the weight) of a stack's products."""
        rows = self.rows if layer == self.top and self.few else self.tokens
        _, *others = STACKS["qkv"]  # k and v
        for name in STACKS[stack]:
            yield self.tokens if name in others else rows, math.prod(projection_shape(self.config, name))

    def low_rank_flop(self) -> int:
        """FLOP of the adapters' own products: two forward and four backward."""
        return round(6 * self.adapter_elements() * self.adapters * self.tokens)
