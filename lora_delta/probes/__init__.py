"""Probes: what the model reads while its behaviour is measured. Texts, tokenizer, chat template, ids."""

from .texts import create_domain_probes, create_generic_probes, create_mixed_probes

__all__ = ["create_domain_probes", "create_generic_probes", "create_mixed_probes"]
