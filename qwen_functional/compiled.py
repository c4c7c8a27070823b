"""torch.compile and what it must leave alone: functions that Dynamo must not trace."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which runs as it is inside a compiled one too: there the graph breaks before it and resumes after.

    Hand-written gradients, overwritten buffers, and a GPU's own kernels and graphs are not what Dynamo expects to
    trace. With ``fullgraph=True`` it says so. Unlike ``torch.compiler.disable`` this never imports Dynamo itself, which
    takes a second.
    """

    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # so nothing is being compiled
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(sys.modules["torch._dynamo"].disable(function, reason=reason))
        return disabled[0](*args, **kwargs)

    reason = f"{function.__qualname__} is written by hand, with its gradient; call it outside the compiled function"
    # As Dynamo's own decorator does: tracing stops here, with the reason.
    call._torchdynamo_disable, call._torchdynamo_disable_msg = True, reason  # type: ignore[attr-defined]
    return call
