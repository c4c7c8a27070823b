"""Do two contenders agree? Relative Frobenius errors of the values and of every gradient, and what is tolerated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from safetensors import safe_open


class DisagreementError(RuntimeError):
    """Two contenders do not compute the same; the message names the one, the tensor and the error."""


class Errors(NamedTuple):
    """Relative errors against a reference over the adapters that both have, or the largest that are tolerated.

    Attributes:
        value: of the values.
        gradient: of all gradients taken together.
        worst: of the gradient tensor that is furthest off; worst_name: its PEFT name.
        adapters: how many were compared.
    """

    value: float
    gradient: float
    worst: float
    worst_name: str = ""
    adapters: int = 0

    def __str__(self) -> str:
        return (
            f"value off by {self.value:.1e}, gradients by {self.gradient:.1e} (at worst {self.worst:.1e}, "
            f"{self.worst_name}), over {self.adapters} adapters"
        )

    def widened(self, noise: Errors) -> Errors:
        """A tolerance for those whose errors are at most ``NOISE`` times these."""
        tolerated = zip(self[:3], noise[:3], strict=True)
        value, gradient, worst = (max(limit, NOISE * error) for limit, error in tolerated)
        return Errors(value, gradient, worst)


# A probe may be so ill-conditioned that any rounding to bfloat16 changes its gradients by their own size, and any in
# float32 by 2e-4 of it, as one of the mixed ones does on the 0.5B checkpoint: the tolerance follows the errors that
# transformers makes on the same.
NOISE = 2.0

# bfloat16: about twice the largest errors against float32 that transformers made on a real 0.5B checkpoint in two draws
# of adapters (0.013 and 0.053; 0.46 in the worst of 336 tensors, 0.16 in the other draw). In one tensor that catches a
# missing gradient (1) or a wrong sign (2), but no longer a scale that is off by two (0.5 or 1): float32 catches that.
# float16: an engine that computes in float32 and rounds its gradients at the end makes 2e-4.
TOLERANCE = {
    torch.float32: Errors(1e-4, 1e-4, 1e-4),
    torch.bfloat16: Errors(0.03, 0.1, 0.9),
    torch.float16: Errors(1e-3, 1e-3, 1e-3),
}


def relative_error(error: float, reference: float) -> float:
    """error / reference: zero where both vanish, infinite where only the reference does, or for NaN."""
    if error == 0:
        return 0.0
    ratio = error / reference if reference > 0 else math.inf
    return math.inf if math.isnan(ratio) else ratio


def compare(path: str, reference_path: str) -> Errors:
    """Compare two files that workers wrote, tensor by tensor; raises :class:`DisagreementError` for other tensors."""
    errors, norms = {}, {}
    with safe_open(path, "pt") as ours, safe_open(reference_path, "pt") as theirs:
        odd = sorted(set(ours.keys()) ^ set(theirs.keys()))
        if odd:
            raise DisagreementError(f"only one of the two has {odd[0]} (and {len(odd) - 1} more)")
        for name in ours.keys():  # noqa: SIM118  (a safetensors file, not a dict)
            a, b = ours.get_tensor(name).double(), theirs.get_tensor(name).double()
            adapters = min(a.shape[0], b.shape[0])
            if a.shape[1:] != b.shape[1:]:
                raise DisagreementError(f"{name} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
            errors[name], norms[name] = float((a[:adapters] - b[:adapters]).norm()), float(b[:adapters].norm())
    value = relative_error(errors.pop("value"), norms.pop("value"))
    total = relative_error(math.hypot(*errors.values()), math.hypot(*norms.values()))
    each = {name: relative_error(error, norms[name]) for name, error in errors.items()} or {"none": 0.0}
    worst = max(each, key=lambda name: each[name])
    return Errors(value, total, each[worst], worst, adapters)


def require(name: str, errors: Errors, tolerance: Errors) -> None:
    """Raise a :class:`DisagreementError` where an error is not within the tolerance."""
    for what, at in (("the value", 0), (f"the gradient of {errors.worst_name}", 2), ("the gradient", 1)):
        error, limit = errors[:3][at], tolerance[:3][at]
        if not error <= limit:
            raise DisagreementError(f"{name}: {what} is off by {error:.1e}, expected at most {limit:.1e}")
