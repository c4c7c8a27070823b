"""Reading JSON at the door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(path: str | Path, expected: str = "a JSON object") -> dict[str, Any]:
    """The object that a file holds.

    Args:
        expected: what the file should be, for the errors.

    Raises:
        ValueError: no such file, one that cannot be read, is not JSON, or holds something other than an object.
    """
    path = Path(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, expected {expected}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read, expected {expected}: {error}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not valid JSON, expected {expected}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected {expected}")
    return fields
