"""A plan's step as two CUDA graphs, one forward and one backward, with buffers of their own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lora import Lora
from .cuda import buffers, load

if TYPE_CHECKING:
    from ..engine import Run, WayBack
    from ..plan import Plan


def replayed(plan: Plan, lora: Lora) -> tuple[tuple[Tensor, ...], WayBack] | None:
    """The values and the way back by graphs; None where the step is to run without them.

    The first use of a plan runs without graphs, the second captures them, unless there is no memory for it. While a way
    back is pending, its buffers are not overwritten: another forward meanwhile runs without graphs.
    """
    if plan.weights.streamed or torch.cuda.is_current_stream_capturing():
        return None
    plan.uses += 1
    if plan.captured is None:
        if plan.uses < 2:
            return None
        try:
            plan.captured = Captured(plan, lora)
        except torch.OutOfMemoryError:  # what graphs hold is theirs alone; without them there may be enough
            plan.graph = False
            return None
    return plan.captured.forward(lora)


class Captured:
    """The graphs, and the buffers that they read and write."""

    def __init__(self, plan: Plan, lora: Lora) -> None:
        from ..engine import Run

        device = plan.weights.device
        mode = "thread_local"
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            self.adapters = buffers(lora, plan.weights.compute_dtype)
            load(self.adapters, lora)
            self._go_once(Run(plan, lora, self.adapters))
            pool = torch.cuda.graph_pool_handle()
            self.there, self.back = torch.cuda.CUDAGraph(), None
            run = Run(plan, lora, self.adapters)
            with torch.cuda.graph(self.there, pool=pool, capture_error_mode=mode):
                self.values = run.forward()
            self.gradients: dict[str, Tensor] = {}
            self.cotangents = [torch.zeros_like(value) for value in self.values]
            if plan.wanted:
                self.back = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.back, pool=pool, capture_error_mode=mode):
                    self.gradients = run.backward(self.cotangents)
        self._pending: weakref.ref[Replay] | None = None

    @staticmethod
    def _go_once(run: Run) -> None:
        """Makes and compiles what cannot be made during a capture: there may have been no way back so far."""
        values = run.forward()
        if run.plan.wanted:
            run.backward([torch.zeros_like(value) for value in values])

    def forward(self, lora: Lora) -> tuple[tuple[Tensor, ...], WayBack] | None:
        """None while a way back is pending."""
        if self._pending is not None:
            pending = self._pending()
            if pending is not None and not pending.done:
                return None
        load(self.adapters, lora)
        self.there.replay()
        way_back = Replay(self)
        self._pending = weakref.ref(way_back) if self.back is not None else None
        return tuple(value.clone() for value in self.values), way_back


class Replay:
    """The way back of one forward."""

    def __init__(self, captured: Captured) -> None:
        self._captured: Captured | None = captured
        self.done = False

    def backward(self, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        captured, self._captured, self.done = self._captured, None, True
        assert captured is not None
        if captured.back is None:
            return {}
        for own, cotangent in zip(captured.cotangents, cotangents, strict=True):
            own.copy_(cotangent)
        captured.back.replay()
        # Copies for the caller: the next replay overwrites the captured ones.
        fresh = {name: torch.empty_like(gradient) for name, gradient in captured.gradients.items()}
        torch._foreach_copy_(list(fresh.values()), list(captured.gradients.values()))
        return fresh
