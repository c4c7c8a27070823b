"""Reading and checking text and JSON: one way for all files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 28  # of a text file; what is read here is configs, indexes, templates, lists


def read_text(path: str | Path, expected: str = "a text file", most_bytes: int = MOST_BYTES) -> str:
    """The text of a file, in UTF-8 with or without a byte order mark.

    Args:
        expected: what the file should be, for the errors.
        most_bytes: a larger file is refused before it is read.

    Raises:
        ValueError: the file does not exist, is not a regular one, is too large, cannot be read or is not UTF-8; the
            message names it.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ValueError(f"{path} does not exist, expected {expected}")
        if not path.is_file():  # reading a pipe or a device may never end
            raise ValueError(f"{path} is not a file, expected {expected}")
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"{path} has {size:,} bytes, expected {expected} of at most {most_bytes:,}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, expected {expected}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read, expected {expected}: {error}") from error


def read_lines(path: str | Path, expected: str = "a text file", most_bytes: int = MOST_BYTES) -> list[str]:
    """The lines of a file, as :func:`read_text` reads it: each ends at ``\\n`` or ``\\r\\n``, and nowhere else.

    ``str.splitlines`` also splits at form feeds, U+0085 and U+2028, which may occur in a JSON string or a prompt.
    """
    lines = read_text(path, expected, most_bytes).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def parse_json(text: str | bytes, where: str, expected: str = "JSON") -> Any:
    """The value of a JSON text, in UTF-8 with or without a byte order mark where it is bytes.

    Raises:
        ValueError: not JSON, nested too deeply or with a number too long for Python; the message names ``where``.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply, expected {expected}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON, expected {expected}: {error}") from error


def read_json_object(
    path: str | Path, expected: str = "a JSON object", most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """The JSON object in a file, as :func:`read_text` reads it.

    Raises:
        ValueError: the file does not exist, cannot be read, is not JSON, or holds something other than an object.
    """
    fields = parse_json(read_text(path, expected, most_bytes), str(path), expected)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected {expected}")
    return fields
