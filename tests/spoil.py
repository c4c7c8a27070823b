"""Random ways to corrupt a file: as bytes, as JSON, as TOML, as lines, as a template, as an entry of a folder.

Every function draws only from the ``random.Random`` that it is given: the same seed gives the same file.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Raw:
    """A piece of JSON text that no Python value serializes to."""

    text: str


# Wrong values for almost any field.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 1e308, 1e-320, "", " ", "1", "null",
    "a" * 200_000, "\x00", "\ud800", "\u2028", "é́", [], {}, [[]], [None], [1, "a", {}], {"": {}}, {"a": 1},
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"), Raw("9" * 6000), Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 50_000 + "1" + "}" * 50_000), Raw("[" * 100_000), Raw(""), Raw("'a'"), Raw("0x10"),
)  # fmt: skip
PATHS = (
    "..", ".", "/", "../outside/file", "../../outside/file", "a/../../../outside/file", "~", "~/file", "/dev/zero",
    "/proc/self/mem", "{outside}/file", "..\\file", "con\x00trol", "a" * 300, "a/b", "a\nb", "**/*", "[", "embedded",
    "owner/name", "https://127.0.0.1/x",
)  # fmt: skip
REGEXES = (
    "(a+)+$", "(.*)*x", "(.|.)*$", r"(.*a){25}", r"((((.*)*)*)*)*!", r"^(([a-z_.0-9])+.)+[A-Z]([a-z])+$", "(?:", "[",
    "(?P<idx>a)(?P<idx>b)", "(?i)", "x{0,4294967295}", "((((((((((x{0,50}){0,50}){0,50}){0,50}", r"\Z(?=.*)", "(" * 500,
    r"(\w*\.?)*q_projj", r".*\.(q|v)_proj", ".*", "q_proj|" * 1000, "(?<=a+)b", r"(.)\1*\1*\1*\1*!", "",
)  # fmt: skip
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ messages | tojson(indent=10**9) }}", "{{ 'a' * 10**10 }}", "{{ ['a'] * 10**9 }}", "{{ 9 ** 9 ** 9 }}",
    "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=['x']) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}", "{{ 'a' | center(10**9) }}",
    "{{ lipsum(n=100000, max=10000) }}", "{{ range(10**9) | list }}", "{{ range(99999) | join(range(99999) | join) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch {ran}') }}",
    "{{ self.__init__.__globals__ }}", "{{ lipsum.__globals__['os'].popen('touch {ran}').read() }}",
    "{{ strftime_now.__globals__ }}", "{{ raise_exception.__globals__['json'] }}", "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}", "{{ namespace(__class__=1) }}", "{{ messages.append(1) }}",
    "{{ dict.update(messages) }}",
    "{{ (messages | map(attribute='__class__') | list)[0] }}", "{{ '{0.__class__}'.format(messages) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{{ raise_exception('no\nsuch') }}",
    "{{ undefined.x }}", "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
    "{{ strftime_now('%Y' * 10**8) }}", "{{ strftime_now('\x00') }}", "{{ 1 / 0 }}", "{{ {}['a'] }}", "{% if %}", "{{",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ 'a' | replace('', 'a' * 10**5) * 10**4 }}",
    "{% set x = '(' * 5000 %}{{ x }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "-" * 20_000 + "1 }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500, "{{ messages | sort(attribute='role') | batch(10**9, 1) | list }}",
    "{% break %}", "{% generation %}{{ 1 }}{% endgeneration %}", "{{ bos_token }}{{ eos_token }}",
    "{{ 'é' | wordwrap(1) }}",
    "{{ '\ud800' }}", "{{ 10 ** 5000 }}", "{{ [messages] * 99999 }}", "{{ messages | pprint }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ ('a' * 9999) | urlize }}", "{{ 'a' | indent(10**9) }}", "{{ ('<' * 9999) | striptags }}", "{{ 1 << 10**10 }}",
)  # fmt: skip


def spoiled_bytes(data: bytes, chance: Random) -> bytes:
    """One to three cuts, flips, insertions, zeros or copies."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(data) + 1)
        some = chance.choice((1, 1, 8, 100))
        match chance.randrange(8):
            case 0:
                data = data[:at]
            case 1 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
            case 2:
                data = data[:at] + chance.randbytes(some) + data[at:]
            case 3:
                data = data[:at] + bytes(some) + data[at + some :]
            case 4:
                data += chance.choice((b"\x00", b"}", b"\n", chance.randbytes(some)))
            case 5:
                data = data[:at] + data[at + some :]
            case 6:
                data = data[:at] + data[max(0, at - some) :]
            case _:  # the first 8 bytes, where some formats have a size
                data = chance.choice((b"\xff" * 8, bytes(8), chance.randbytes(8))) + data[8:]
    return data


def spoiled_json(text: str, chance: Random, words: Sequence[Any] = ()) -> bytes:
    """One to four changes to the value of a JSON text, written back as text, sometimes in another encoding.

    Args:
        words: what may replace a value, in addition to :data:`VALUES`.
    """
    value = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = _changed(value, chance, [*VALUES, *list(words) * (1 + len(VALUES) // max(1, len(words)))])
    return encoded(json_text(value), chance)


def json_text(value: Any) -> str:
    """The JSON of a value that may contain a :class:`Raw`."""
    raws: list[str] = []

    def marker(raw: Raw) -> str:
        raws.append(raw.text)
        return f"@raw-{len(raws) - 1}@"

    text = json.dumps(value, default=marker, indent=None)
    while raws and "@raw-" in text:  # they may be nested
        text = re.sub(r'"@raw-(\d+)@"', lambda found: raws[int(found[1])], text)
    return text


def _changed(value: Any, chance: Random, words: Sequence[Any]) -> Any:
    """``value`` with one change, at the end of a random walk down its nesting."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        if isinstance(value, dict):
            match chance.randrange(16):
                case 0:
                    return {k: v for k, v in value.items() if k != key}
                case 1:
                    return {(_text(chance.choice(words)) if k == key else k): v for k, v in value.items()}
                case 2:
                    return {**value, _text(chance.choice(words)): chance.choice(words)}
                case 3:
                    pairs = [*value.items(), (key, chance.choice(words))]
                    return Raw("{" + ",".join(f"{json.dumps(k)}:{json_text(v)}" for k, v in pairs) + "}")
                case 4:
                    return {**value, key: copy.deepcopy(value[chance.choice(list(value))])}
            return {**value, key: _changed(value[key], chance, words)}
        match chance.randrange(8):
            case 0:
                return value[:key] + value[key + 1 :]
            case 1:
                return value[:key] + [value[key]] * chance.choice((2, 3, 1000)) + value[key + 1 :]
            case 2:
                return chance.sample(value, len(value))
        return [*value[:key], _changed(value[key], chance, words), *value[key + 1 :]]
    match chance.randrange(8):
        case 0 | 1 if isinstance(value, (int, float)):
            return chance.choice((value + 1, value - 1, -value, value * 2, value * 1.5, str(value), not value))
        case 0 | 1 if isinstance(value, str):
            at = chance.randrange(len(value) + 1)
            return value[:at] + chance.choice(("", "x", "\x00", " ", "/", ".", "é", "\n", "\u2028")) + value[at + 1 :]
        case 2:
            return [value]
        case 3:
            return {"a": value}
    return chance.choice(words)


def _text(word: Any) -> str:
    return word if isinstance(word, str) else json_text(word)[:50]


def encoded(text: str, chance: Random) -> bytes:
    """Mostly UTF-8, sometimes with a byte order mark, in another encoding, or with extra characters around it."""
    plain = text.encode("utf-8", "surrogatepass")
    match chance.randrange(40):
        case 0:
            return b"\xef\xbb\xbf" + plain
        case 1:
            return text.encode("utf-16", "surrogatepass")
        case 2:
            return text.encode("latin-1", "replace") + b"\xe9"
        case 3:
            return plain + chance.choice((b"\x00", b"}", b"{}", b"\xff", b"\x1a"))
        case 4:
            return plain.replace(b"\n", b"\r\n")
        case 5:
            return plain.replace(b" ", b"\x0c")
        case 6:
            return spoiled_bytes(plain, chance)
    return plain


def spoiled_text(text: str, chance: Random, words: Sequence[str] = ()) -> bytes:
    """Lines dropped, doubled, swapped, cut, or with something inserted; or the text corrupted as bytes."""
    if chance.random() < 0.2:
        return spoiled_bytes(text.encode(), chance)
    lines = text.split("\n")
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(lines))
        line = lines[at]
        place = chance.randrange(len(line) + 1)
        match chance.randrange(7):
            case 0:
                lines = lines[:at] + lines[at + 1 :] or [""]
            case 1:
                lines.insert(at, line)
            case 2:
                lines[at] = line[:place]
            case 3:
                odd = ("\x00", "\u2028", "\x85", "\x0c", "\r", "\ufeff", "\t", '"', "\\", "{", "#", "\x1b[2J", "\ud800")
                lines[at] = line[:place] + chance.choice(odd) + line[place:]
            case 4 if words:
                lines[at] = chance.choice(words)
            case 5 if words:
                lines.insert(at, chance.choice(words))
            case _:
                lines[at] = line * (2 if len(line) > 1000 else chance.choice((2, 5000)))
    return encoded("\n".join(lines), chance)


def spoiled_json_lines(text: str, chance: Random, words: Sequence[Any] = ()) -> bytes:
    """One line corrupted as JSON, or the lines corrupted as lines."""
    if chance.random() < 0.4:
        return spoiled_text(text, chance, [word for word in words if isinstance(word, str)])
    lines = text.strip("\n").encode().split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = spoiled_json(lines[at].decode(), chance, words)
    return b"\n".join(lines) + b"\n"


def spoiled_toml(table: dict[str, Any], chance: Random, words: Sequence[Any] = ()) -> bytes:
    """A table, changed like JSON and written as TOML."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        changed = _changed(table, chance, [*VALUES, *words])
        table = changed if isinstance(changed, dict) else {"a": changed}
    text = toml_text(table)
    return spoiled_text(text, chance) if chance.random() < 0.15 else encoded(text, chance)


def toml_text(table: dict[str, Any]) -> str:
    """A table as TOML; what TOML cannot express is written as in JSON."""
    lines, tables = [], []
    for key, value in table.items():
        if isinstance(value, dict) and value:
            tables += [f"[{_toml_key(key)}]", *(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items())]
        else:
            lines.append(f"{_toml_key(key)} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json_text(value).replace("NaN", "nan").replace("Infinity", "inf")


def spoiled_safetensors(data: bytes, chance: Random) -> bytes:
    """Corrupts the header's JSON, the header's size, or bytes anywhere."""
    if chance.random() < 0.3:
        return spoiled_bytes(data, chance)
    size = int.from_bytes(data[:8], "little")
    words = ("F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "F99", [0, 0], [8, 4], [4], [2**40, 2**40], [0, 2**63])
    header = spoiled_json(data[8 : 8 + size].decode(), chance, words)
    said = len(header) if chance.random() < 0.9 else chance.choice((size, 0, 2**63, len(header) + 1))
    return said.to_bytes(8, "little") + header + data[8 + size :]


def spoiled_place(path: Path, chance: Random, outside: Path) -> None:
    """Replace a file by something else: nothing, no bytes, a folder, a link, also to a device, a pipe."""
    data = path.read_bytes()
    path.unlink()
    kinds: list[Callable[[], object]] = [
        lambda: None,
        lambda: path.write_bytes(b""),
        lambda: path.mkdir(),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to(outside / "nowhere"),
        lambda: path.symlink_to(outside / "file"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/null"),
        lambda: os.mkfifo(path),
        lambda: path.write_bytes(data * 2),
        lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        lambda: shutil.copytree(path.parent, path, ignore=shutil.ignore_patterns("*")),
    ]
    chance.choice(kinds)()
