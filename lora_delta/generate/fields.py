"""Options as dataclasses: one check of types and ranges for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..probes.tokenization import shortened

_MOST = 10**9  # for integers without a limit of their own: a larger count is a typo
_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}


@dataclass(frozen=True)
class Range:
    """Which values of a type are allowed.

    Attributes:
        least, above, most: bounds of a number: from ``least``, above ``above``, up to ``most``. For an integer ``most``
            defaults to a billion.
        one_of: the strings allowed.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    one_of: Sequence[str] | None = None

    def holds(self, value: Any) -> bool:
        """Whether a value of the right type is within the range."""
        if self.one_of is not None:
            return value in self.one_of
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        most = _MOST if self.most is None and isinstance(value, int) else self.most
        return math.isfinite(value) and not (
            (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (most is not None and value > most)
        )

    def words(self, kind: type) -> str:
        """What is expected of a value of a type, in words."""
        if self.one_of is not None:
            return f"one of {tuple(self.one_of)}"
        words = "a table" if issubclass(kind, Mapping) else _WORDS.get(kind, f"a {kind.__name__}")
        if kind not in (int, float):
            return words
        parts = {"of at least": self.least, "above": self.above, "at most": self.most}
        ranges = [f"{how} {bound:g}" for how, bound in parts.items() if bound is not None]
        return " ".join([words, " and ".join(ranges)]).rstrip()


def option(default: Any, **bounds: Any) -> Any:
    """A dataclass field with a default, and the :class:`Range` that :func:`check_fields` holds its value to.

    Args:
        default: a value, or a function that makes one.
        bounds: those of the range.
    """
    metadata = {"range": Range(**bounds)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_fields(options: Any) -> None:
    """Hold each field of a dataclass to its annotation and its range; an integer becomes a float where one belongs.

    Annotations are ``int``, ``float``, ``bool``, ``str``, classes, ``Mapping[str, …]``, Any, and unions of those with
    None. A bool does not count as an integer, nor NaN or infinity as a number.

    Raises:
        ValueError: an invalid value; the message names the field, the value, and what was expected.
    """
    hints = get_type_hints(type(options))
    for one in fields(options):
        value = check_value(one.name, getattr(options, one.name), hints[one.name], one.metadata.get("range", Range()))
        object.__setattr__(options, one.name, value)


def check_value(name: str, value: Any, kind: Any, range: Range = Range()) -> Any:
    """The value, if it is of the type ``kind`` and within the range; else a ``ValueError`` as in :func:`check_fields`.
    """
    if kind is Any:
        return value
    if isinstance(kind, UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        return check_value(name, value, get_args(kind)[0], range)
    plain = get_origin(kind) or kind
    if plain is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
        value = float(value)
    is_kind = isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
    if is_kind and isinstance(value, Mapping) and get_args(kind):
        return {key: check_value(f"{name}.{key}", one, get_args(kind)[1], range) for key, one in value.items()}
    if not is_kind or not range.holds(value):
        raise ValueError(f"{name} is {shortened(value)}, expected {range.words(plain)}")
    return value
