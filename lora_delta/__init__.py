"""The delta of a LoRA, and what is around it. Autograd meets the engine here."""

from .delta import DifferentiableDeltaCompute
from .probes import create_domain_probes, create_generic_probes, create_mixed_probes

__all__ = [
    "DifferentiableDeltaCompute",
    "create_domain_probes",
    "create_generic_probes",
    "create_mixed_probes",
]
