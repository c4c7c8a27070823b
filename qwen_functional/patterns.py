"""Regular expressions from untrusted files, matched to the names of modules in bounded time.

PEFT matches the patterns of an ``adapter_config.json`` with ``re``, which backtracks: ``(a|a)*b`` takes longer than
anyone waits. Here an expression that could do so is matched without backtracking: all positions that its parts can
have reached are kept together as a set. Whether there is a match is the same, since it does not depend on which way is
tried first. Python's own parser reads the expression; only what needs a memory of the way is refused.
"""

from __future__ import annotations

import functools
import math
import re
import re._compiler as compiler  # type: ignore[import-not-found]
import re._constants as ops  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Sequence
from typing import Any

_MOST_CHARACTERS = 1 << 15  # in an expression: one with all modules of 80 layers has 20,000
_MOST_WAYS = 5000  # that ``re`` may have to try
_MOST_STEPS = 2000  # in a match by sets
_LONGEST = 64  # characters of the text for which the ways are counted

_CHARACTERS = {ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN}
_LEAVES = {*_CHARACTERS, ops.AT, ops.FAILURE}
_Positions = frozenset[int]
_Part = tuple[Callable[["_Run", _Positions], _Positions], float]  # from positions to those after a match; its ways


class _Run:
    def __init__(self, text: str) -> None:
        self.text, self.steps = text, 0

    def count(self, steps: int) -> None:
        self.steps += steps + 1
        if self.steps > _MOST_STEPS:
            raise ValueError(f"takes more than {_MOST_STEPS:,} steps on {self.text!r}, expected a simpler one")


class Pattern:
    """A regular expression, for texts of one line.

    Raises:
        ValueError: it is not one, is too long, or needs what sets of positions cannot express: backreferences, atomic
            groups, possessive repeats. The message is to follow the name of the expression.
    """

    def __init__(self, regex: str) -> None:
        if len(regex) > _MOST_CHARACTERS:
            raise ValueError(f"has {len(regex):,} characters, expected at most {_MOST_CHARACTERS:,}")
        try:
            self._tree = parser.parse(regex)
            self._part, self._ways = _sequence(self._tree, ())
            self._re = re.compile(regex) if self._ways <= _MOST_WAYS else None
        except RecursionError:
            raise ValueError("is not a regular expression: it is nested too deeply") from None
        except (re.error, OverflowError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        except ValueError as error:
            raise ValueError(f"is not supported as a regular expression: {error}") from None
        self._ends: dict[str, _Positions] = {}

    @property
    def work(self) -> int:
        """About how many steps a match takes at most."""
        return 20 * _MOST_WAYS if self._re is None else int(self._ways)

    @property
    def ends_in_a_group_between_dots(self) -> bool:
        """Whether every match ends in a dot, the last group and a dot."""
        return [op for op, _ in self._tree[-3:]] == [ops.LITERAL, ops.SUBPATTERN, ops.LITERAL] and (
            self._tree[-3][1] == self._tree[-1][1] == ord(".") and self._tree[-2][1][0] == self._tree.state.groups - 1
        )

    def match(self, text: str) -> bool:
        """Whether ``re.match`` would find a match."""
        if self._re is not None and len(text) <= _LONGEST:
            return self._re.match(text) is not None
        return bool(self._all_ends(text))

    def fullmatch(self, text: str) -> bool:
        """Whether ``re.fullmatch`` would."""
        if self._re is not None and len(text) <= _LONGEST:
            return self._re.fullmatch(text) is not None
        return len(text) in self._all_ends(text)

    def _all_ends(self, text: str) -> _Positions:
        ends = self._ends.get(text)
        if ends is None:
            ends = self._ends[text] = self._part(_Run(text), frozenset({0}))
        return ends


@functools.lru_cache(maxsize=4096)
def pattern_of(regex: str) -> Pattern:
    """A :class:`Pattern`; the most recently used are kept."""
    return Pattern(regex)


def _sequence(items: Any, scopes: tuple[tuple[int, int], ...]) -> _Part:
    """Parts in sequence. ``scopes``: the flags that the groups around them set and unset."""
    parts: list[_Part] = []
    leaves: list[Any] = []
    for op, argument in [*items, (None, None)]:
        if op in _LEAVES:
            _check_ascii(op, argument)
            leaves.append((op, argument))
            continue
        if leaves:
            parts.append((_leaf(_compiled(items.state, leaves, scopes)), 1))
            leaves = []
        if op is not None:
            parts.append(_part(items.state, op, argument, scopes))

    def after(run: _Run, starts: _Positions) -> _Positions:
        for part, _ in parts:
            if not starts:
                break
            starts = part(run, starts)
        return starts

    return after, math.prod(ways for _, ways in parts)


def _part(state: Any, op: Any, argument: Any, scopes: tuple[tuple[int, int], ...]) -> _Part:
    if op is ops.SUBPATTERN:
        _, added, removed, items = argument
        return _sequence(items, (*scopes, (added, removed)) if added or removed else scopes)
    if op is ops.BRANCH:
        return _branch([_sequence(items, scopes) for items in argument[1]])
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        low, high, items = argument
        if len(items) == 1 and items[0][0] in _CHARACTERS:
            _check_ascii(*items[0])
            greedy = _compiled(state, [(ops.MAX_REPEAT, argument)], scopes)
            return _characters(greedy, low), min(high, _LONGEST) - low + 1 if low <= _LONGEST else 1
        return _repeat(_sequence(items, scopes), low, high, items.getwidth()[0] == 0)
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        direction, items = argument
        least, most = items.getwidth()
        if direction < 0 and least != most:
            raise ValueError("look-behind requires fixed-width pattern")
        return _assertion(_sequence(items, scopes), least if direction < 0 else None, op is ops.ASSERT)
    raise ValueError(f"it has {str(op).lower().replace('_', ' ')}, expected none")


def _leaf(regex: re.Pattern[str]) -> Callable[[_Run, _Positions], _Positions]:
    """A part of fixed width, so that it has at most one end."""

    def after(run: _Run, starts: _Positions) -> _Positions:
        run.count(len(starts))
        return frozenset(m.end() for start in starts if (m := regex.match(run.text, start)))

    return after


def _characters(greedy: re.Pattern[str], low: int) -> Callable[[_Run, _Positions], _Positions]:
    """One character repeated: it can end anywhere between its shortest and its longest match."""

    def after(run: _Run, starts: _Positions) -> _Positions:
        run.count(len(starts))
        matches = [m for start in starts if (m := greedy.match(run.text, start))]
        return frozenset(end for m in matches for end in range(m.start() + low, m.end() + 1))

    return after


def _branch(alternatives: Sequence[_Part]) -> _Part:
    def after(run: _Run, starts: _Positions) -> _Positions:
        return frozenset().union(*(part(run, starts) for part, _ in alternatives))

    return after, sum(ways for _, ways in alternatives)


def _repeat(item: _Part, low: int, high: int, may_be_empty: bool) -> _Part:
    part, ways = item

    def after(run: _Run, starts: _Positions) -> _Positions:
        for _ in range(low):
            before, starts = starts, part(run, starts)
            run.count(1)
            if starts == before or not starts:
                break
        found = new = starts
        repeats = low
        while new and repeats < high:
            new = part(run, new) - found
            run.count(1)
            found |= new
            repeats += 1
        return found

    if high == 1:
        return after, ways + (low == 0)
    return after, _LONGEST + 1 if ways == 1 and not may_be_empty else math.inf


def _assertion(item: _Part, width_behind: int | None, wanted: bool) -> _Part:
    part, ways = item

    def holds(run: _Run, at: int) -> bool:
        if width_behind is None:
            return bool(part(run, frozenset({at})))
        return at >= width_behind and at in part(run, frozenset({at - width_behind}))

    def after(run: _Run, starts: _Positions) -> _Positions:
        run.count(len(starts))
        return frozenset(start for start in starts if holds(run, start) is wanted)

    return after, ways


def _compiled(state: Any, items: Any, scopes: tuple[tuple[int, int], ...]) -> re.Pattern[str]:
    for added, removed in reversed(scopes):
        items = [(ops.SUBPATTERN, (None, added, removed, parser.SubPattern(state, items)))]
    return compiler.compile(parser.SubPattern(state, items))


def _check_ascii(op: Any, argument: Any) -> None:
    """Names of modules are ASCII, and a set of all of Unicode is slow to compile."""
    if op is ops.IN:
        for one, value in argument:
            _check_ascii(one, value)
    elif op is ops.RANGE and argument[1] > 127:
        raise ValueError(f"it has a range of characters up to {argument[1]:#x}, expected ASCII")
