"""Probe texts: what the model reads while its behaviour is measured.

A delta is comparable with another only if both were measured on the same probes, so the texts here are
constants: to change one is to change every delta computed with it.
"""

_GENERIC = (
    "The old river rises in the hills above the town, turns twice past a disused mill, and reaches the sea "
    "nearly two hundred miles further to the south.",
    "The old conductor walked through the carriages and announced, a little sadly, that everyone would have "
    "to leave at the next station and wait for a bus.",
    "The committee met on Thursday to discuss the new library. Most members agreed that it should open "
    "earlier, but they could not decide who would pay for it or",
    "Dear Ms. Okafor, thank you very much for your letter about the broken heating in the flat. We have "
    "looked into the matter and would like to suggest",
    "Question: Which three things would you check first if one small room suddenly became much colder than "
    "the rest of the house, and in which order? Answer:",
)

_DOMAINS = {
    "math": (
        "A train travels 180 km in 2.5 hours. Its average speed in km per hour is",
        "If 3x + 7 = 22, what is the value of x?",
        "Compute the sum of the first ten positive integers.",
        "Prove that the square of an odd number is always odd.",
        "A bag holds 4 red and 6 blue marbles. Two are drawn without replacement. The probability that both "
        "are red is",
    ),
    "code": (
        "def is_palindrome(text: str) -> bool:\n"
        '    """Return whether the given text reads the same forwards and backwards, ignoring case, spaces '
        'and all punctuation."""\n'
        "    return",
        "def merge_sorted(left, right):\n    result = []\n    while left and right:\n        if left[0] <=",
        "Write a SQL query that counts the orders of each customer.",
        "for (let i = 0; i < items.length; i++) {",
        "What does this Python line print? print(sorted({3, 1, 2})[-1])",
    ),
    "commonsense": (
        "An ice cube is left on a sunny windowsill for an hour. When Maria comes back, she finds",
        "It was raining hard, so before leaving the house Tom picked up his",
        "Question: Which is heavier, a full suitcase or the same suitcase when it is empty? Answer:",
        "The glass fell from the table onto the stone floor and",
        "Sam forgot to set an alarm and went to bed very late. The next morning he probably",
    ),
}


def create_generic_probes() -> list[str]:
    """The five default probes: narration, minutes, a letter and a question.

    158 tokens with the Qwen2 tokenizer, the longest 33.
    """
    return list(_GENERIC)


def create_domain_probes(domain: str) -> list[str]:
    """The five probes of ``domain``: ``"math"``, ``"code"`` or ``"commonsense"``.

    91, 108 and 84 tokens with the Qwen2 tokenizer; the longest 26, 35 and 21.

    Raises:
        ValueError: an unknown domain.
    """
    if not isinstance(domain, str) or domain not in _DOMAINS:
        raise ValueError(f"unknown probe domain {domain!r}: expected one of {', '.join(map(repr, _DOMAINS))}")
    return list(_DOMAINS[domain])


def create_mixed_probes() -> list[str]:
    """Fifteen probes: the generic ones, then math, then code.

    357 tokens with the Qwen2 tokenizer, the longest 35.
    """
    return [*_GENERIC, *_DOMAINS["math"], *_DOMAINS["code"]]
