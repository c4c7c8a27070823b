"""The table of a decoder block's projections, and of the model families. Nothing else names a projection.

Code that needs "the projections that read one input", "the tensors of a block in a checkpoint" or "which half of a LoRA
is split over ranks" derives it from here. A new family is one more row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Projection:
    """A linear map of a block, under the names of transformers' Qwen2.

    Attributes:
        name: the module's own name, such as ``q_proj``.
        parent: the module of the block that holds it.
        rows, columns: the config's attributes that give its number of outputs and of inputs.
        stack: projections of one stack read the same input; their weights are stacked row-wise.
        split: which dimension of the weight tensor parallelism splits: 0, by outputs, or 1, by inputs
            (arXiv 1909.08053, section 3).
        token: its place among a block's tokens in Drag-and-Drop LLMs, where up comes before gate.
    """

    name: str
    parent: str
    rows: str
    columns: str
    stack: str
    split: int
    token: int

    @property
    def path(self) -> str:
        """Its module path within a block."""
        return f"{self.parent}.{self.name}"

    def shape(self, sizes: Any) -> tuple[int, int]:
        """(outputs, inputs) of the weight, for a config or any other object with its sizes as attributes."""
        return getattr(sizes, self.rows), getattr(sizes, self.columns)


# The order of every dict of LoRA tensors.
PROJECTIONS: Mapping[str, Projection] = {
    projection.name: projection
    for projection in (
        Projection("q_proj", "self_attn", "q_size", "hidden_size", "qkv", 0, 0),
        Projection("k_proj", "self_attn", "kv_size", "hidden_size", "qkv", 0, 1),
        Projection("v_proj", "self_attn", "kv_size", "hidden_size", "qkv", 0, 2),
        Projection("o_proj", "self_attn", "hidden_size", "q_size", "o", 1, 3),
        Projection("gate_proj", "mlp", "intermediate_size", "hidden_size", "gate_up", 0, 5),
        Projection("up_proj", "mlp", "intermediate_size", "hidden_size", "gate_up", 0, 4),
        Projection("down_proj", "mlp", "hidden_size", "intermediate_size", "down", 1, 6),
    )
}
TOKEN_ORDER = tuple(sorted(PROJECTIONS, key=lambda name: PROJECTIONS[name].token))
# {stack: its projections}, in the order in which a block applies them.
STACKS: Mapping[str, tuple[str, ...]] = {
    stack: tuple(name for name, projection in PROJECTIONS.items() if projection.stack == stack)
    for stack in dict.fromkeys(projection.stack for projection in PROJECTIONS.values())
}
# {norm of a block: the module whose input it produces}.
NORMS: Mapping[str, str] = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}


@dataclass(frozen=True)
class Family:
    """What sets one family of models apart.

    Attributes:
        biased: its projections with a bias; in each stack, either all have one or none.
        head_norms: {norm of each head: the projection that it follows}, applied before the rotary embedding.
    """

    model_type: str
    architecture: str
    biased: tuple[str, ...] = ()
    head_norms: Mapping[str, str] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM", biased=STACKS["qkv"]),
        Family("qwen3", "Qwen3ForCausalLM", head_norms={"q_norm": "q_proj", "k_norm": "k_proj"}),
    )
}


def projection_shape(sizes: Any, projection: str) -> tuple[int, int]:
    """(out_features, in_features) of a projection's weight."""
    return PROJECTIONS[projection].shape(sizes)


def stack_shape(sizes: Any, stack: str) -> tuple[int, int]:
    """(outputs, inputs) of a stack's weights, stacked row-wise."""
    shapes = [projection_shape(sizes, name) for name in STACKS[stack]]
    return sum(rows for rows, _ in shapes), shapes[0][1]


def block_shapes(sizes: Any, family: Family) -> dict[str, tuple[int, ...]]:
    """{name within a block: shape} of all its tensors in a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for norm, parent in NORMS.items():
        shapes[f"{norm}.weight"] = (sizes.hidden_size,)
        for projection in PROJECTIONS.values():
            if projection.parent == parent:
                shapes[f"{projection.path}.weight"] = projection.shape(sizes)
                if projection.name in family.biased:
                    shapes[f"{projection.path}.bias"] = projection.shape(sizes)[:1]
        for head_norm, normed in family.head_norms.items():
            if PROJECTIONS[normed].parent == parent:
                shapes[f"{parent}.{head_norm}.weight"] = (sizes.head_dim,)
    return shapes
