"""A checkpoint's tokenizer, and probe texts turned into token ids.

The ids are those of ``transformers.AutoTokenizer``, got from the same files without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import NFC

from qwen_functional.files import read_json_object


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a checkpoint folder's ``tokenizer.json``, its own truncation and padding switched off.

    Raises:
        ValueError: there is no such folder or file, or the file is not a tokenizer.
    """
    path = checkpoint_file(folder, "tokenizer.json")
    if not path.is_file():
        raise ValueError(f"no tokenizer in {folder}: expected the file tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Qwen2's tokenizer composes accents, and transformers does so whether or not the file says it.
    config = read_tokenizer_config(folder)
    is_qwen2 = config.get("tokenizer_class") in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    if is_qwen2 and tokenizer.normalizer is None:
        tokenizer.normalizer = NFC()
    return tokenizer


@dataclass(frozen=True)
class TokenizedProbes:
    """Token ids of probes.

    Attributes:
        ids: one list per probe, as long as the probe, not padded.
        truncated: the indices of the probes that were cut, ascending.
        lengths: tokens of each probe before any cut.
    """

    ids: list[list[int]]
    truncated: tuple[int, ...]
    lengths: tuple[int, ...]


def check_probes(probes: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``probes`` is a list of texts, none of them empty."""
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
) -> TokenizedProbes:
    """Token ids of every probe, cut on the right to ``max_length`` tokens.

    The ids are those of ``transformers``' ``tokenizer(probes, truncation=True, max_length=max_length)``. A
    special token written out in a probe, such as ``<|im_start|>``, becomes its one id.

    Args:
        tokenizer: as :func:`load_tokenizer` gives it.
        probes: the texts.
        max_length: most tokens of one probe, special tokens included.
        add_special_tokens: whether the tokenizer adds its own special tokens (Qwen2's adds none). Pass False
            for texts from :meth:`lora_delta.chat.ChatTemplate.apply_chat_template`, which have theirs already.

    Raises:
        ValueError: no probes; a single str instead of a list; a probe that is not a str, is empty, or has no
            tokens; a ``max_length`` that is not a positive integer or leaves no room beside the special
            tokens; a tokenizer with truncation or padding of its own.
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

    encodings = tokenizer.encode_batch(list(probes), add_special_tokens=False)
    lengths = tuple(len(encoding) + reserved for encoding in encodings)
    for index, (probe, encoding) in enumerate(zip(probes, encodings, strict=True)):
        if not len(encoding):
            raise ValueError(f"probe {index}, {shortened(probe)}, has no tokens: expected at least one")
        # Cut before the special tokens are added, so that a closing one survives.
        encoding.truncate(max_length - reserved)
    return TokenizedProbes(
        ids=[tokenizer.post_process(encoding, None, add_special_tokens).ids for encoding in encodings],
        truncated=tuple(index for index, length in enumerate(lengths) if length > max_length),
        lengths=lengths,
    )


def check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}: expected a str")
    if not text:
        raise ValueError(f"{name} is empty: expected a text with at least one token")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}, {shortened(text)}, is not valid Unicode: {error.reason}") from error


def shortened(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def checkpoint_file(folder: str | Path, name: str) -> Path:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: expected the folder of a checkpoint")
    return Path(folder) / name


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a text that can be read: {error}") from error


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}
