"""A checkpoint's chat template, rendered as transformers renders it, within limits."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_functional.files import parse_json, read_text

from . import sandbox
from .tokenization import (
    MOST_CHARACTERS,
    Probes,
    check_probes,
    check_text,
    checkpoint_file,
    load_tokenizer,
    tokenize_probes,
)
from .tokenizer_files import TokenizerConfig, shortened

_MOST_SOURCE = 1 << 20  # bytes of a template
_CPU_SECONDS, _SECONDS, _MEMORY = 5, 30, 1 << 29  # of the process that renders


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens that it may name.

    Templates come with checkpoints and are untrusted code: they are rendered in Jinja's immutable sandbox, in a
    separate process that ends when it takes more than a few seconds or half a GiB.

    Attributes:
        source: the Jinja text.
        special_tokens: variables for the template, such as ``eos_token``.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def apply_chat_template(
        self, conversation: str | Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model saw it in training; one user turn if it is a str.

        Returns what ``transformers``' ``tokenizer.apply_chat_template(..., tokenize=False)`` returns. A template
        that writes today's date makes probes that differ from day to day.

        Args:
            conversation: the user's text, or messages such as ``{"role": "user", "content": "..."}`` made of
                plain JSON values. Keys whose value is None count as absent.
            add_generation_prompt: whether to end with the header of the assistant's turn.
            variables: further ones for the template, with JSON values, such as Qwen3's ``enable_thinking=False``.

        Raises:
            ValueError: an empty conversation, a message without a role, something not made of JSON values, or a
                template that is not valid, fails, refuses the conversation, tries to leave the sandbox, takes too
                long or too much memory, or writes more than half a million characters.
        """
        return self.render([conversation], add_generation_prompt, **variables)[0]

    def render(
        self,
        conversations: Sequence[str | Sequence[Mapping[str, Any]]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[str]:
        """Several conversations, each rendered as in :meth:`apply_chat_template`, all in one process."""
        if "messages" in variables:
            raise ValueError("messages is the conversation's own variable: expected other names")
        given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        given |= _json_values(variables, "what the template is given")
        request = {
            "source": self.source,
            "conversations": [_messages(conversation) for conversation in conversations],
            "variables": {**self.special_tokens, **given},
            "most_characters": MOST_CHARACTERS,
        }
        answer = _in_the_sandbox(request)
        if "error" in answer:
            raise ValueError(f"the chat template {answer['error']}")
        return answer["texts"]


def load_chat_template(folder: str | Path) -> ChatTemplate:
    """A checkpoint folder's chat template.

    It is the file ``chat_template.jinja``, else the entry ``chat_template`` of ``tokenizer_config.json``: a
    str, or a list of ``{"name": ..., "template": ...}`` of which the one named ``default`` is used. Special
    tokens are those of :class:`.tokenizer_files.TokenizerConfig`.

    Raises:
        ValueError: there is no such folder, no template or no default one, or a file is malformed or too large.
    """
    path = checkpoint_file(folder, "chat_template.jinja")
    config = TokenizerConfig.read(folder)
    more = sorted(path.parent.glob("additional_chat_templates/*.jinja"))
    if more and not path.exists():  # in transformers they replace all that the config holds
        raise ValueError(f"{more[0]} exists without the default {path.name}: expected both or none")
    if path.exists():
        source: object = read_text(path, "a chat template", _MOST_SOURCE)
    else:
        source = config.fields.get("chat_template")
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
    if len(source) > _MOST_SOURCE:
        most = f"at most {_MOST_SOURCE:,}"
        raise ValueError(f"the chat template of {folder} has {len(source):,} characters: expected {most}")
    return ChatTemplate(source, config.named)


def read_probes(
    folder: str | Path,
    probes: Sequence[str],
    max_length: int,
    *,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Probes:
    """Token ids of probes from a checkpoint folder's tokenizer; with ``chat``, as user messages in its chat template.

    Args:
        chat_template_kwargs: further variables for that template, such as ``{"enable_thinking": False}``.

    Raises:
        ValueError: as :func:`load_tokenizer`, :func:`load_chat_template`, :meth:`ChatTemplate.apply_chat_template` and
            :func:`tokenize_probes` do; variables without ``chat``.
    """
    check_probes(probes)
    variables = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise ValueError(f"chat_template_kwargs is {shortened(variables)}: expected a mapping of names to JSON values")
    if variables and not chat:
        raise ValueError(f"chat_template_kwargs is {shortened(variables)} without chat: expected both")
    tokenizer = load_tokenizer(folder)
    if not chat:
        return tokenize_probes(tokenizer, probes, max_length)
    template = load_chat_template(folder)
    rendered = template.render(probes, **variables)
    tokenized = tokenize_probes(tokenizer, rendered, max_length, add_special_tokens=False)
    return dataclasses.replace(tokenized, texts=tuple(probes), chat=True, chat_template_kwargs=dict(variables))


def _in_the_sandbox(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of :func:`.sandbox.render`, from a process that finds the same packages as this one."""
    program = [sys.executable, "-S", "-P", sandbox.__file__, str(_CPU_SECONDS), str(_MEMORY)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    given = json.dumps(request).encode()
    try:
        done = subprocess.run(program, input=given, env=environment, capture_output=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {_SECONDS} s"}
    if done.returncode < 0:
        limits = f"{_CPU_SECONDS} s or {_MEMORY >> 20} MiB"
        return {"error": f"was ended by signal {-done.returncode}: expected one that takes less than {limits}"}
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return {"error": f"ended its process with status {done.returncode}: {last}"}
    return parse_json(done.stdout, "the answer of the process that renders chat templates")


def _messages(conversation: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation's messages, of JSON values only."""
    if isinstance(conversation, str):
        check_text(conversation, "conversation")
        return [{"role": "user", "content": conversation}]
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
        messages.append(_json_values(present, f"message {index}"))
    return messages


def _json_values(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not made of JSON values: {error}") from error
