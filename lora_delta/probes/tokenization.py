"""A checkpoint's tokenizer, and probe texts turned into token ids.

The ids are those of ``transformers.AutoTokenizer``, obtained from the same files without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from qwen_functional.files import read_json_object

from .tokenizer_files import MOST_BYTES, TokenizerConfig, check_post_processor, require_qwen2, shortened

MOST_CHARACTERS = 1 << 19
# From Qwen2's tokenizer, as published with the models: splits into words, single digits, punctuation and blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, as AutoTokenizer makes it, without truncation and padding.

    From ``tokenizer.json`` it uses the vocabulary, merges, added tokens and post-processor; see
    :mod:`.tokenizer_files`.

    Raises:
        ValueError: there is no such folder or file, the file is not a tokenizer, or AutoTokenizer would use another
            one than Qwen2's; it names the field.
    """
    path = checkpoint_file(folder, "tokenizer.json")
    if not path.is_file():
        raise ValueError(f"no tokenizer in {folder}: expected the file tokenizer.json")
    config = TokenizerConfig.read(folder)
    require_qwen2(Path(folder), config)
    fields = read_json_object(path, "a tokenizer", MOST_BYTES)
    model = fields.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ValueError(f"model in {path} is {shortened(model)}: expected one of type 'BPE'")
    check_post_processor(fields.get("post_processor"), str(path))
    tokens = config.tokens(fields.get("added_tokens"), str(path))
    prefix, split = config.flag("add_prefix_space"), config.flag("split_special_tokens")
    try:
        tokenizer = Tokenizer(_bpe(model["vocab"], model["merges"]))
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
        spelt = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, spelt])
        tokenizer.decoder = decoders.ByteLevel()
        # A new tokenizer has no post-processor, and None cannot be set.
        if fields.get("post_processor") is not None:
            tokenizer.post_processor = _post_processor(fields["post_processor"])
        tokenizer.encode_special_tokens = split
        tokenizer.add_tokens(tokens)
    except BaseException as error:  # tokenizers raises bare Exception, and its panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} is not a tokenizer that can be read: {type(error).__name__}: {error}") from error
    return tokenizer


def _bpe(vocab: Any, merges: Any) -> BPE:
    pairs: list[Any] = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return BPE(vocab, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False, byte_fallback=False)


def _post_processor(fields: Any) -> Any:
    """The post-processor from its JSON, which tokenizers reads only as part of a whole tokenizer."""
    whole = {"version": "1.0", "added_tokens": [], "post_processor": fields}
    whole |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return Tokenizer.from_str(json.dumps({**whole, "model": model})).post_processor


@dataclass(frozen=True)
class Probes:
    """Probes as the model reads them, and how they came from texts.

    Attributes:
        ids: token ids, one list per probe, as long as the probe, not padded.
        texts: what they were made of; None for probes that were given as ids.
        truncated: the indices of the probes that were cut, ascending.
        lengths: tokens of each probe before any cut; by default those of ``ids``.
        chat: whether each text went in as a user message in the checkpoint's chat template.
        max_length: the most tokens that a probe could have; None for probes that were given as ids.
        chat_template_kwargs: further variables that the template was given.
    """

    ids: list[list[int]]
    texts: tuple[str, ...] | None = None
    truncated: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    chat: bool = False
    max_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lengths:
            object.__setattr__(self, "lengths", tuple(map(len, self.ids)))


def check_probes(probes: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``probes`` is a list of texts, none of them empty or too long."""
    if isinstance(probes, str):
        raise ValueError(f"probes is a single str, {shortened(probes)}: expected a list of str")
    if not isinstance(probes, Sequence) or isinstance(probes, (bytes, bytearray)):
        raise ValueError(f"probes is a {type(probes).__name__}: expected a list of str")
    if not probes:
        raise ValueError("probes is empty: expected at least one text")
    for index, probe in enumerate(probes):
        check_text(probe, f"probe {index}")


def tokenize_probes(
    tokenizer: Tokenizer, probes: Sequence[str], max_length: int, *, add_special_tokens: bool = True
) -> Probes:
    """Token ids of every probe, cut to ``max_length`` tokens on the right, whatever ``truncation_side`` the files name.

    The ids are those of ``transformers``' ``tokenizer(probes, truncation=True, max_length=max_length)``. A
    special token written out in a probe, such as ``<|im_start|>``, becomes its one id.

    Args:
        tokenizer: as :func:`load_tokenizer` gives it.
        probes: the texts.
        max_length: most tokens of one probe, special tokens included.
        add_special_tokens: whether the tokenizer adds its own special tokens (Qwen2's adds none). Pass False
            for texts from :meth:`lora_delta.probes.chat.ChatTemplate.apply_chat_template`, which have theirs already.

    Raises:
        ValueError: no probes; a single str instead of a list; a probe that is not a str, is empty, has no tokens, or
            more than :data:`MOST_CHARACTERS` characters; a ``max_length`` that is not a positive integer or leaves no
            room next to the special tokens; a tokenizer with its own truncation or padding.
    """
    check_probes(probes)
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}: expected an integer of at least 1")
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        raise ValueError(
            "the tokenizer truncates or pads by itself: expected it with no_truncation() and no_padding()"
        )
    reserved = tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0
    if max_length <= reserved:
        raise ValueError(
            f"max_length is {max_length}, but the tokenizer adds {reserved} special tokens to every probe: "
            f"expected at least {reserved + 1}"
        )

    ids, lengths = [], []
    for index, probe in enumerate(probes):
        encoding = tokenizer.encode(probe, add_special_tokens=False)
        if not len(encoding):
            raise ValueError(f"probe {index}, {shortened(probe)}, has no tokens: expected at least one")
        lengths.append(len(encoding) + reserved)
        # Cut before the special tokens are added, so that a closing one survives.
        encoding.truncate(max_length - reserved)
        ids.append(tokenizer.post_process(encoding, None, add_special_tokens).ids)
    truncated = tuple(index for index, length in enumerate(lengths) if length > max_length)
    return Probes(ids, tuple(probes), truncated, tuple(lengths), max_length=max_length)


def check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}: expected a str")
    if not text:
        raise ValueError(f"{name} is empty: expected a text with at least one token")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(text):,} characters: expected at most {MOST_CHARACTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}, {shortened(text)}, is not valid Unicode: {error.reason}") from error


def checkpoint_file(folder: str | Path, name: str) -> Path:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: expected the folder of a checkpoint")
    return Path(folder) / name
