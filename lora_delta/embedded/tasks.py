"""Small text tasks on words: what the embedded checkpoint is trained on, and what the demo's adapters teach it.

An example is bytes: ``{prompt}: {word}={answer}\\n`` with an instruction, ``{word}={answer}\\n`` without. Without one
the base model can only guess which task is meant; an adapter makes it do one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

VOWELS = "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_LENGTHS = (3, 4, 5)


@dataclass(frozen=True)
class Task:
    """A function of words, and the prompts that ask for it. ``family`` groups tasks that differ in one detail."""

    name: str
    family: str
    prompts: tuple[str, ...]
    answer: Callable[[str], str]


def _task(name: str, answer: Callable[[str], str], *prompts: str, family: str | None = None) -> Task:
    return Task(name, family or name, prompts, answer)


def _shifted(word: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in word)


def _suffix(end: str) -> Task:
    prompts = (f"add {end}", f"append {end}", f"put {end} at the end", f"end it with {end}", f"finish with {end}")
    return _task(f"suffix {end}", lambda word: word + end, *prompts, f"attach {end} behind", family="suffix")


def _prefix(start: str) -> Task:
    prompts = (f"prepend {start}", f"put {start} in front", f"begin with {start}", f"start it with {start}")
    more = (f"attach {start} before", f"lead with {start}")
    return _task(f"prefix {start}", lambda word: start + word, *prompts, *more, family="prefix")


def _wrap(left: str, right: str) -> Task:
    pair = left + right
    prompts = (f"wrap in {pair}", f"enclose in {pair}", f"put inside {pair}", f"surround by {pair}")
    more = (f"place within {pair}", f"use {pair} around it")
    return _task(f"wrap {pair}", lambda word: left + word + right, *prompts, *more, family="wrap")


def _join(mark: str) -> Task:
    prompts = (f"join by {mark}", f"separate with {mark}", f"put {mark} between", f"insert {mark} between letters")
    more = (f"split letters by {mark}", f"letters with {mark} between")
    return _task(f"join {mark}", lambda word: mark.join(word), *prompts, *more, family="join")


TASKS: tuple[Task, ...] = (
    _task("copy", lambda w: w, "copy", "repeat the word", "say it again", "the same", "echo", "leave it as it is"),
    _task("upper", str.upper, "upper case", "capital letters", "in capitals", "shout", "make it large", "all caps"),
    _task(
        "title", str.capitalize,
        "capitalize", "as a name", "first letter large", "title case", "start with a capital", "as a title",
    ),
    _task(
        "reverse", lambda w: w[::-1],
        "reverse", "write backwards", "from the end", "mirror the word", "turn around", "last to first",
    ),
    _task(
        "double", lambda w: "".join(c + c for c in w),
        "double letters", "each letter twice", "stutter", "repeat each letter", "two of each", "twin letters",
    ),
    _task(
        "twice", lambda w: w + w,
        "twice", "the word two times", "say it twice", "repeat whole word", "word and word", "duplicate it",
    ),
    _task("first", lambda w: w[0], "first letter", "initial", "how it begins", "head", "leading letter", "only start"),
    _task("last", lambda w: w[-1], "last letter", "final letter", "how it ends", "tail", "closing letter", "only end"),
    _task(
        "behead", lambda w: w[1:],
        "drop first", "without the head", "remove initial", "all but first", "cut the start", "skip one letter",
    ),
    _task(
        "curtail", lambda w: w[:-1],
        "drop last", "without the tail", "remove final", "all but last", "cut the end", "shorten by one",
    ),
    _task(
        "sort", lambda w: "".join(sorted(w)),
        "sort", "alphabetical order", "order letters", "arrange a to z", "in sequence", "rank the letters",
    ),
    _task(
        "next", lambda w: _shifted(w, 1),
        "next letter", "shift up", "one further", "letters after", "advance each", "plus one", family="shift",
    ),
    _task(
        "previous", lambda w: _shifted(w, -1),
        "previous letter", "shift down", "one back", "letters before", "retreat each", "minus one", family="shift",
    ),
    _task(
        "left", lambda w: w[1:] + w[0],
        "rotate left", "first to the end", "turn left", "cycle left", "move head back", "roll left", family="rotate",
    ),
    _task(
        "right", lambda w: w[-1] + w[:-1],
        "rotate right", "last to the front", "turn right", "cycle right", "move tail up", "roll right", family="rotate",
    ),
    _task(
        "swap", lambda w: w[-1] + w[1:-1] + w[0],
        "swap ends", "exchange outer letters", "switch first and last", "trade ends", "swap outer", "ends changed",
    ),
    _task(
        "consonants", lambda w: "".join(c for c in w if c not in VOWELS) or "-",
        "no vowels", "consonants only", "remove vowels", "without aeiou", "drop vowels", "strip vowels",
    ),
    _task(
        "mask", lambda w: "".join("*" if c in VOWELS else c for c in w),
        "hide vowels", "star for vowels", "mask vowels", "vowels as stars", "censor vowels", "cover vowels",
    ),
    _task(
        "length", lambda w: str(len(w)),
        "length", "how long", "count letters", "size", "number of letters", "how many",
    ),
    *map(_suffix, ("ing", "ed", "s", "ly", "er")),
    *map(_prefix, ("un", "re", "mis", "pre")),
    _wrap("(", ")"),
    _wrap("<", ">"),
    _wrap("{", "}"),
    _wrap("[", "]"),
    *map(_join, ("-", ".", "_", "+")),
)  # fmt: skip


def word(generator: random.Random) -> str:
    """A word of 3 to 5 letters, a third of them vowels."""
    return "".join(
        generator.choice(VOWELS if generator.random() < 1 / 3 else LETTERS)
        for _ in range(generator.choice(WORD_LENGTHS))
    )


def example(task: Task, generator: random.Random, prompt: str | None = None) -> tuple[str, str]:
    """(question, answer): the text up to the equals sign, and what should follow, newline included."""
    question = word(generator)
    return (f"{prompt}: " if prompt else "") + question + "=", task.answer(question) + "\n"


def padded(tokenizer: Tokenizer, examples: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of (question, answer) texts: ids and mask (N, T), and targets (N, T), the next token in an answer, else −100."""
    rows = [[tokenizer.encode(text).ids for text in pair] for pair in examples]
    length = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (question, answer) in enumerate(rows):
        n = len(question) + len(answer)
        ids[row, :n], mask[row, :n] = torch.tensor(question + answer), 1
        targets[row, len(question) - 1 : n - 1] = torch.tensor(answer)
    return ids, mask, targets
