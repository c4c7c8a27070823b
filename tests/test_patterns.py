"""Untrusted regular expressions: they match as in ``re``, and get an answer or an error where ``re`` would not end."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_functional.lora import LoraSpec, path_pattern
from qwen_functional.patterns import Pattern

PATHS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 12) for name in "qkvo"]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:k_proj|v_proj|q_proj|out_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|out_proj)))"
)

ATOMS = ["a", "b", ".", "[ab]", "[^a]", r"\.", "^", "$", r"\b", r"\w", r"\d", "A", r"\Z", "(?i:a)", "(?<=a)", "(?<!ab)"]
QUANTIFIERS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{2,}", "{0,2}?"]
REGEXES = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda two: f"(?:{two[0]}){two[1]}"),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
        inner.map(lambda one: f"(?i:{one})"),
    ),
    max_leaves=8,
)


def by_sets(regex: str) -> Pattern:
    """A pattern that is never delegated to ``re``."""
    pattern = Pattern(regex)
    pattern._re = None
    return pattern


@settings(max_examples=400, deadline=None, derandomize=True)
@given(REGEXES, st.lists(st.text("abA.1x", max_size=8), min_size=1, max_size=4))
@example(".*(?:a|ab)(?:c|bcd)(?:d*)", ["abcd", "abcdd"])
@example("(?:a?){3}a{3}", ["aaa", "aaaaaa", "aa"])
def test_matches_are_those_of_re(regex: str, texts: list[str]) -> None:
    try:
        expected = re.compile(regex)
    except re.error as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            Pattern(regex)
        return
    for text in texts:
        for pattern in (Pattern(regex), by_sets(regex)):
            assert pattern.match(text) is (expected.match(text) is not None)
            assert pattern.fullmatch(text) is (expected.fullmatch(text) is not None)


@pytest.mark.parametrize("regex", [r".*\.(q_proj|v_proj)", UNSLOTH, "|".join(map(re.escape, PATHS)), r".*1\..*q.*"])
def test_real_expressions_match_as_by_re(regex: str) -> None:
    for pattern in (Pattern(regex), by_sets(regex)):
        assert [pattern.fullmatch(path) for path in PATHS] == [bool(re.fullmatch(regex, path)) for path in PATHS]


EXPLODING = {
    "(a|a|.)*!": False,
    "(.*)*x": False,
    r"((.*)*)*\.q_proj": True,
    r"(\w+\.?)+": True,
    "(.|..)(.|..)" * 20: False,
    r"(?:(?:.{1,40}){1,40}){1,40}\.q_proj": True,
    "(?=(.*)*_proj)(.|.)*": True,
}


@pytest.mark.parametrize("regex", EXPLODING)
def test_an_expression_without_end_in_re_has_an_answer(regex: str) -> None:
    assert not Pattern(regex).work < 10_000  # ``re`` would take longer than the whole test
    assert Pattern(regex).fullmatch("model.layers.12.self_attn.q_proj") is EXPLODING[regex]


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        ("(", "is not a regular expression: missing )"),
        ("a{99999999999}", "is not a regular expression: the repetition number is too large"),
        ("(" * 500 + ")" * 500, "is not a regular expression: it is nested too deeply"),
        ("a{" + "9" * 5000 + "}", "is not supported as a regular expression: Exceeds the limit"),
        (r"(a)\1", "is not supported as a regular expression: it has groupref, expected none"),
        ("(?>a)", "it has atomic group, expected none"),
        ("a*+", "it has possessive repeat, expected none"),
        ("(?<=a*)b", "look-behind requires fixed-width pattern"),
        (r"[\x00-\uffff]", "it has a range of characters up to 0xffff, expected ASCII"),
        ("a" * 40_000, "has 40,000 characters, expected at most 32,768"),
        (".*" * 3000, "takes more than 2,000 steps on 'model.layers.0.self_attn.q_proj', expected a simpler one"),
    ],
)
def test_what_is_no_expression_or_too_much_is_refused(regex: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Pattern(regex).match(PATHS[0])


def test_a_key_of_a_pattern_fits_the_end_of_a_path_as_by_peft() -> None:
    keys = ("q_proj", "attn.q_proj", "0.self_attn.q_proj", "tn.q_proj", ".*", "(q|v)_proj", "q_proj|v_proj", "x)|(.*")
    for key in keys:
        for path in PATHS:
            assert path_pattern(key).match(path) is bool(re.match(rf"(.*\.)?({key})$", path))
    with pytest.raises(ValueError, match=r"rank_pattern: pattern '\(' is not a regular expression"):
        LoraSpec(rank_pattern={"(": 3})


def test_a_simple_expression_with_long_repetitions_is_left_to_re() -> None:
    assert Pattern("a{30,31}b{30,31}c{30,31}")._re is not None
    assert Pattern("a{30,60}b{30,60}c{30,60}")._re is None
