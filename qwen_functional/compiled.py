"""torch.compile and what is not for it: functions that Dynamo must not look into."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which runs as it is inside a compiled one too: there the graph breaks before it and goes on after.

    Gradients by hand, buffers written over, and a GPU's own kernels and graphs are not what Dynamo expects to trace.
    With ``fullgraph=True`` it says so. Unlike ``torch.compiler.disable`` this imports Dynamo, a second, in a
    process alone that has it already.
    """

    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # so nobody compiles
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(sys.modules["torch._dynamo"].disable(function, reason=reason))
        return disabled[0](*args, **kwargs)

    reason = f"{function.__qualname__} is written by hand, with its gradient; it has to be called outside"
    # As Dynamo's own decorator does it: here it stops, and says why.
    call._torchdynamo_disable, call._torchdynamo_disable_msg = True, reason  # type: ignore[attr-defined]
    return call
