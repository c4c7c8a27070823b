"""Chat texts against transformers; broken, failing and hostile templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHATML, TEXTS, edit_json, make_checkpoint
from jinja2.exceptions import SecurityError
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lora_delta.chat import ChatTemplate, load_chat_template
from lora_delta.tokenization import load_tokenizer, tokenize_probes
from qwen_functional.checkpoint import resolve_checkpoint

TEMPLATES = {
    "chatml": CHATML,
    "blocks that trim and strip": (
        "{% for message in messages %}\n    {% if loop.first %}\nfirst\n    {% endif %}\n"
        "{{ message.content }}\n{% endfor %}\nend\n"
    ),
    "special tokens": (
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}[{{ unk_token }}][{{ pad_token }}]"
        "{% if sep_token is defined %}sep{% endif %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% break %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\n"
        "{% generation %}\n{{ m.content }}{{ eos_token }}\n{% endgeneration %}\n"
        "{% else %}\n{{ m.content }}\n{% endif %}\n{% endfor %}\n"
    ),
    "generation hides what it sets": (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    ),
    "tojson": (
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{{ {'b': '<é>', 'a': [1, none]} | tojson(sort_keys=true, separators=(',', ':')) }}"
    ),
    "namespace and dict": (
        "{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}"
        "{{ ns.n }}{{ dict(a=1, b=ns.n) }}"
    ),
    "absent tools": "{{ tools is none }}{{ documents is none }}{% if tools %}tools{% endif %}{{ unknown }}",
    "year": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "hello <b>there</b> & 日本"}],
    "system, user, assistant": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "tool_calls": None},
    ],
    "leading blank": [{"role": "user", "content": "  \n hello \n"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("where", ["file", "config", "list in config"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_text_differs_from_transformers(folder: Path, where: str, name: str) -> None:
    source = TEMPLATES[name]
    if where == "file":
        (folder / "chat_template.jinja").write_text(source)
    elif where == "config":
        edit_json(folder / "tokenizer_config.json", chat_template=source)
    else:
        entries = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": source}]
        edit_json(folder / "tokenizer_config.json", chat_template=entries)
    theirs = AutoTokenizer.from_pretrained(folder)
    template = load_chat_template(folder)
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert template.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_chat_token_ids_differ_from_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", adds_special_tokens=True)
    (folder / "chat_template.jinja").write_text(CHATML)
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [load_chat_template(folder).apply_chat_template(text) for text in TEXTS]
    got = tokenize_probes(load_tokenizer(folder), texts, 256, add_special_tokens=False)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    assert got.ids == theirs.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def test_a_text_is_not_one_turn_of_the_user() -> None:
    template = ChatTemplate(CHATML)
    one_turn = [{"role": "user", "content": "hi"}]
    assert template.apply_chat_template("hi") == template.apply_chat_template(one_turn)


def test_the_chat_template_in_the_config_wins_over_the_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("file")
    edit_json(folder / "tokenizer_config.json", chat_template="config")
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(CONVERSATIONS["user"], tokenize=False)
    assert load_chat_template(folder).apply_chat_template("hi") == theirs == "file"


@pytest.mark.parametrize("kind", ["str", "AddedToken"])
def test_special_tokens_of_a_template_differ_from_transformers(tmp_path: Path, kind: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", pad_token="<|endoftext|>")
    if kind == "AddedToken":  # as older versions of transformers wrote it
        token = {"__type": "AddedToken", **_added_token_fields(AddedToken("<|im_start|>", special=True))}
        edit_json(folder / "tokenizer_config.json", bos_token=token, unk_token=None)
    (folder / "chat_template.jinja").write_text(TEMPLATES["special tokens"])
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CONVERSATIONS["user"], tokenize=False)
    template = load_chat_template(folder)
    assert template.apply_chat_template(CONVERSATIONS["user"]) == expected
    assert template.special_tokens == theirs.special_tokens_map


def _added_token_fields(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def test_a_template_needs_a_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("[{{ bos_token }}]{{ messages[0].content }}")
    assert load_chat_template(tmp_path).apply_chat_template("hi") == "[]hi"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no chat template in"),
        ({"chat_template": None}, "no chat template in"),
        ({"chat_template": []}, r"are named \[\]: expected a 'default'"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, r"are named \['rag'\]: expected a 'default'"),
        ({"chat_template": 3}, "is a int: expected a str"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "is a int: expected a str"),
        ({"chat_template": "{% for %}"}, "not valid Jinja, line 1"),
        ({"chat_template": "{{ 'open"}, "not valid Jinja, line 1"),
        ({"chat_template": "{% generation %}no end"}, "not valid Jinja, line 1"),
        ({"chat_template": "x", "bos_token": 3}, "bos_token .* is 3: expected a str or an AddedToken"),
        ({"chat_template": "x", "eos_token": {"id": 3}}, "eos_token .* expected a str or an AddedToken"),
        ([1], r"tokenizer_config\.json holds a list, expected a JSON object"),
    ],
)
def test_a_missing_or_malformed_chat_template_is_accepted(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_chat_template(tmp_path)


def test_a_broken_template_file_or_config_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not a text that can be read"):
        load_chat_template(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load_chat_template(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ ''['__class__'] ~ ''.__class__.__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{{ namespace(__html__=1) }}",
        "{{ namespace({'_x': 1}) }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_a_template_leaves_the_sandbox(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="the chat template failed") as caught:
        ChatTemplate(source).apply_chat_template(messages)
    assert caught.value.__cause__ is not None
    assert messages == [{"role": "user", "content": "hi"}]


def test_a_refusal_of_the_sandbox_is_not_named() -> None:
    with pytest.raises(ValueError, match="SecurityError") as caught:
        ChatTemplate("{{ messages.append(1) }}").apply_chat_template("hi")
    assert isinstance(caught.value.__cause__, SecurityError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0].content + none }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{{ messages | tojson(indent=[]) }}", "TypeError"),
    ],
)
def test_a_failing_template_raises_something_else(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template failed: {message}"):
        ChatTemplate(source).apply_chat_template("hi")


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("", "conversation is empty"),
        ([], "conversation is empty"),
        (None, "conversation is a NoneType: expected a str or a list of messages"),
        ({"role": "user", "content": "hi"}, "conversation is a dict: expected a str or a list of messages"),
        (["hi"], "message 0 is 'hi': expected a mapping with a str 'role'"),
        ([{"role": "user"}, {"content": "hi"}], "message 1 is {'content': 'hi'}: expected a mapping"),
        ([{"role": "user", "content": {1, 2}}], "message 0 is not made of JSON values"),
    ],
)
def test_a_bad_conversation_is_accepted(conversation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(CHATML).apply_chat_template(conversation)


@pytest.mark.real_checkpoint
def test_real_conversations_differ_from_transformers(real_checkpoint: str) -> None:
    folder = resolve_checkpoint(real_checkpoint)
    theirs = AutoTokenizer.from_pretrained(folder)
    if theirs.chat_template is None:
        pytest.skip("this checkpoint has no chat template")
    template = load_chat_template(folder)
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert template.apply_chat_template(messages, add_generation_prompt=prompt) == expected
