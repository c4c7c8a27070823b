"""A checkpoint's tokenizer files, read as transformers' AutoTokenizer reads them for a Qwen2 or Qwen3 model.

transformers 5 does not use all of ``tokenizer.json``: it builds a new ``Qwen2Tokenizer`` from the vocabulary, the
merges, the added tokens and the post-processor that it finds there. The normalizer (NFC) and pre-tokenizer are Qwen2's,
whatever the file holds. With ``model_type`` ``qwen2`` the tokenizer is always that one, whatever ``tokenizer_class``
says; for ``qwen3`` the class decides. See its models/auto/tokenization_auto.py, models/qwen2/tokenization_qwen2.py and
tokenization_utils_base.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from qwen_functional.files import read_json_object

MOST_BYTES = 1 << 25  # of a JSON file; Qwen2.5's tokenizer.json has 7 million
_MOST_ADDED_CHARACTERS = 1 << 20  # of all added tokens, which become one automaton
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")  # Qwen2Tokenizer's


@dataclass(frozen=True)
class TokenizerConfig:
    """``tokenizer_config.json``, with ``special_tokens_map.json`` and ``added_tokens.json`` where those apply.

    Attributes:
        fields: of ``tokenizer_config.json``; empty where there is none.
        named: special tokens by name, such as ``eos_token``.
        extra: special tokens without a name.
        added: {id: token} of ``added_tokens_decoder``, or of the older ``added_tokens.json``.
        replaces_added: whether ``added`` replaces the added tokens of ``tokenizer.json`` instead of extending them.
    """

    fields: Mapping[str, Any]
    named: Mapping[str, str]
    extra: tuple[str, ...]
    added: Mapping[int, AddedToken]
    replaces_added: bool

    @classmethod
    def read(cls, folder: str | Path) -> TokenizerConfig:
        """Read that of a checkpoint's folder.

        Raises:
            ValueError: a file that cannot be read, or a field with an invalid value; it names both.
        """
        folder, where = Path(folder), f"tokenizer_config.json of {folder}"
        fields = _read(folder / "tokenizer_config.json")
        for name in ("fast_tokenizer_files", "init_inputs"):
            if fields.get(name):
                raise ValueError(f"{name} in the {where} is {shortened(fields[name])}: expected none")
        replaces = "added_tokens_decoder" in fields
        older = {} if replaces else _read(folder / "special_tokens_map.json")
        values = {**fields, **older}
        named = {name: values.get(name, _DEFAULTS.get(name)) for name in _NAMED}
        # The model's own, such as image_token: a str takes precedence over the older file, an object does not.
        typed = {name: value for name, value in fields.items() if _is_typed(value)}
        own = {**typed, **older, **{name: value for name, value in typed.items() if isinstance(value, str)}}
        named |= {name: own[name] for name in own if name.endswith("_token") and name not in named}
        unnamed = []
        for extra in _extras(fields, older):
            if isinstance(extra, dict):
                named |= extra
            elif isinstance(extra, list):
                unnamed += extra
            else:
                raise ValueError(f"extra_special_tokens in the {where} is {shortened(extra)}: expected a list")
        tokens = {name: _token(value, name, where).content for name, value in named.items() if value is not None}
        others = tuple(_token(value, "extra_special_tokens", where).content for value in unnamed)
        if replaces:
            return cls(fields, tokens, others, _decoder(fields["added_tokens_decoder"], where), replaces)
        given = {tokens[name] for name in _NAMED if values.get(name)}  # without defaults
        return cls(fields, tokens, others, _older(folder, given | {*others}), replaces)

    def flag(self, name: str) -> bool:
        """A field that is true or false, by default false.

        Raises:
            ValueError: it is something else.
        """
        value = False if self.fields.get(name) is None else self.fields[name]
        if not isinstance(value, bool):
            raise ValueError(f"{name} in the tokenizer_config.json is {shortened(value)}: expected true or false")
        return value

    def tokens(self, of_file: Any, where: str) -> list[AddedToken]:
        """What is added to the vocabulary, in order.

        Args:
            of_file: ``added_tokens`` of tokenizer.json.
            where: that file, for errors.

        Raises:
            ValueError: entries that are not tokens, or too long in total.
        """
        by_id = dict(self.added)
        if not self.replaces_added:
            if not isinstance(of_file, list):
                raise ValueError(f"added_tokens in {where} is a {type(of_file).__name__}: expected a list")
            for entry in of_file:
                if not isinstance(entry, dict) or type(entry.get("id")) is not int:
                    raise ValueError(f"added_tokens in {where} holds {shortened(entry)}: expected a token with an id")
                fields = {name: value for name, value in entry.items() if name != "id"}
                by_id[entry["id"]] = _token(fields, "added_tokens", where)
        # Special ones are added again at the end, as in Qwen2Tokenizer: their ids stay, how they match may change.
        special = dict.fromkeys([*self.named.values(), *self.extra])
        tokens = [by_id[index] for index in sorted(by_id)] + [AddedToken(content, special=True) for content in special]
        if sum(len(token.content) for token in tokens) > _MOST_ADDED_CHARACTERS:
            most = f"{_MOST_ADDED_CHARACTERS:,} characters"
            raise ValueError(f"the added tokens of {where} are longer than {most} in total")
        return tokens


def require_qwen2(folder: Path, config: TokenizerConfig) -> None:
    """Refuse a checkpoint for which AutoTokenizer uses another tokenizer than Qwen2's.

    Raises:
        ValueError: it names the field that decides.
    """
    model = _read(folder / "config.json")
    model_type = model.get("model_type")
    chosen = config.fields.get("tokenizer_class")
    remote = config.fields.get("auto_map")
    if isinstance(remote, dict):
        remote = remote.get("AutoTokenizer")
    if model_type not in ("qwen2", "qwen3") and (model_type is not None or chosen not in _QWEN2):
        known = "expected 'qwen2' or 'qwen3'"
        raise ValueError(f"model_type in the config.json of {folder} is {shortened(model_type)}: {known}")
    declared = chosen or model.get("tokenizer_class")
    if model_type == "qwen3" and declared not in (None, *_QWEN2):
        raise ValueError(
            f"tokenizer_class in the tokenizer_config.json of {folder} is {shortened(declared)}, which decides for a "
            f"qwen3: expected one of {_QWEN2}"
        )
    if remote is not None and chosen not in (None, *_QWEN2):
        raise ValueError(
            f"auto_map and tokenizer_class in the tokenizer_config.json of {folder} name a custom tokenizer, "
            f"{shortened(chosen)}: expected Qwen2's"
        )


def check_post_processor(value: Any, where: str) -> None:
    """Refuse a post-processor that may repeat a text: a few nested ones would fill any memory.

    Raises:
        ValueError: an unknown type, or a template that does not hold the text exactly once.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "Sequence" and isinstance(value.get("processors"), list):
        for processor in value["processors"]:
            check_post_processor(processor, where)
    elif kind == "TemplateProcessing" and isinstance(value.get("single"), list):
        texts = [piece for piece in value["single"] if not isinstance(piece, dict) or "SpecialToken" not in piece]
        if len(texts) != 1:
            raise ValueError(f"post_processor in {where} holds the text {len(texts)} times: expected once")
    elif value is not None and kind not in ("ByteLevel", "BertProcessing", "RobertaProcessing"):
        raise ValueError(f"post_processor in {where} is {shortened(value)}: expected one that adds special tokens")


def shortened(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, most_bytes=MOST_BYTES) if path.exists() else {}


def _is_typed(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _extras(fields: Mapping[str, Any], older: Mapping[str, Any]) -> list[Any]:
    """The lists of special tokens, and {name: token}, under their older and newer names."""
    extras = [fields.get("extra_special_tokens") or fields.get("additional_special_tokens")]
    listed = isinstance(extras[0], list)
    extras.append(older.get("extra_special_tokens") or (None if listed else older.get("additional_special_tokens")))
    return [extra for extra in extras if extra is not None]


_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _token(value: Any, name: str, where: str) -> AddedToken:
    try:
        if isinstance(value, str):
            return AddedToken(value, special=True)
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            # For other fields, which AutoTokenizer ignores too, AddedToken writes to stdout.
            return AddedToken(**{key: given for key, given in value.items() if key in _TOKEN_FIELDS})
    except (TypeError, UnicodeEncodeError):  # a field of another type, half a surrogate pair
        pass
    raise ValueError(f"{name} in the {where} is {shortened(value)}: expected a str or an AddedToken")


def _decoder(value: Any, where: str) -> dict[int, AddedToken]:
    if not isinstance(value, dict) or not all(index.isdecimal() for index in value):
        raise ValueError(f"added_tokens_decoder in the {where} is {shortened(value)}: expected {{id: token}}")
    return {int(index): _token(token, "added_tokens_decoder", where) for index, token in value.items()}


def _older(folder: Path, special: set[str]) -> dict[int, AddedToken]:
    path, added = folder / "added_tokens.json", {}
    for content, index in _read(path).items():
        if type(index) is not int:
            raise ValueError(f"{path} has {shortened(index)} for {shortened(content)}: expected an id")
        added[index] = AddedToken(content, normalized=content not in special, special=content in special)
    return added
