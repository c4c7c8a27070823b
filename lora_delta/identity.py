"""What a result on disk depends on, be it labels or a run, as one value with one comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_MISSING = "nothing"
_NAMED = 6  # differences in a message


@dataclass(frozen=True)
class Identity:
    """Facts that decide a result to the bit, as JSON; nested ones have dotted names, such as ``training.steps``.

    Args:
        facts: {name: JSON value, or a mapping of further facts}. Long ones (probes, data) go in as their sha256, with
            what a reader would rather see in ``shown``.
        shown: {name of a fact: what an error shows next to it}, such as the model's name next to its sha256. It takes
            no part in comparisons.

    Raises:
        TypeError: a fact that JSON cannot represent.
    """

    facts: Mapping[str, Any]
    shown: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", json.loads(json.dumps(self.facts, sort_keys=True)))

    @property
    def sha256(self) -> str:
        """Of all facts, as hex."""
        return sha256_of(self.facts)

    def differences(self, there: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(name, value there, value here) of each fact that differs from those that were written somewhere."""
        return list(_differences("", there, self.facts))

    def require_same(self, there: Mapping[str, Any], where: object, advice: str) -> None:
        """Refuse to continue with what was made from other facts.

        Args:
            there: the facts that were written with the result.
            where: the file or folder that holds them.
            advice: what to do, the end of the message.

        Raises:
            ValueError: facts that differ, each with both values.
        """
        differing = self.differences(there)
        if not differing:
            return
        words = []
        for name, theirs, ours in differing[:_NAMED]:
            also = f" ({self.shown[name]})" if self.shown and name in self.shown else ""
            words.append(f"{name} is {_short(theirs)} there and {_short(ours)} here{also}")
        if len(differing) > _NAMED:
            words.append(f"and {len(differing) - _NAMED} more")
        raise ValueError(f"{where} was made differently: {'; '.join(words)}. {advice}")


def sha256_of(value: Any) -> str:
    """sha256, as hex, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(prefix: str, there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in [*here, *(name for name in there if name not in here)]:
            dotted = f"{prefix}.{name}" if prefix else name
            yield from _differences(dotted, there.get(name, _MISSING), here.get(name, _MISSING))
    elif there != here or type(there) is not type(here):
        yield prefix, there, here


def _short(value: Any, limit: int = 120) -> str:
    text = value if value is _MISSING else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
