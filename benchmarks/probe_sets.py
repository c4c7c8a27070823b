"""Probes as token ids: real ones where there is a tokenizer, else synthetic ones of the same lengths."""

from __future__ import annotations

from lora_delta.probes.chat import load_chat_template
from lora_delta.probes.texts import create_generic_probes, create_mixed_probes
from lora_delta.probes.tokenization import load_tokenizer, tokenize_probes

PROBE_KINDS = ("generic", "mixed", "chat")  # chat: the mixed ones in the checkpoint's chat template
MAX_LENGTH = 256  # the seed pads and cuts to this

# Tokens per probe under Qwen's tokenizer, in the order of lora_delta.probes.texts.
GENERIC_LENGTHS = (32, 31, 31, 33, 31)
MIXED_LENGTHS = (*GENERIC_LENGTHS, 23, 19, 10, 13, 26, 35, 24, 12, 16, 21)
# The chat template puts these many tokens before and behind each probe.
CHAT_PREFIX, CHAT_SUFFIX = 24, 5


def synthetic_probes(kind: str, vocab_size: int) -> list[list[int]]:
    """Token ids with the lengths and the shared prefixes of the real probes, for a model without a tokenizer.

    The real generic probes share 3 tokens with one another, the mixed ones 5: here some share the first one.
    """
    lengths, sharing = (GENERIC_LENGTHS, 4) if kind == "generic" else (MIXED_LENGTHS, 6)
    ids = iter(range(2, 2 + sum(MIXED_LENGTHS) + CHAT_PREFIX + CHAT_SUFFIX * len(MIXED_LENGTHS)))
    probes = [[next(ids) for _ in range(length)] for length in lengths]
    for probe in probes[:sharing]:
        probe[0] = 1
    if kind == "chat":
        prefix = [next(ids) for _ in range(CHAT_PREFIX)]
        probes = [[*prefix, *probe, *(next(ids) for _ in range(CHAT_SUFFIX))] for probe in probes]
    # A stride that is prime to the vocabulary spreads the ids over the whole embedding.
    return [[token * 7919 % vocab_size for token in probe] for probe in probes]


def tree_tokens(probes: list[list[int]]) -> int:
    """Tokens of the probes' prefix tree: every distinct prefix counts once."""
    return len({tuple(probe[: end + 1]) for probe in probes for end in range(len(probe))})


def probe_ids(folder: str | None, kind: str, vocab_size: int) -> list[list[int]]:
    """The probes of a kind as token ids, real ones where a checkpoint gives its tokenizer."""
    if folder is None:
        return synthetic_probes(kind, vocab_size)
    texts = create_generic_probes() if kind == "generic" else create_mixed_probes()
    if kind == "chat":
        template = load_chat_template(folder)
        texts = [template.apply_chat_template(text) for text in texts]
    return tokenize_probes(load_tokenizer(folder), texts, MAX_LENGTH, add_special_tokens=kind != "chat").ids
