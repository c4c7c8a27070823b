"""A checkpoint's chat template, rendered as transformers renders it, in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .tokenization import (
    TokenizedProbes,
    check_probes,
    check_text,
    checkpoint_file,
    load_tokenizer,
    read_text,
    read_tokenizer_config,
    shortened,
    tokenize_probes,
)

# The names under which transformers hands special tokens to a template (PreTrainedTokenizerBase).
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens that it may name.

    Templates come with checkpoints and are code that was written by others: they are rendered in Jinja's
    immutable sandbox.

    Attributes:
        source: the Jinja text.
        special_tokens: variables for the template, such as ``eos_token``.

    Raises:
        ValueError: ``source`` is not a valid template.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    _compiled: Template = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            compiled = _environment().from_string(self.source)
        except TemplateSyntaxError as error:
            where = f"line {error.lineno}: {error.message}"
            raise ValueError(f"the chat template is not valid Jinja, {where}") from error
        object.__setattr__(self, "_compiled", compiled)

    def apply_chat_template(
        self, conversation: str | Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model saw it in training; one user turn if it is a str.

        Gives what ``transformers``' ``tokenizer.apply_chat_template(..., tokenize=False)`` gives. A template
        that writes today's date makes probes that differ from day to day.

        Args:
            conversation: the user's text, or messages such as ``{"role": "user", "content": "..."}`` made of
                plain JSON values. Keys whose value is None count as absent.
            add_generation_prompt: whether to end with the header of the assistant's turn.

        Raises:
            ValueError: an empty conversation, a message without a role or not made of JSON values, or a
                template that fails, refuses the conversation or tries to leave the sandbox.
        """
        if isinstance(conversation, str):
            check_text(conversation, "conversation")
            conversation = [{"role": "user", "content": conversation}]
        messages = _plain_messages(conversation)
        try:
            return self._compiled.render(
                **self.special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template can raise whatever Python can
            raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error


def load_chat_template(folder: str | Path) -> ChatTemplate:
    """A checkpoint folder's chat template.

    It is the file ``chat_template.jinja``, else the entry ``chat_template`` of ``tokenizer_config.json``: a
    str, or a list of ``{"name": ..., "template": ...}`` of which the one named ``default`` is used. Special
    tokens come from ``tokenizer_config.json``.

    Raises:
        ValueError: there is no such folder, no template or no default one, or a file or the template is
            malformed.
    """
    path = checkpoint_file(folder, "chat_template.jinja")
    config = read_tokenizer_config(folder)
    source: object = read_text(path) if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        # As in transformers, the last of several entries with one name counts.
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        if "default" not in named:
            names = list(named)
            raise ValueError(f"the chat templates of {folder} are named {names}: expected a 'default'")
        source = named["default"]
    if source is None:
        raise ValueError(
            f"no chat template in {folder}: expected the file chat_template.jinja, or an entry chat_template "
            "in tokenizer_config.json; base models often have none"
        )
    if not isinstance(source, str):
        raise ValueError(f"the chat template of {folder} is a {type(source).__name__}: expected a str")
    special_tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if isinstance(token, str):
            special_tokens[name] = token
        elif config.get(name) is not None:
            raise ValueError(
                f"{name} in the tokenizer_config.json of {folder} is {config[name]!r}: "
                "expected a str or an AddedToken"
            )
    return ChatTemplate(source, special_tokens)


def read_probes(folder: str | Path, probes: Sequence[str], max_length: int, *, chat: bool = False) -> TokenizedProbes:
    """Token ids of probes by a checkpoint folder's tokenizer, with ``chat`` as user's messages in its chat template.

    Raises:
        ValueError: as :func:`load_tokenizer`, :func:`load_chat_template` and :func:`tokenize_probes` do.
    """
    check_probes(probes)
    tokenizer = load_tokenizer(folder)
    if chat:
        template = load_chat_template(folder)
        probes = [template.apply_chat_template(probe) for probe in probes]
    return tokenize_probes(tokenizer, probes, max_length, add_special_tokens=not chat)


def _plain_messages(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy made of JSON values alone: other objects have methods of which the sandbox knows nothing."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, (bytes, bytearray)):
        kind = type(conversation).__name__
        raise ValueError(f"conversation is a {kind}: expected a str or a list of messages")
    if not conversation:
        raise ValueError("conversation is empty: expected at least one message")
    messages = []
    for index, message in enumerate(conversation):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} is {shortened(message)}: expected a mapping with a str 'role'")
        present = {key: value for key, value in message.items() if value is not None}
        try:
            messages.append(json.loads(json.dumps(present)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"message {index} is not made of JSON values: {error}") from error
    return messages


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``: the words to train on; here a plain block."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateNamespace(Namespace):
    """Jinja's ``namespace()`` without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be a name in the namespace
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's namespace cannot hold the name {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to chat templates (transformers.utils.chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _TemplateNamespace
    # The class itself would let a template call dict.update on what it must not change.
    environment.globals["dict"] = _make_dict
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
