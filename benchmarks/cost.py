"""What a step of the engine costs on a mesh: a model with a few constants, which ``scale_plan.py`` measures.

What a rank multiplies and keeps is counted by :class:`qwen_functional.cost.Cost`, as the engine itself does; here come
passes over memory by what is computed element by element, and sums over ranks. A constant turns each into seconds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qwen_functional import LoraSpec, Qwen2Config
from qwen_functional.backends.plain import Plain
from qwen_functional.cost import Cost
from qwen_functional.lora import parse_name
from qwen_functional.packing import TILE
from qwen_functional.parallel import splits

FLOAT32 = 4
# Times that a token's numbers are read or written in a block, forwards and back, counted in block.py and ops/.
PASSES_INTERMEDIATE, PASSES_HIDDEN, PASSES_HEADS = 30, 56, 20


@dataclass(frozen=True)
class Constants:
    """Of one device, while its neighbours on the host work as well.

    Attributes:
        gemm: FLOP/s of products with base weights; low_rank: of the adapters' own.
        memory: bytes/s of what is computed element by element.
        sum_bytes: bytes/s of a sum over two ranks, of the tensor's own size.
        sum_latency: seconds that the smallest sum takes.
    """

    gemm: float
    low_rank: float
    memory: float
    sum_bytes: float
    sum_latency: float


@dataclass(frozen=True)
class MeshStep:
    """A step: G adapters on a mesh, whose ``"dp"`` dimension splits the adapters and ``"tp"`` the model.

    Attributes:
        tokens: of the probes' prefix tree; read: its nodes that are read out.
        itemsize: bytes of a base weight, and of what is multiplied.
        per_pass: adapters at once; None for all of a rank's.
    """

    config: Qwen2Config
    spec: LoraSpec
    adapters: int
    tokens: int
    read: int
    itemsize: int = 2
    data_parallel: int = 1
    tensor_parallel: int = 1
    checkpoint: str = "none"
    per_pass: int | None = None

    def __post_init__(self) -> None:
        if self.tensor_parallel not in splits(self.config):
            raise ValueError(f"tensor parallelism over {self.tensor_parallel} ranks, expected {splits(self.config)}")

    @property
    def local_adapters(self) -> int:
        """Of the rank that has the most."""
        return -(-self.adapters // self.data_parallel)

    @property
    def passes(self) -> list[int]:
        """Adapters of each pass of a rank."""
        n, most = self.local_adapters, self.per_pass or self.local_adapters
        return [min(most, n - start) for start in range(0, n, most)]

    @property
    def n_keep(self) -> int | None:
        """How many blocks are kept whole; None for all."""
        return 0 if self.checkpoint == "block" else None

    def cost(self, adapters: int) -> Cost:
        """Of so many adapters in one pass on a rank."""
        c, t = self.config, self.tensor_parallel
        local = dataclasses.replace(
            c, num_attention_heads=c.num_attention_heads // t, num_key_value_heads=c.num_key_value_heads // t,
            head_dim=c.head_dim, intermediate_size=c.intermediate_size // t,
        )  # fmt: skip
        shapes = ((parse_name(name), shape) for name, shape in self.spec.shapes(self.config).items())
        ranks = {name[:2]: shape[0] for name, shape in shapes if name is not None and name[2] == "A"}
        accumulated, computed = Plain().kept_numbers(local, (), self.tokens)
        # A tile of a prefix tree sees about as many keys as it has queries.
        computed += self.tokens * TILE * local.num_attention_heads
        return Cost(
            local, adapters, self.tokens, self.read, self.itemsize, ranks, top=c.num_hidden_layers - 1,
            lowest=min(layer for layer, _ in ranks), kept_numbers=(accumulated, computed),
            bound="A" if self.itemsize == FLOAT32 else "AB",  # LoRA tensors are float32
        )  # fmt: skip

    def gemm_flop(self) -> float:
        """Of products with base weights on a rank."""
        return float(sum(self.cost(n).base_flop(self.n_keep) for n in self.passes))

    def low_rank_flop(self) -> float:
        """Of the adapters' own products on a rank."""
        return float(self.cost(self.local_adapters).low_rank_flop())

    def adapter_elements(self) -> int:
        """Of one adapter, whole."""
        return dataclasses.replace(self, tensor_parallel=1).cost(1).adapter_elements()

    def memory_bytes(self) -> float:
        """Read and written by what is computed element by element."""
        c, t = self.config, self.tensor_parallel
        each = PASSES_INTERMEDIATE * c.intermediate_size // t * self.itemsize
        each += PASSES_HIDDEN * c.hidden_size * FLOAT32
        each += PASSES_HEADS * (c.q_size + 2 * c.kv_size) // t * FLOAT32
        return float(each) * (c.num_hidden_layers - 1) * self.local_adapters * self.tokens

    def sums(self) -> list[float]:
        """Bytes of each sum over the tensor-parallel ranks, the gradients' last; data-parallel ones take none."""
        # Two a block each way, and one more of those that are computed again; no dx of the first block's q, k and v.
        n_sums = (5 if self.n_keep == 0 else 4) * self.config.num_hidden_layers - 1
        found: list[float] = []
        for n in self.passes if self.tensor_parallel > 1 else ():
            found += [float(n * self.tokens * self.config.hidden_size * self.itemsize)] * n_sums
            found.append(float(n * self.adapter_elements() * FLOAT32))
        return found

    def traffic(self) -> float:
        """Bytes that a device sends in a step: a ring moves 2 (n - 1) / n of a tensor."""
        return sum(self.sums()) * 2 * (self.tensor_parallel - 1) / self.tensor_parallel

    def memory(self) -> dict[str, float]:
        """Bytes on a device, by what they are for."""
        c, n = self.config, max(self.passes)
        block = self.cost(1).base_elements() * self.itemsize
        working = 6 * n * self.tokens * c.intermediate_size // self.tensor_parallel * self.itemsize
        return {
            "weights": float(c.num_hidden_layers * block + c.vocab_size * c.hidden_size * self.itemsize),
            "kept": float(self.cost(n).kept_bytes(self.n_keep)),
            "working": float(working),
            "adapters": 2.0 * self.local_adapters * self.adapter_elements() * FLOAT32,  # and their gradients
        }

    def seconds(self, constants: Constants) -> dict[str, float]:
        """By what takes them; ``total`` in the end."""
        parts = {
            "products": self.gemm_flop() / constants.gemm,
            "low-rank": self.low_rank_flop() / constants.low_rank,
            "elementwise": self.memory_bytes() / constants.memory,
            # The constant is that of two ranks, where the ring's factor is one.
            "sums": len(self.sums()) * constants.sum_latency + self.traffic() / constants.sum_bytes,
        }
        return {**parts, "total": sum(parts.values())}

    def bound(self, constants: Constants) -> str:
        """What takes the most."""
        *parts, _ = self.seconds(constants).items()
        return max(parts, key=lambda part: part[1])[0]


def meshes(step: MeshStep, devices: int) -> list[MeshStep]:
    """The same step on every mesh of so many devices that the model allows."""
    sizes = [size for size in splits(step.config) if devices % size == 0]
    return [dataclasses.replace(step, tensor_parallel=t, data_parallel=devices // t) for t in sizes]
