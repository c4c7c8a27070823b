"""The GEMM floor: the base model's matrix products alone, each in the fastest layout that torch offers.

Per block, forwards q|k|v, o, gate|up and down, and backwards the product that gives each one's dx: no LoRA,
no attention, no norms, no embedding. Every product is over all G·S tokens of the prefix tree, in every block,
so the floor counts ``4 · parameters · tokens`` FLOP. An engine may do a little less: the first block needs no
dx of q, k and v, and the last needs q, o and the MLP at the read-out tokens only.

On a GPU all of them are one CUDA graph: there the host, which starts one after the other, would be the slower.

:class:`AdapterProducts` are those of the adapters alone, which the floor leaves out, though no way of multiplying
base weights once for all adapters can do without them.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from measure import synchronize
from torch import Tensor
from workload import Workload

from qwen_functional import Qwen2Config
from qwen_functional.architecture import projection_shape

ROWS_PER_CHUNK = 256
BYTES_OF_WEIGHTS = 512 * 2**20  # per shape, distinct: far more than any cache holds
CALIBRATION_WEIGHTS, CALIBRATION_ROUNDS = 4, 2
NOT_OFFERED = (RuntimeError, AttributeError)  # what torch raises for a layout that it lacks here
BYTES_OF_ACTIVATIONS = 64 * 2**20  # per projection, of inputs and of outputs: more than a cache holds

Operand = TypeVar("Operand")


@dataclass(frozen=True)
class Layout:
    """A way to multiply: how the weight is stored, and the product ``y = x Wᵀ`` with it."""

    prepare: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor], Any]  # x, prepared weight, a buffer for y

    def by(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Any]:
        """The product of ``x`` by a prepared weight."""
        return lambda weight: self.multiply(x, weight, y)


def _packed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _packed_in_chunks(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """oneDNN allocates its output; in chunks of rows it stays small, in memory that is already mapped."""
    for chunk in x.split(ROWS_PER_CHUNK):
        _packed(chunk, weight)


LAYOUTS = {
    "linear": Layout(lambda w: w, lambda x, w, y: F.linear(x, w)),
    "mm into a buffer": Layout(lambda w: w, lambda x, w, y: torch.mm(x, w.T, out=y)),
    "mm, transposed weight": Layout(lambda w: w.T.contiguous(), lambda x, w, y: torch.mm(x, w, out=y)),
    "oneDNN packed": Layout(
        lambda w: torch.ops.mkldnn._reorder_linear_weight(w), lambda x, w, y: _packed(x, w)
    ),
    "oneDNN packed, row chunks": Layout(
        lambda w: torch.ops.mkldnn._reorder_linear_weight(w, ROWS_PER_CHUNK), _packed_in_chunks
    ),
}


def block_shapes(config: Qwen2Config) -> dict[str, tuple[int, int]]:
    """{product: (outputs, inputs)} of one block, forwards and then backwards."""
    h, q, i = config.hidden_size, config.q_size, config.intermediate_size
    forward = {"qkv": (q + 2 * config.kv_size, h), "o": (h, q), "gate_up": (2 * i, h), "down": (h, i)}
    return forward | {f"{name}_dx": (columns, rows) for name, (rows, columns) in reversed(forward.items())}


class Floor:
    """The floor of a workload as something to time; its first step picks a layout per shape."""

    def __init__(self, workload: Workload) -> None:
        config = workload.config()
        self.layers = config.num_hidden_layers
        self.rows = workload.tree_tokens
        self.dtype, self.device = workload.compute_dtype, workload.device
        self.shapes = block_shapes(config)
        parameters = self.layers * sum(rows * columns for rows, columns in self.shapes.values())
        self.flop = 2 * self.rows * parameters  # W counts twice: forwards, and for dx
        self.layouts: dict[str, str] = {}
        self.gflops: dict[str, float] = {}
        self._products: dict[str, tuple[Layout, Tensor, list[Tensor], Tensor]] = {}
        self._run: Callable[[], object] | None = None

    def _calibrate(self, name: str, outputs: int, inputs: int) -> None:
        x = torch.randn(self.rows, inputs, device=self.device).to(self.dtype)
        y = torch.empty(self.rows, outputs, dtype=self.dtype, device=self.device)
        size = outputs * inputs * self.dtype.itemsize
        copies = min(self.layers, max(CALIBRATION_WEIGHTS, BYTES_OF_WEIGHTS // size))
        distinct = range(min(copies, CALIBRATION_WEIGHTS))
        plain = [torch.randn(outputs, inputs, device=self.device).to(self.dtype) for _ in distinct]
        seconds = {}
        for layout_name, layout in LAYOUTS.items():
            try:
                weights = [layout.prepare(weight) for weight in plain]
                layout.multiply(x, weights[0], y)
            except NOT_OFFERED:
                continue
            products = captured(_each(layout.by(x, y), weights), self.device)
            seconds[layout_name] = min(_seconds(products) for _ in range(CALIBRATION_ROUNDS)) / len(weights)
        best = min(seconds, key=lambda layout_name: seconds[layout_name])
        self.layouts[name] = best
        self.gflops[name] = 2 * self.rows * outputs * inputs / seconds[best] / 1e9
        # Which numbers are multiplied makes no difference, where they lie does: copies of a few will do.
        weights = [LAYOUTS[best].prepare(plain[copy % len(plain)].clone()) for copy in range(copies)]
        self._products[name] = (LAYOUTS[best], x, weights, y)

    def step(self) -> None:
        """All products of one step, in the order of the model's blocks and then back."""
        with torch.inference_mode():
            if self._run is None:
                for name, shape in self.shapes.items():
                    self._calibrate(name, *shape)
                self._run = captured(self._multiply, self.device)
            self._run()

    def _multiply(self) -> None:
        forward = [product for name, product in self._products.items() if not name.endswith("_dx")]
        backward = [product for name, product in self._products.items() if name.endswith("_dx")]
        for products, layers in ((forward, range(self.layers)), (backward, reversed(range(self.layers)))):
            for layer in layers:
                for layout, x, weights, y in products:
                    layout.multiply(x, weights[layer % len(weights)], y)

    def facts(self) -> dict[str, Any]:
        return {
            "counts": "4 x parameters x tokens: q|k|v, o, gate|up, down and each one's dx, every block",
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens": self.rows,
            "flop": self.flop,
            "layouts": self.layouts,
            "gflops_per_product": self.gflops,
        }


@dataclass
class Projection:
    """The tensors of one projection with its adapters, and each one's transpose as memory of its own."""

    x: Tensor  # (G, S, in)
    y: Tensor  # (G, S, out); its cotangent is multiplied in the same place
    A: Tensor  # (G, r, in)
    B: Tensor  # (G, out, r)
    u: Tensor  # (G, S, r)
    A_t: Tensor
    B_t: Tensor
    u_t: Tensor


def _one_by_one(left: Tensor, right: Tensor) -> Tensor:
    """``left right`` by oneDNN, one adapter after the other; returns the last one's."""
    return [_packed(x, w) for x, w in zip(left, right.mT, strict=True)][-1]


ADAPTER_LAYOUTS: dict[str, dict[str, Callable[[Projection], Tensor]]] = {
    "u = x Aᵀ": {
        "A": lambda p: torch.bmm(p.x, p.A.mT),
        "A transposed": lambda p: torch.bmm(p.x, p.A_t),
        "one by one": lambda p: _one_by_one(p.x, p.A.mT),
    },
    "y += u Bᵀ": {
        "B": lambda p: p.y.baddbmm_(p.u, p.B.mT),
        "B transposed": lambda p: p.y.baddbmm_(p.u, p.B_t),
    },
    "t = dy B": {
        "B": lambda p: torch.bmm(p.y, p.B),
        "B transposed": lambda p: torch.bmm(p.y, p.B_t.mT),
        "t transposed": lambda p: torch.bmm(p.B_t, p.y.mT),
        "one by one": lambda p: _one_by_one(p.y, p.B),
    },
    "dx += t A": {
        "A": lambda p: p.x.baddbmm_(p.u, p.A),
        "A transposed": lambda p: p.x.baddbmm_(p.u, p.A_t.mT),
    },
    "dA = tᵀ x": {
        "t": lambda p: torch.bmm(p.u.mT, p.x),
        "t transposed": lambda p: torch.bmm(p.u_t, p.x),
        "dA transposed": lambda p: torch.bmm(p.x.mT, p.u),
        "one by one": lambda p: _one_by_one(p.u.mT, p.x),
    },
    "dB = dyᵀ u": {
        "dB": lambda p: torch.bmm(p.y.mT, p.u),
        "dB transposed": lambda p: torch.bmm(p.u.mT, p.y),
        "dB transposed, u transposed": lambda p: torch.bmm(p.u_t, p.y),
        "one by one": lambda p: _one_by_one(p.u.mT, p.y),
    },
}


class AdapterProducts:
    """The six products of every adapter of a workload, each in the fastest layout that torch offers, as something to
    time; the first step picks the layouts.
    """

    def __init__(self, workload: Workload) -> None:
        config, spec = workload.config(), workload.spec
        self.n, self.rank, self.rows = workload.adapters, workload.rank, workload.tree_tokens // workload.adapters
        self.dtype, self.device = workload.compute_dtype, workload.device
        modules = [projection_shape(config, projection) for _, projection in spec.modules(config)]
        self.counts = Counter(modules)  # {(out, in): how many}
        # Three products with A and three with B.
        self.flop = 3 * 2 * workload.tree_tokens * self.rank * sum(rows + columns for rows, columns in modules)
        self.layouts: dict[str, str] = {}
        self._work: list[tuple[int, Callable[[Projection], Tensor], list[Projection]]] = []
        self._run: Callable[[], object] | None = None

    def _projection(self, outputs: int, inputs: int) -> Projection:
        def tensor(*shape: int) -> Tensor:
            return (0.01 * torch.randn(self.n, *shape, device=self.device)).to(self.dtype)

        x, y = tensor(self.rows, inputs), tensor(self.rows, outputs)
        A, B, u = tensor(self.rank, inputs), tensor(outputs, self.rank), tensor(self.rows, self.rank)
        return Projection(x, y, A, B, u, *(t.mT.contiguous() for t in (A, B, u)))

    def _calibrate(self) -> None:
        for (outputs, inputs), count in self.counts.items():
            size = self.n * self.rows * min(outputs, inputs) * self.dtype.itemsize
            copies = min(count, max(1, BYTES_OF_ACTIVATIONS // size))
            several = [self._projection(outputs, inputs) for _ in range(copies)]
            for product, layouts in ADAPTER_LAYOUTS.items():
                seconds = {}
                for name, multiply in layouts.items():
                    with contextlib.suppress(*NOT_OFFERED):
                        products = captured(_each(multiply, several), self.device)
                        rounds = [_seconds(products) for _ in range(CALIBRATION_ROUNDS + 1)]
                        seconds[name] = min(rounds)  # the first one maps memory
                best = min(seconds, key=lambda name: seconds[name])
                self.layouts[f"{product}, {outputs} x {inputs}"] = best
                self._work.append((count, layouts[best], several))

    def step(self) -> None:
        """All products of one step, in no order that a model would have them in: each waits for no other."""
        with torch.inference_mode():
            if self._run is None:
                self._calibrate()
                self._run = captured(self._multiply, self.device)
            self._run()

    def _multiply(self) -> None:
        for count, multiply, several in self._work:
            for index in range(count):
                multiply(several[index % len(several)])

    def facts(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch."), "flop": self.flop, "layouts": self.layouts}


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU a CUDA graph of what the call does, so that no product waits for the host; elsewhere the call itself."""
    if torch.device(device).type != "cuda":
        return call
    call()  # libraries ask for memory in their first call, which a graph cannot hold
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _each(multiply: Callable[[Operand], Any], operands: list[Operand]) -> Callable[[], None]:
    def products() -> None:
        for operand in operands:
            multiply(operand)

    return products


def _seconds(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start
