"""A family of small text tasks in which unseen tasks follow from seen ones: an operation, then a decoration.

"reverse, then add ing" is one of 12 × 14 tasks. A model that has learnt both parts in other combinations can do it, and
a generator that has written adapters for the parts can write one for it. 120 tasks are seen; 24 are for choosing
between generators (validation), and 24 for the final figures (test): the embedded checkpoint is trained on neither.

An example is bytes: ``{condition}: {word}={answer}`` and the end-of-text token with an instruction, ``{word}={answer}``
and that token without. Without an instruction the base model can only guess which task is meant; an adapter makes it do
one of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

VOWELS = "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_LENGTHS = (3, 4, 5)
CONTEXT = "{condition}: {prompt}"  # what the model reads before an answer, if it gets an instruction
N_HELD_OUT = 24  # tasks in each held-out split
SEEN_WORDINGS = 4  # of six: a generator is trained on these only
_TEMPLATES = ("{0} then {1}", "{0}, {1}", "{1} after {0}")


@dataclass(frozen=True)
class Part:
    """An operation or a decoration: what it does to a word, and six ways to ask for it."""

    name: str
    apply: Callable[[str], str]
    wordings: tuple[str, ...]


def _shifted(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in word)


def _suffix(end: str) -> Part:
    verbs = (f"add {end}", f"append {end}", f"finish with {end}", f"{end} at the end", f"attach {end}", f"{end} behind")
    return Part(f"suffix {end}", lambda word: word + end, verbs)


def _prefix(start: str) -> Part:
    verbs = (f"prepend {start}", f"begin with {start}", f"{start} in front", f"lead with {start}", f"{start} before")
    return Part(f"prefix {start}", lambda word: start + word, (*verbs, f"open with {start}"))


def _wrap(pair: str) -> Part:
    verbs = (f"wrap in {pair}", f"enclose by {pair}", f"put inside {pair}", f"within {pair}", f"surround with {pair}")
    return Part(f"wrap {pair}", lambda word: pair[0] + word + pair[1], (*verbs, f"{pair} around"))


def _join(mark: str) -> Part:
    verbs = (f"join by {mark}", f"separate with {mark}", f"{mark} between letters", f"split at {mark}")
    return Part(f"join {mark}", mark.join, (*verbs, f"space by {mark}", f"link with {mark}"))


OPERATIONS = (
    Part("copy", lambda w: w, ("copy", "keep it", "the same", "echo", "as it is", "no change")),
    Part("upper", str.upper, ("upper case", "capitals", "shout", "all large", "big letters", "all caps")),
    Part("title", str.capitalize, ("title case", "as a name", "first large", "capitalize", "one capital", "headline")),
    Part("reverse", lambda w: w[::-1], ("reverse", "backwards", "mirror", "last to first", "turn around", "flip")),
    Part(
        "double", lambda w: "".join(c + c for c in w),
        ("double letters", "stutter", "each twice", "two of each", "twin letters", "pairs"),
    ),
    Part(
        "behead", lambda w: w[1:],
        ("drop first", "behead", "cut the head", "skip one", "without initial", "lose first"),
    ),
    Part(
        "curtail", lambda w: w[:-1],
        ("drop last", "curtail", "cut the tail", "stop early", "without final", "lose last"),
    ),
    Part(
        "left", lambda w: w[1:] + w[0],
        ("rotate left", "roll left", "head to the end", "first goes last", "cycle left", "shift left"),
    ),
    Part(
        "right", lambda w: w[-1] + w[:-1],
        ("rotate right", "roll right", "tail to the front", "last goes first", "cycle right", "shift right"),
    ),
    Part(
        "swap", lambda w: w[-1] + w[1:-1] + w[0],
        ("swap ends", "exchange ends", "trade outer letters", "switch ends", "first for last", "outer swap"),
    ),
    Part("next", _shifted, ("next letter", "advance", "one further", "increment", "plus one", "successor")),
    Part(
        "mask", lambda w: "".join("*" if c in VOWELS else c for c in w),
        ("mask vowels", "hide vowels", "star vowels", "censor", "cover vowels", "blank vowels"),
    ),
)  # fmt: skip
DECORATIONS = (
    Part("plain", lambda w: w, ()),
    *map(_suffix, ("ing", "ed", "ly", "!")),
    *map(_prefix, ("un", "re")),
    *map(_wrap, ("()", "<>", "[]", "{}")),
    *map(_join, ("-", ".")),
    Part("twice", lambda w: w + w, ("twice", "two times", "say it again", "repeat all", "once more", "duplicate")),
)


@dataclass(frozen=True)
class Task:
    """An operation on words, and a decoration of its result."""

    operation: Part
    decoration: Part

    @property
    def name(self) -> str:
        return f"{self.operation.name}, {self.decoration.name}"

    def answer(self, word: str) -> str:
        return self.decoration.apply(self.operation.apply(word))

    def conditions(self, wordings: slice = slice(None)) -> list[str]:
        """Every way to ask for it with some of the wordings; a part that changes nothing is not mentioned."""
        first, second = (part.wordings[wordings] for part in (self.operation, self.decoration))
        if not second:
            return list(first)
        if self.operation.name == "copy":
            return list(second)
        return [template.format(*pair) for template in _TEMPLATES for pair in itertools.product(first, second)]


def _splits() -> tuple[tuple[Task, ...], tuple[Task, ...], tuple[Task, ...]]:
    """Seen, validation and test: both parts of a held-out task change something, and each occurs at most three times in
    a split."""
    every = [Task(operation, decoration) for operation in OPERATIONS for decoration in DECORATIONS]
    left = [task for task in every if task.operation.name != "copy" and task.decoration.wordings]
    random.Random(20).shuffle(left)
    held: list[tuple[Task, ...]] = []
    for _ in range(2):
        own: list[Task] = []
        for task in left:
            parts = [part for one in own for part in (one.operation.name, one.decoration.name)]
            if len(own) < N_HELD_OUT and max(map(parts.count, (task.operation.name, task.decoration.name))) < 3:
                own.append(task)
        left = [task for task in left if task not in own]
        held.append(tuple(own))
    seen = tuple(task for task in every if task not in (*held[0], *held[1]))
    return seen, held[0], held[1]


SEEN, VALIDATION, TEST = _splits()


def word(chance: random.Random) -> str:
    """A word of 3 to 5 letters; each is drawn from the vowels with probability 1/3, else from all letters."""
    return "".join(
        chance.choice(VOWELS if chance.random() < 1 / 3 else LETTERS) for _ in range(chance.choice(WORD_LENGTHS))
    )


def lines(
    tasks: Sequence[Task], chance: random.Random, *, per_condition: int, wordings: slice = slice(SEEN_WORDINGS)
) -> Iterator[dict[str, str]]:
    """Examples for every way to ask for each task, as :mod:`lora_delta.generate.text_lines` reads them."""
    for task in tasks:
        for condition in task.conditions(wordings):
            for _ in range(per_condition):
                given = word(chance)
                example = {"prompt": f"{given}=", "completion": task.answer(given)}
                yield {"condition": condition, "task": task.name, **example}
