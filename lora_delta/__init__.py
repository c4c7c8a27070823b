"""The delta of a LoRA, and what is around it. Autograd meets the engine here."""

from .delta import DifferentiableDeltaCompute
from .generate.tokens import DifferentiableDetokenizer, TokenFormat
from .labelling.table import DeltaLabels
from .lm_loss import DifferentiableLMLoss
from .peft.adapters import load_peft_adapter, save_peft_adapter
from .probes.texts import create_domain_probes, create_generic_probes, create_mixed_probes
from .teachers import States, TopK, load_top_k, save_top_k
from .text_delta import DeltaTarget, DifferentiableTextDelta

__all__ = [
    "DeltaLabels",
    "DeltaTarget",
    "DifferentiableDeltaCompute",
    "DifferentiableDetokenizer",
    "DifferentiableLMLoss",
    "DifferentiableTextDelta",
    "States",
    "TokenFormat",
    "TopK",
    "create_domain_probes",
    "create_generic_probes",
    "create_mixed_probes",
    "load_peft_adapter",
    "load_top_k",
    "save_peft_adapter",
    "save_top_k",
]
