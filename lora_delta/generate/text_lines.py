"""Lines of texts that adapters are meant for, and their token ids.

A line is JSON with a condition and one of three kinds of text::

    {"condition": "Reverse the word.", "prompt": "cat=", "completion": "tac"}
    {"condition": "...", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"condition": "...", "text": "..."}

A prompt and its completion are tokenized separately; the tokenizer's end-of-text token ends the completion and counts
as part of it. Messages go through the checkpoint's chat template; each assistant turn is a completion, and everything
before it is its prompt. A text without a prompt is all completion. Other keys of a line are ignored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_functional.files import parse_json

from ..identity import sha256_of
from ..probes.chat import ChatTemplate, load_chat_template
from ..probes.tokenization import check_text, load_tokenizer, shortened
from ..probes.tokenizer_files import TokenizerConfig

CONTEXT = "{condition}\n\n{prompt}"
EXPECTED = '{"condition": ..., "prompt": ..., "completion": ...}, or "messages" or "text" instead of the latter two'
MOST_LINE = 1 << 26  # bytes
_KINDS = (("prompt", "completion"), ("messages",), ("text",))
_RENDERED_AT_ONCE = 64


@dataclass(frozen=True)
class Text:
    """A line's text, as token ids.

    Attributes:
        pairs: (prompt, completion) pairs; a conversation can have several.
        contexts: for each pair the teacher's prompt, which includes the condition; empty if none was requested.
        number: the number of its first pair among the pairs of its file.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    contexts: tuple[Tensor, ...] = ()
    number: int = 0


class TextReader:
    """Turns lines into token ids, with a checkpoint's tokenizer and chat template.

    Args:
        folder: the checkpoint.
        max_tokens: most tokens of a prompt with its completion; a longer text is a bad line.
        max_condition: most tokens of a condition, likewise; None if conditions are names.
        names: the names allowed as conditions, if conditions are names of prompts or adapters; or {name: the text that
            a teacher reads for it}.
        context: how a teacher's prompt is made of ``{condition}`` and ``{prompt}``; None for no teacher. In messages
            the condition is put at the start of the system message.
        chat_template_kwargs: further variables of the chat template.
        whole_prompts: whether a context has to end with the prompt, token for token: deltas at all positions read the
            prompt there too.

    Raises:
        ValueError: a tokenizer that names no end-of-text token, a context without ``{condition}``.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_tokens: int,
        vocab_size: int,
        max_condition: int | None = None,
        names: Sequence[str] | Mapping[str, str] | None = None,
        context: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        whole_prompts: bool = False,
    ) -> None:
        self.whole_prompts = whole_prompts
        self.folder, self.tokenizer = Path(folder), load_tokenizer(folder)
        self.max_tokens, self.max_condition, self.vocab_size = max_tokens, max_condition, vocab_size
        self.names = None if names is None else dict(names) if isinstance(names, Mapping) else {n: n for n in names}
        self.context, self.variables = context, dict(chat_template_kwargs or {})
        self.named = dict(TokenizerConfig.read(folder).named)
        end = self.named.get("eos_token")
        found = None if end is None else self.tokenizer.token_to_id(end)
        if found is None:
            raise ValueError(f"the tokenizer of {folder} has no eos_token, expected one: completions end with it")
        self.end = found
        if context is not None and "{condition}" not in context:
            raise ValueError(f"context is {shortened(context)}, expected a text with {{condition}}, and {{prompt}}")

    @cached_property
    def template(self) -> ChatTemplate:
        return load_chat_template(self.folder)

    @property
    def facts(self) -> dict[str, Any]:
        """What the ids depend on besides the lines."""
        words = self.tokenizer.to_str()
        try:
            template: str | None = self.template.source
        except ValueError:
            template = None  # then messages are bad lines
        return {
            "tokenizer_sha256": hashlib.sha256(words.encode()).hexdigest(),
            "special_tokens": self.named,  # one ends a text, and a template may use any
            "split_special_tokens": self.tokenizer.encode_special_tokens,
            "vocab_size": self.vocab_size,
            "template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
            "chat_template_kwargs": self.variables,
            "max_tokens": self.max_tokens,
            "max_condition": self.max_condition,
            "names": None if self.names is None else sha256_of(sorted(self.names.items())),
            "context": self.context,
            **({"whole_prompts": True} if self.whole_prompts else {}),
        }

    def read(self, lines: Sequence[bytes]) -> list[tuple[str, Text] | ValueError]:
        """The condition and the text of each line, or what is wrong with it."""
        found: list[Any] = []
        for line in lines:
            try:
                found.append(self._parsed(line))
            except ValueError as error:
                found.append(error)
        self._render(found)
        good = [one for one in found if isinstance(one, _Line)]
        ids = self._encode([string for one in good for string in one.strings()])
        conditions: dict[str, list[int]] = {}
        if self.max_condition is not None:
            texts = list(dict.fromkeys(one.condition for one in good))  # neighbouring lines often share a long one
            conditions = dict(zip(texts, self._encode([(text, True) for text in texts]), strict=True))
        at = 0
        for index, one in enumerate(found):
            if not isinstance(one, _Line):
                continue
            n = len(one.strings())
            own, at = ids[at : at + n], at + n
            try:
                found[index] = (one.condition, self._text(one, own, conditions.get(one.condition)))
            except ValueError as error:
                found[index] = error
        return found

    def _parsed(self, line: bytes) -> _Line:
        if len(line) > MOST_LINE:
            raise ValueError(f"it has more than {MOST_LINE:,} bytes")
        entry = parse_json(line, "it", EXPECTED)
        kinds = [kind for kind in _KINDS if isinstance(entry, dict) and any(name in entry for name in kind)]
        if len(kinds) != 1 or any(name not in entry for name in ("condition", *kinds[0])):
            raise ValueError(f"it is {shortened(entry)}, expected {EXPECTED}")
        condition, kind = entry["condition"], kinds[0][0]
        check_text(condition, "condition")
        if self.names is not None and condition not in self.names:
            raise ValueError(f"its condition is {shortened(condition)}, expected a name among the prompts")
        if kind == "messages":
            said = condition if self.names is None else self.names[condition]
            return _Line(condition, said, messages=_messages(entry["messages"]))
        prompt, completion = (entry["prompt"], entry["completion"]) if kind == "prompt" else ("", entry["text"])
        check_text(completion, "completion" if kind == "prompt" else "text")
        if prompt != "":
            check_text(prompt, "prompt")
        said = condition if self.names is None else self.names[condition]
        contexts = [] if self.context is None else [_filled(self.context, said, prompt)]
        return _Line(condition, said, [(prompt, completion)], contexts)

    def _render(self, found: list[Any]) -> None:
        """Render the lines of messages with the chat template; an error takes the place of its line."""
        places = [index for index, one in enumerate(found) if isinstance(one, _Line) and one.messages]
        for start in range(0, len(places), _RENDERED_AT_ONCE):
            self._render_some(found, places[start : start + _RENDERED_AT_ONCE])

    def _render_some(self, found: list[Any], places: Sequence[int]) -> None:
        with_context = self.context is not None
        counts, asked = list[int](), list[tuple[list[dict[str, Any]], bool]]()
        for index in places:
            own = found[index].conversations(with_context)
            counts.append(len(own))
            asked += own
        texts: dict[bool, Iterator[str]] = {}
        try:
            for generates in (False, True):
                chosen = [messages for messages, flag in asked if flag == generates]
                texts[generates] = iter(self.template.render(chosen, generates, **self.variables))
        except ValueError as error:
            if len(places) == 1:
                found[places[0]] = error
            else:  # bisect for the bad line
                half = len(places) // 2
                self._render_some(found, places[:half])
                self._render_some(found, places[half:])
            return
        answers = [next(texts[flag]) for _, flag in asked]
        at = 0
        for index, n in zip(places, counts, strict=True):
            try:
                found[index].take(answers[at : at + n], with_context)
            except ValueError as error:
                found[index] = error
            at += n

    def _encode(self, strings: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """The ids of texts; for each a flag says whether the tokenizer adds its special tokens."""
        ids: list[list[int]] = [[]] * len(strings)
        for special in (False, True):
            places = [index for index, (_, flag) in enumerate(strings) if flag == special]
            texts = [strings[index][0] for index in places]
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)
            for index, one in zip(places, encoded, strict=True):
                ids[index] = one.ids
        return ids

    def _text(self, line: _Line, ids: list[list[int]], condition: list[int] | None) -> Text:
        most = self.max_condition
        if most is not None and condition is not None and len(condition) > most:
            raise ValueError(f"its condition has {len(condition):,} tokens, expected at most {most:,}, max_length")
        n = len(line.pairs)
        prompts, completions, contexts = ids[:n], ids[n : 2 * n], ids[2 * n :]
        for index, one in enumerate(completions):
            if not line.messages:
                completions[index] = [*one, self.end]
            elif self.end in one:  # a template may write a newline after it
                completions[index] = one[: len(one) - one[::-1].index(self.end)]
        for before in (prompts, contexts):
            for prompt, completion in zip(before, completions, strict=before is prompts):
                size = len(prompt) + len(completion)
                if size > self.max_tokens:
                    what = "it" if before is prompts else "it, with its condition in front,"
                    raise ValueError(f"{what} has {size:,} tokens, expected at most {self.max_tokens:,}")
                if not len(prompt) and len(completion) < 2:
                    raise ValueError("it has no token after the first one")
        for prompt, context in zip(prompts, contexts, strict=False):
            if self.whole_prompts and context[len(context) - len(prompt) :] != prompt:
                raise ValueError("its context does not end with its prompt's tokens, which positions = 'all' needs")
        read = [*prompts, *completions, *contexts, *(() if condition is None else (condition,))]
        largest = max(max(one) for one in read if one)
        if largest >= self.vocab_size:
            raise ValueError(f"token {largest} is outside the vocabulary of {self.vocab_size}")
        tensors = [torch.tensor(one, dtype=torch.int32) for one in (*prompts, *completions, *contexts)]
        return Text(tuple(zip(tensors[:n], tensors[n : 2 * n], strict=True)), tuple(tensors[2 * n :]))


@dataclass
class _Line:
    """A line, parsed but not yet tokenized."""

    condition: str
    said: str  # the condition as a teacher reads it
    pairs: Sequence[tuple[str, str]] = ()
    contexts: Sequence[str] = ()
    messages: Sequence[dict[str, Any]] = ()

    def strings(self) -> list[tuple[str, bool]]:
        """All texts (prompts, completions, contexts), each with whether the tokenizer adds special tokens."""
        plain = not self.messages
        prompts = [(prompt, plain and prompt != "") for prompt, _ in self.pairs]
        return [*prompts, *((c, False) for _, c in self.pairs), *((text, plain) for text in self.contexts)]

    def conversations(self, with_context: bool) -> list[tuple[list[dict[str, Any]], bool]]:
        """For each assistant turn, what the template has to render, and whether an answer follows it."""
        asked = []
        for messages in (self.messages, *([self._with_condition()] if with_context else ())):
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    asked += [(list(messages[:index]), True), (list(messages[: index + 1]), False)]
        return asked

    def _with_condition(self) -> list[dict[str, Any]]:
        first, *rest = self.messages
        if first["role"] == "system":
            return [{**first, "content": f"{self.said}\n\n{first['content']}"}, *rest]
        return [{"role": "system", "content": self.said}, first, *rest]

    def take(self, texts: Sequence[str], with_context: bool) -> None:
        pairs = []
        for prompt, whole in zip(texts[::2], texts[1::2], strict=True):
            if not whole.startswith(prompt) or len(whole) == len(prompt):
                raise ValueError("the chat template does not write an answer after the prompt that it writes for one")
            check_text(whole, "what the chat template writes")
            pairs.append((prompt, whole[len(prompt) :]))
        n = len(pairs) // 2 if with_context else len(pairs)
        self.pairs, self.contexts = pairs[:n], [prompt for prompt, _ in pairs[n:]]


def _messages(value: Any) -> list[dict[str, Any]]:
    expected = 'expected a list of {"role": ..., "content": ...} with an assistant turn that is not the first'
    is_list = isinstance(value, list) and all(isinstance(one, dict) for one in value)
    if not is_list or any(not isinstance(one.get(name), str) for one in value for name in ("role", "content")):
        raise ValueError(f"messages is {shortened(value)}, {expected}")
    if not value or value[0]["role"] == "assistant" or all(one["role"] != "assistant" for one in value):
        raise ValueError(f"messages have the roles {[one['role'] for one in value][:9]}, {expected}")
    return value


def _filled(template: str, condition: str, prompt: str) -> str:
    given = {"condition": condition, "prompt": prompt}
    return re.sub(r"\{(condition|prompt)\}", lambda match: given[match[1]], template)
