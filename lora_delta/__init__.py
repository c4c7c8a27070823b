"""The delta of a LoRA, and what is around it. Autograd meets the engine here."""

from .adapters import load_peft_adapter, save_peft_adapter
from .delta import DifferentiableDeltaCompute
from .label_table import DeltaLabels
from .probes import create_domain_probes, create_generic_probes, create_mixed_probes
from .tokens import DifferentiableDetokenizer, TokenFormat

__all__ = [
    "DeltaLabels",
    "DifferentiableDeltaCompute",
    "DifferentiableDetokenizer",
    "TokenFormat",
    "create_domain_probes",
    "create_generic_probes",
    "create_mixed_probes",
    "load_peft_adapter",
    "save_peft_adapter",
]
