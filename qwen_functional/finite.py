"""NaN and infinity in tensors: found at once on a CPU; on a GPU, without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Pending:
    """A check that a GPU has not finished yet. ``finite``, in page-locked host memory, is valid after ``done``."""

    names: tuple[str, ...]
    finite: Tensor
    done: torch.cuda.Event


_pending: deque[_Pending] = deque()


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for a tensor that holds NaN or infinity: here for one on a CPU, and for those on a GPU in
    the first :func:`raise_found` after the check. No device-side assertion, which would destroy the CUDA context.
    """
    if not tensors or any(is_symbolic(tensor) for tensor in tensors.values()):
        return
    if next(iter(tensors.values())).device.type == "cuda":
        if not torch.cuda.is_current_stream_capturing():
            _check_later(tensors)
        return
    extremes = [torch.stack(tensor.detach().aminmax()).double() for tensor in tensors.values()]  # any NaN gives NaN
    _raise_unless(tensors, torch.isfinite(torch.stack(extremes)).all(1))


def _check_later(tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad(), torch.inference_mode(False):
        largest = torch._foreach_norm([tensor.detach() for tensor in tensors.values()], float("inf"))
        same = all(one.dtype == largest[0].dtype for one in largest)  # nearly always; saves a launch for each
        finite = torch.isfinite(torch.stack(largest if same else [one.double() for one in largest]))
        host = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(finite, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(finite.device))
    _pending.append(_Pending(tuple(tensors), host, done))


def raise_found() -> None:
    """Raises ``ValueError`` for what earlier checks on a GPU have found by now; waits for none."""
    if _pending and torch.cuda.is_current_stream_capturing():
        return  # a query would end the capture
    while _pending and _pending[0].done.query():
        found = _pending.popleft()
        _raise_unless(found.names, found.finite)


def _raise_unless(names: Mapping[str, Tensor] | tuple[str, ...], finite: Tensor) -> None:
    if bool(finite.all()):
        return
    name = next(name for name, fine in zip(names, finite.tolist(), strict=True) if not fine)
    raise ValueError(f"LoRA tensor {name!r} is not finite: it holds NaN or infinity")


def is_symbolic(tensor: Tensor) -> bool:
    """Whether the values cannot be read: under torch.compile or torch.func, of a fake tensor or one on meta."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


def require_no_transform(tensors: Mapping[str, Tensor], kind: str = "LoRA tensor") -> None:
    """Raises ``ValueError`` for a tensor inside a transform of torch.func, which cannot see hand-written gradients."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return
    for name, tensor in tensors.items():
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise ValueError(
                f"{kind} {name!r} is inside a transform of torch.func, expected a plain tensor: gradients come from "
                "autograd or the vjp, and many adapters go in as a batch (G, …)"
            )
