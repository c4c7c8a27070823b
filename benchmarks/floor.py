"""What cannot be avoided: the base model's matrix products alone, and the adapters' alone, in the fastest layouts.

The floor multiplies all tokens of the prefix tree by every block's weights: forwards q|k|v, o, gate|up and down, and
backwards the product that gives each one's dx. That is ``4 · parameters · tokens`` FLOP, without LoRA, attention, norms
and embedding. An engine may skip a little of it: dx of the first block's q, k and v, and in the last block q, o and the
MLP of tokens that are not read out. On a GPU the products are one CUDA graph, so that none waits for the host.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measure import synchronize
from torch import Tensor
from workload import Workload

from qwen_functional.architecture import STACKS, projection_shape, stack_shape

ROWS_PER_CHUNK = 256
BYTES_OF_WEIGHTS = 512 * 2**20  # per shape, distinct: far more than any cache holds
BYTES_OF_ACTIVATIONS = 64 * 2**20  # per projection, of inputs and of outputs
CALIBRATION_WEIGHTS, CALIBRATION_ROUNDS = 4, 2
NOT_OFFERED = (RuntimeError, AttributeError)  # what torch raises for a layout that it lacks here

Call = Callable[[], object]


def _packed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _packed_in_chunks(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """oneDNN allocates its output; in chunks of rows it stays small, in memory that is already mapped."""
    for chunk in x.split(ROWS_PER_CHUNK):
        _packed(chunk, weight)


# How a weight is stored, and ``y = x Wᵀ`` with it: of x, the stored weight, and a buffer for y.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Any]]] = {
    "linear": (lambda w: w, lambda x, w, y: F.linear(x, w)),
    "mm into a buffer": (lambda w: w, lambda x, w, y: torch.mm(x, w.T, out=y)),
    "mm, transposed weight": (lambda w: w.T.contiguous(), lambda x, w, y: torch.mm(x, w, out=y)),
    "oneDNN packed": (lambda w: torch.ops.mkldnn._reorder_linear_weight(w), lambda x, w, y: _packed(x, w)),
    "oneDNN packed, row chunks": (
        lambda w: torch.ops.mkldnn._reorder_linear_weight(w, ROWS_PER_CHUNK), _packed_in_chunks
    ),
}  # fmt: skip


class Floor:
    """The base model's products, in the order of its blocks and then back; without ``backwards`` of a forward alone.

    The first step finds the fastest layout of each.
    """

    def __init__(self, workload: Workload, backwards: bool = True) -> None:
        self.config, self.rows = workload.config(), workload.tree_tokens
        self.dtype, self.device = workload.compute_dtype, workload.device
        self.layouts: dict[str, str] = {}
        self._run: Call | None = None
        forward = {stack: stack_shape(self.config, stack) for stack in STACKS}  # {product: (outputs, inputs)}
        back = {f"{name}_dx": (columns, rows) for name, (rows, columns) in reversed(forward.items())}
        self.shapes = forward | (back if backwards else {})
        self.flop = 2 * self.rows * self.config.num_hidden_layers * sum(a * b for a, b in self.shapes.values())

    def weights(self) -> list[Tensor]:
        return []

    def facts(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch."), "flop": self.flop, "layouts": self.layouts}

    def step(self, adapters: int) -> None:
        with torch.inference_mode():
            if self._run is None:
                products = list(self._found())
                self._run = captured(lambda: [product() for product in products], self.device)
            self._run()

    def _found(self) -> Iterator[Call]:
        layers = range(self.config.num_hidden_layers)
        found = {name: self._fastest(name, *shape) for name, shape in self.shapes.items()}
        for back, order in ((False, layers), (True, reversed(layers))):
            for layer in order:
                yield from (calls[layer % len(calls)] for name, calls in found.items() if name.endswith("_dx") == back)

    def _random(self, *shape: int) -> Tensor:
        return (0.01 * torch.randn(shape, device=self.device)).to(self.dtype)

    def _fastest(self, name: str, outputs: int, inputs: int) -> list[Call]:
        """The product with each of several weights, which together fill no cache."""
        x, y = self._random(self.rows, inputs), self._random(self.rows, outputs)
        distinct = max(CALIBRATION_WEIGHTS, BYTES_OF_WEIGHTS // (outputs * inputs * self.dtype.itemsize))
        copies = min(self.config.num_hidden_layers, distinct)
        plain = [self._random(outputs, inputs) for _ in range(min(copies, CALIBRATION_WEIGHTS))]
        seconds = {}
        for layout, (store, multiply) in LAYOUTS.items():
            with contextlib.suppress(*NOT_OFFERED):
                stored = [store(weight) for weight in plain]
                seconds[layout] = self._seconds([_bound(multiply, x, weight, y) for weight in stored])
        best = self.layouts[name] = min(seconds, key=lambda layout: seconds[layout])
        store, multiply = LAYOUTS[best]
        # Which numbers are multiplied makes no difference, where they lie does: copies of a few will do.
        return [_bound(multiply, x, store(plain[copy % len(plain)].clone()), y) for copy in range(copies)]

    def _seconds(self, calls: list[Call]) -> float:
        run = captured(lambda: [call() for call in calls], self.device)
        return min(_seconds(run) for _ in range(CALIBRATION_ROUNDS + 1))  # the first one maps memory


class AdapterProducts(Floor):
    """The six products of every adapter and projection, one kind after the other, so that none waits for another.

    They are what no way can do without that multiplies the base weights once for all adapters.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.n, self.rank, self.each = workload.adapters, workload.rank, self.rows // workload.adapters
        modules = [projection_shape(self.config, projection) for _, projection in workload.spec.modules(self.config)]
        self.counts = Counter(modules)  # {(out, in): how many}
        # Three products with A and three with B.
        self.flop = 3 * 2 * self.each * self.n * self.rank * sum(rows + columns for rows, columns in modules)

    def _found(self) -> Iterator[Call]:
        for (outputs, inputs), count in self.counts.items():
            size = self.n * self.each * min(outputs, inputs) * self.dtype.itemsize
            copies = [self._products(outputs, inputs) for _ in range(min(count, max(1, BYTES_OF_ACTIVATIONS // size)))]
            for product, layouts in copies[0].items():
                seconds = {}
                for layout in layouts:
                    with contextlib.suppress(*NOT_OFFERED):
                        seconds[layout] = self._seconds([copy[product][layout] for copy in copies])
                best = self.layouts[f"{product}, {outputs} x {inputs}"] = min(seconds, key=lambda name: seconds[name])
                yield from (copies[index % len(copies)][product][best] for index in range(count))

    def _products(self, outputs: int, inputs: int) -> dict[str, dict[str, Call]]:
        """{product: {layout: it}} of one projection's tensors; y and dy, x and dx, u and t share their memory."""
        x, y = self._random(self.n, self.each, inputs), self._random(self.n, self.each, outputs)
        A, B = self._random(self.n, self.rank, inputs), self._random(self.n, outputs, self.rank)
        u = self._random(self.n, self.each, self.rank)
        return {
            "u = x Aᵀ": _layouts(x, A.mT),
            "y += u Bᵀ": _layouts(u, B.mT, y),
            "t = dy B": _layouts(y, B),
            "dx += t A": _layouts(u, A, x),
            "dA = tᵀ x": _layouts(u.mT, x),
            "dB = dyᵀ u": _layouts(y.mT, u),
        }


def _layouts(left: Tensor, right: Tensor, onto: Tensor | None = None) -> dict[str, Call]:
    """{layout: ``left right``, for each adapter}: as the smaller operand lies, or transposed; its transpose; and by
    oneDNN, one adapter after the other."""
    small_left = left.numel() < right.numel()
    turned = (left.mT.contiguous().mT, right) if small_left else (left, right.mT.contiguous().mT)
    if onto is not None:
        return {
            "as stored": lambda: onto.baddbmm_(left, right),
            "operand transposed": lambda: onto.baddbmm_(*turned),
        }
    return {
        "as stored": lambda: torch.bmm(left, right),
        "operand transposed": lambda: torch.bmm(*turned),
        "product transposed": lambda: torch.bmm(right.mT, left.mT),
        "both": lambda: torch.bmm(turned[1].mT, turned[0].mT),
        "one by one": lambda: [_packed(x, w) for x, w in zip(left, right.mT, strict=True)],
    }


def captured(call: Call, device: str) -> Call:
    """On a GPU a CUDA graph of what the call does; elsewhere the call itself."""
    if torch.device(device).type != "cuda":
        return call
    call()  # libraries ask for memory in their first call, which a graph cannot hold
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _bound(multiply: Callable[[Tensor, Tensor, Tensor], Any], x: Tensor, weight: Tensor, y: Tensor) -> Call:
    return lambda: multiply(x, weight, y)


def _seconds(call: Call) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start
