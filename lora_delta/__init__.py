"""Losses on LoRA tensors, by what they do to a frozen model, and what it takes to train a network on them.

Three differentiable functions of LoRA tensors, {PEFT name: (G, rows, columns)} for G adapters at once:
:class:`DifferentiableDeltaCompute` reads a few probe texts under every adapter, :class:`DifferentiableTextDelta` each
adapter's own texts, and :class:`DifferentiableLMLoss` computes the language model's loss on those. Each is built from
(config, weights) or by ``from_pretrained``, whose options are:

=================================================  ==================================================================
to                                                 pass
=================================================  ==================================================================
choose ranks, scales, modules or layers            ``spec=LoraSpec(rank=8, alpha=16, target_modules=("q_proj",))``
use your own probes, in the chat template          ``probes=[...], chat=True``
read out another layer, or several                 ``layer=12``, ``layer=(6, 12, -1)``
get a delta for each probe or position             ``pooling="none"``
limit memory to that of eight adapters             ``adapters_per_pass=8``
compute each pass once, for a mean over adapters   ``mean_loss(tensors, ...)`` in place of the call
multiply a float16 checkpoint at bfloat16's speed  ``dtype=torch.float16, compute_dtype=torch.bfloat16``
leave a base larger than memory on disk            ``stream=True``
split the base, or the adapters, over processes    ``mesh=...``, see :mod:`lora_delta.distributed`
trade memory for time                              ``checkpoint="block"``, ``memory_budget=`` bytes, ``prepack=False``
capture no CUDA graphs, or free their memory       ``graph=False``; ``release()``
skip the check for NaN and infinity                ``validate=False``
=================================================  ==================================================================

The rest is what training on them needs, and each part can be used alone:

* ``generate/``: ``run_config.py`` reads a run's file; ``generator.py`` has reference generators of tokens, of A and B,
  and the additive one; ``training.py`` the loop, which takes any ``nn.Module``; ``tokens.py`` the token formats of
  Drag-and-Drop LLMs, differentiable in both directions; ``losses.py`` losses on tokens, tensors and products;
  ``text_lines.py`` and ``texts.py`` read texts; ``judge.py`` and ``controls.py`` implement ``lora-delta evaluate``.
* ``peft/`` reads and writes PEFT folders; ``labelling/`` computes labels, the deltas of such folders, and
  ``DeltaLabels(folder).dataset(...)`` is a torch dataset of them; ``probes/`` turns texts and chats into token ids.
* ``delta_losses.py`` has losses on deltas; ``teachers.py`` and ``stored_deltas.py`` keep a teacher's outputs in files;
  ``plots/`` draws figures.
"""

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
