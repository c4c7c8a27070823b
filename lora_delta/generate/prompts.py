"""Prompt files, and the names in them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from qwen_functional.files import parse_json, read_lines

from ..files import UNFINISHED
from ..probes.tokenization import check_text, shortened

_MOST_BYTES = 1 << 32  # of a file
_MOST_NAME_BYTES = 200  # file systems allow 255: a file that is being written has a longer name
# Not allowed in file names everywhere: separators, what Windows reserves, control characters, lone surrogates.
_ODD = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def read_prompts(
    path: Path, key: str = "adapter", check_name: Callable[[str], None] | None = None
) -> dict[str, list[str]]:
    """{name: prompts} from JSON lines ``{key: name, "prompts": [...]}``, or from plain text, one prompt per line.

    Plain lines are named ``prompt-0000`` and so on.

    Args:
        check_name: raises ``ValueError`` for an invalid name.

    Raises:
        ValueError: no such file, no prompts in it, or an invalid line, with its number.
    """
    numbered = [
        (number, line)
        for number, line in enumerate(read_lines(path, "prompts, one per line", _MOST_BYTES), 1)
        if line.strip()
    ]
    if not numbered:
        raise ValueError(f"{path} holds no prompts, expected one per line")
    read: dict[str, list[str]] = {}
    plain = not numbered[0][1].lstrip().startswith("{")
    for number, line in numbered:
        where = f"line {number} of {path}"
        name, prompts = (f"prompt-{len(read):04d}", [line]) if plain else _entry(line, key, where)
        if name in read:
            raise ValueError(f"{where} names {shortened(name)} again, expected a new {key!r} on each line")
        try:
            if check_name is not None:
                check_name(name)
            for index, prompt in enumerate(prompts):
                check_text(prompt, f"prompt {index}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        read[name] = prompts
    return read


def _entry(line: str, key: str, where: str) -> tuple[str, list[str]]:
    expected = f'{{"{key}": a name, "prompts": [...]}}'
    entry = parse_json(line, where, expected)
    name, prompts = (entry.get(key), entry.get("prompts")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(prompts, list) or not prompts:
        raise ValueError(f"{where} is {shortened(line)}, expected {expected}")
    return name, prompts


class FolderNames:
    """Checks names of folders in one place, for any system; each call takes a name."""

    def __init__(self) -> None:
        self._taken: dict[str, str] = {}

    def __call__(self, name: str) -> None:
        """Take a name.

        Raises:
            ValueError: it is empty, begins with a dot (as ``..`` does) or a space, ends with a dot, a space or the
                suffix of unfinished files, holds a separator or another character that some system refuses, is too
                long, is a Windows device, or differs from an earlier name only in case or in how accents are encoded,
                which some systems do not distinguish.
        """
        problem = None
        if not name or name != name.strip() or name[0] == "." or name[-1] == ".":
            problem = "a name that neither begins nor ends with a dot or a space"
        elif name.endswith(UNFINISHED):
            problem = f"a name that does not end with {UNFINISHED!r}, which marks unfinished ones"
        elif odd := _ODD.search(name):
            problem = f"a name without {odd[0]!r}"
        elif _DEVICES.fullmatch(name):
            problem = "a name that is not a Windows device"
        elif len(name.encode()) > _MOST_NAME_BYTES:
            problem = f"a name of at most {_MOST_NAME_BYTES} bytes"
        if problem is not None:
            raise ValueError(f"{shortened(name)} names a folder, expected {problem}")
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if folded in self._taken:
            before = shortened(self._taken[folded])
            raise ValueError(f"{shortened(name)} and {before} are one folder on some systems, expected distinct names")
        self._taken[folded] = name
