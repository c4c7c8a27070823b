"""Do two ways agree? Relative Frobenius errors of the values and of every gradient, and what is tolerated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors: of the values, of all gradients together, of any one gradient tensor."""

    value: float
    gradient: float
    worst: float

    def beside(self, noise: Agreement) -> Tolerance:
        """Wide enough for a way whose errors are at most ``NOISE`` times those."""
        value, gradient, worst = (NOISE * error for error in (noise.value, noise.gradient, noise.worst))
        return Tolerance(max(self.value, value), max(self.gradient, gradient), max(self.worst, worst))


# A probe may be so ill-conditioned that any rounding to bfloat16 changes its gradients by their own size, as one of the
# mixed ones does on the 0.5B checkpoint: what is tolerated follows the errors that transformers makes on the same.
NOISE = 2.0

# bfloat16: about twice the largest errors against float32 that transformers made on a real 0.5B checkpoint in two draws
# of adapters (0.013 and 0.053; 0.46 in the worst of 336 tensors, 0.16 in the other draw). In one tensor that catches a
# missing gradient (1) or a wrong sign (2), but no longer a scale that is off by two (0.5 or 1): float32 catches that.
# float16: an engine that computes in float32 and rounds its gradients at the end makes 2e-4.
TOLERANCE = {
    "float32": Tolerance(1e-4, 1e-4, 1e-4),
    "bfloat16": Tolerance(0.03, 0.1, 0.9),
    "float16": Tolerance(1e-3, 1e-3, 1e-3),
}


class DisagreementError(RuntimeError):
    """Two ways do not compute the same; the message names the way, the tensor and the error."""


@dataclass(frozen=True)
class Agreement:
    """Relative Frobenius errors against a reference, over the adapters that both have.

    Attributes:
        value: of the values.
        gradient: of all gradients taken together.
        worst: of the gradient tensor that is furthest off.
        worst_name: its PEFT name.
        adapters: how many were compared.
    """

    value: float
    gradient: float
    worst: float
    worst_name: str
    adapters: int

    def __str__(self) -> str:
        return (
            f"value off by {self.value:.1e}, gradients by {self.gradient:.1e} (at worst {self.worst:.1e}, "
            f"{self.worst_name}), over {self.adapters} adapters"
        )


def relative_error(error: float, reference: float) -> float:
    """error / reference: zero where both vanish, infinite where only the reference does, or for NaN."""
    if error == 0:
        return 0.0
    ratio = error / reference if reference > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")


def compare(path: str, reference_path: str) -> Agreement:
    """Compare two files that workers wrote, tensor by tensor.

    Raises:
        DisagreementError: the files do not hold the same tensors, or their shapes differ beyond the adapters.
    """
    with safe_open(path, "pt") as ours, safe_open(reference_path, "pt") as theirs:
        if set(ours.keys()) != set(theirs.keys()):
            odd = sorted(set(ours.keys()) ^ set(theirs.keys()))
            raise DisagreementError(f"only one of the two has {odd[0]} (and {len(odd) - 1} more)")
        errors, norms = {}, {}
        for name in ours.keys():  # noqa: SIM118  (a safetensors file, not a dict)
            a, b = ours.get_tensor(name), theirs.get_tensor(name)
            adapters = min(a.shape[0], b.shape[0])
            if a.shape[1:] != b.shape[1:]:
                raise DisagreementError(f"{name} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
            errors[name] = _norm(a[:adapters].double() - b[:adapters].double())
            norms[name] = _norm(b[:adapters].double())
    value = relative_error(errors.pop("value"), norms.pop("value"))
    total = relative_error(math.hypot(*errors.values()), math.hypot(*norms.values()))
    each = {name: relative_error(error, norms[name]) for name, error in errors.items()}
    worst_name = max(each, key=lambda name: each[name])
    return Agreement(value, total, each[worst_name], worst_name, adapters)


def require(way: str, agreement: Agreement, tolerance: Tolerance) -> None:
    """Raise a :class:`DisagreementError` where an agreement is outside of the tolerance."""
    for what, error, limit in (
        ("the value", agreement.value, tolerance.value),
        (f"the gradient of {agreement.worst_name}", agreement.worst, tolerance.worst),
        ("the gradient", agreement.gradient, tolerance.gradient),
    ):
        if not error <= limit:
            raise DisagreementError(f"{way}: {what} is off by {error:.1e}, expected at most {limit:.1e}")


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
