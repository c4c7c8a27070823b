"""Chat texts against transformers; broken, failing and hostile templates."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHATML, TEXTS, edit_json, make_checkpoint
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lora_delta.probes import chat, sandbox
from lora_delta.probes.chat import ChatTemplate, load_chat_template, read_probes
from lora_delta.probes.tokenization import load_tokenizer, tokenize_probes
from qwen_functional.hub import resolve_checkpoint

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
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello <b>there</b> & 日本"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ],
    [{"role": "user", "content": "  \n hello \n"}],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


def assert_equal_to_transformers(folder: Path, prompts: tuple[bool, ...] = (True, False)) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_chat_template(folder)
    for prompt in prompts:
        expected = theirs.apply_chat_template(CONVERSATIONS, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(CONVERSATIONS, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_texts_equal_transformers(folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    assert_equal_to_transformers(folder)


def test_keys_of_a_message_that_are_none_count_as_absent(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES["tojson"])
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_chat_template(folder)
    with_none = [[{**message, "tool_calls": None} for message in messages] for messages in CONVERSATIONS]
    assert ours.render(with_none) == theirs.apply_chat_template(
        CONVERSATIONS, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("where", ["config", "list in config", "file and config"])
def test_the_template_is_found_where_transformers_finds_it(folder: Path, where: str) -> None:
    entries = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": CHATML}]
    edit_json(folder / "tokenizer_config.json", chat_template=entries if where == "list in config" else CHATML)
    if where == "file and config":
        (folder / "chat_template.jinja").write_bytes("\ufeff{{ messages[0].content }}\r\n in the file".encode("utf-8"))
        assert load_chat_template(folder).source == "{{ messages[0].content }}\r\n in the file"
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\n in the file")
    assert_equal_to_transformers(folder, prompts=(True,))


def test_chat_token_ids_equal_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", adds_special_tokens=True)
    (folder / "chat_template.jinja").write_text(CHATML)
    got = read_probes(folder, TEXTS, 256, chat=True)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert got.ids == theirs.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    assert (got.texts, got.chat, got.max_length, got.truncated) == (tuple(TEXTS), True, 256, ())
    rendered = load_chat_template(folder).render(TEXTS)
    assert got.ids == tokenize_probes(load_tokenizer(folder), rendered, 256, add_special_tokens=False).ids


THINKING = (
    CHATML + "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)  # like Qwen3's: an empty thinking block skips thinking


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"other": [1, None]}])
def test_variables_of_a_template_equal_transformers(folder: Path, variables: dict[str, Any]) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=THINKING)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_chat_template(folder)
    expected = theirs.apply_chat_template(CONVERSATIONS, tokenize=False, add_generation_prompt=True, **variables)
    assert ours.render(CONVERSATIONS, **variables) == expected
    assert ours.apply_chat_template(CONVERSATIONS[0], **variables) == expected[0]
    probes = read_probes(folder, TEXTS, 256, chat=True, chat_template_kwargs=variables)
    conversations = [[{"role": "user", "content": text}] for text in TEXTS]
    given: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False, **variables}
    assert probes.ids == theirs.apply_chat_template(conversations, **given)
    assert probes.chat_template_kwargs == variables


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chat_template_kwargs": {"a": 1}}, r"chat_template_kwargs is \{'a': 1\} without chat: expected both"),
        ({"chat": True, "chat_template_kwargs": [1]}, r"chat_template_kwargs is \[1\]: expected a mapping of names"),
        ({"chat": True, "chat_template_kwargs": {1: 1}}, "expected a mapping of names to JSON values"),
        ({"chat": True, "chat_template_kwargs": {"a": {1, 2}}}, "what the template is given is not made of JSON"),
        ({"chat": True, "chat_template_kwargs": {"messages": []}}, "messages is the conversation's own variable"),
    ],
)
def test_bad_variables_of_a_template_are_refused(folder: Path, given: dict[str, Any], message: str) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=CHATML)
    with pytest.raises(ValueError, match=message):
        read_probes(folder, TEXTS, 256, **given)


def test_a_text_is_one_turn_of_the_user() -> None:
    template = ChatTemplate(CHATML)
    one_turn = [{"role": "user", "content": "hi"}]
    assert template.apply_chat_template("hi") == template.apply_chat_template(one_turn)


@pytest.mark.parametrize("where", ["str", "AddedToken", "special_tokens_map.json", "defaults"])
def test_special_tokens_of_a_template_equal_transformers(tmp_path: Path, where: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", pad_token="<|endoftext|>")
    path = folder / "tokenizer_config.json"
    if where == "AddedToken":  # the format of older versions of transformers
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        token = {name: getattr(AddedToken("<|im_start|>", special=True), name) for name in fields}
        edit_json(path, bos_token={"__type": "AddedToken", **token}, unk_token=None, image_token="<image>")
    elif where == "special_tokens_map.json":
        path.write_text("{}")
        tokens = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<|im_start|>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    elif where == "defaults":
        path.unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATES["special tokens"])
    assert_equal_to_transformers(folder, prompts=(True,))
    assert load_chat_template(folder).special_tokens == AutoTokenizer.from_pretrained(folder).special_tokens_map


def test_a_template_needs_no_tokenizer_config(tmp_path: Path) -> None:
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
        ({"chat_template": "x" * (1 << 20) + "x"}, "has 1,048,577 characters: expected at most 1,048,576"),
        ({"chat_template": "x", "bos_token": 3}, "bos_token .* is 3: expected a str or an AddedToken"),
        ({"chat_template": "x", "eos_token": {"id": 3}}, "eos_token .* expected a str or an AddedToken"),
        ([1], r"tokenizer_config\.json holds a list, expected a JSON object"),
    ],
)
def test_a_missing_or_malformed_chat_template_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_chat_template(tmp_path)


def test_a_broken_template_file_or_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text, expected a chat template"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (1 << 20) + b"x")
    with pytest.raises(ValueError, match=r"chat_template\.jinja has 1,048,577 bytes, expected"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("x")
    with pytest.raises(ValueError, match=r"rag\.jinja exists without the default chat_template\.jinja"):
        load_chat_template(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load_chat_template(tmp_path / "nowhere")


# --- What a template may do ---------------------------------------------------------------------------------


def in_this_process(source: str, content: str = "hi") -> dict[str, Any]:
    """What the other process would answer, computed in this one: for harmless templates."""
    messages = [{"role": "user", "content": content}]
    request = {"source": source, "conversations": [messages], "variables": {"tools": None}, "most_characters": 1000}
    answer = sandbox.render(request)
    assert messages == [{"role": "user", "content": content}]
    return answer


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
def test_a_template_stays_in_the_sandbox(source: str) -> None:
    assert in_this_process(source)["error"].startswith("failed: ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages.append(1) }}", "failed: SecurityError"),
        ("{{ raise_exception('roles must alternate') }}", "failed: TemplateError: roles must alternate"),
        ("{{ messages[0].content + none }}", "failed: TypeError"),
        ("{{ nothing.at.all }}", "failed: UndefinedError: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{% include 'x' %}", "failed: TypeError: no loader"),
        ("{{ messages | tojson(indent=[]) }}", "failed: TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed: RecursionError"),
        ("{% for i in range(1001) %}x{% endfor %}", "failed: ValueError: a text of more than 1,000 characters"),
        ("{% for %}", "is not valid Jinja, line 1"),
        ("{{ 'open", "is not valid Jinja, line 1"),
        ("{% generation %}no end", "is not valid Jinja, line 1"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "is not valid Jinja, RecursionError"),
    ],
)
def test_a_failing_template_says_why(source: str, message: str) -> None:
    assert in_this_process(source)["error"].startswith(message)


def test_an_error_of_the_template_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="the chat template failed: TemplateError: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").apply_chat_template("hi")
    with pytest.raises(ValueError, match="the chat template is not valid Jinja, line 1"):
        ChatTemplate("{% if %}").apply_chat_template("hi")


BOMBS = {
    "loops in loops": "{% set r = range(100000) %}" + "{% for i in r %}" * 5 + "{% endfor %}" * 5,
    "a constant": "{{ 9 ** (9 ** 9) }}",
    "a long string": "{{ 'x' * 10 ** 9 }}",
    "indentation": "{{ messages | tojson(indent=10 ** 9) }}",
    "doubling": (
        "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "padding": "{{ 'x' | center(10 ** 9) }}",
    "formatting": "{{ '%1000000000d' % 1 }}",
    "a list": "{{ [0] * 10 ** 9 }}",
    "what it writes": "{% for i in range(99999) %}{% for i in range(99) %}x{% endfor %}{% endfor %}",
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are not kept everywhere")
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_is_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_CPU_SECONDS", 1)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ValueError, match=r"the chat template (failed|is not valid Jinja|was ended by signal)"):
        ChatTemplate(BOMBS[name]).apply_chat_template("hi")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4
    assert after.ru_maxrss <= max(before.ru_maxrss, 1 << 20)  # KiB


def test_a_template_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0.001)  # less than Python needs to start
    with pytest.raises(ValueError, match=r"the chat template took more than 0\.001 s"):
        ChatTemplate("x").apply_chat_template("hi")


def test_the_other_process_finds_what_this_one_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise RuntimeError('the module of another folder')")
    monkeypatch.chdir(elsewhere)  # nothing is imported from the working directory
    monkeypatch.setenv("PYTHONPATH", os.fspath(elsewhere))
    assert ChatTemplate("{{ messages[0].content }}").apply_chat_template("é 日本") == "é 日本"


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
def test_a_bad_conversation_is_refused(conversation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(CHATML).apply_chat_template(conversation)


@pytest.mark.real_checkpoint
def test_real_conversations_equal_transformers(real_checkpoint: str) -> None:
    folder = resolve_checkpoint(real_checkpoint)
    if AutoTokenizer.from_pretrained(folder).chat_template is None:
        pytest.skip("this checkpoint has no chat template")
    assert_equal_to_transformers(folder)
