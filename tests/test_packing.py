"""The prefix tree and its attention tiles against brute force over the sequences themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qwen_functional import PackedTokens, Qwen2Config, pack
from qwen_functional.packing import AttentionTile

# Few distinct tokens, so that there are many shared prefixes, duplicates, and sequences that are prefixes of others.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8)
WINDOWS = st.none() | st.integers(1, 10)
CONFIG = Qwen2Config(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=6,
)


def prefixes(sequences: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)}


def path(tokens: PackedTokens, node: int) -> list[int]:
    """The nodes from the root down to ``node``."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = tokens.parents[node]
    return nodes[::-1]


def prefix_of(tokens: PackedTokens, node: int) -> tuple[int, ...]:
    return tuple(int(tokens.input_ids[n]) for n in path(tokens, node))


def expected_relation(tokens: PackedTokens, window: int | None) -> set[tuple[int, int]]:
    """(query, key) pairs: the query's path starts with the key's, which is less than ``window`` shorter."""
    of_node = [prefix_of(tokens, node) for node in range(len(tokens))]
    return {
        (query, key)
        for query, q in enumerate(of_node)
        for key, k in enumerate(of_node)
        if q[: len(k)] == k and (window is None or len(q) - len(k) < window)
    }


def keys_of(tile: AttentionTile, n: int) -> list[int]:
    return list(range(n)[tile.keys]) if isinstance(tile.keys, slice) else tile.keys.tolist()


def relation(tile: AttentionTile, nodes: Sequence[int], n: int) -> set[tuple[int, int]]:
    """(query, key) pairs that a tile lets through; ``nodes`` are its queries."""
    keys = keys_of(tile, n)
    if tile.blocked is None:
        return {(query, key) for query in nodes for key in keys}
    assert tile.blocked.shape == (len(nodes), len(keys) - tile.free)
    assert tile.blocked.dtype == torch.bool
    assert tile.blocked[:, 0].any(), "a key that is free is looked at"
    seen = F.pad(~tile.blocked, (tile.free, 0), value=True)
    return {(nodes[q], keys[k]) for q, k in seen.nonzero().tolist()}


def assert_lean(tile: AttentionTile, seen: set[tuple[int, int]], n: int) -> None:
    """There is no key that no query sees, a slice if the keys form one, and no mask if nothing is masked."""
    keys = keys_of(tile, n)
    assert keys == sorted({key for _, key in seen})
    assert isinstance(tile.keys, slice) == (keys == list(range(keys[0], keys[-1] + 1)))
    assert (tile.blocked is None) == (len(seen) == len(keys) * len({query for query, _ in seen}))


# --- The tree ---------------------------------------------------------------------------------------------


@given(SEQUENCES)
def test_a_sequences_path_has_its_tokens_and_positions(sequences: list[list[int]]) -> None:
    tokens = pack(sequences)
    for sequence, last in zip(sequences, tokens.last, strict=True):
        nodes = path(tokens, last)
        assert tokens.input_ids[nodes].tolist() == sequence
        assert tokens.positions[nodes].tolist() == list(range(len(sequence)))
        assert nodes == sorted(nodes)
    assert tokens.lengths == tuple(map(len, sequences))


@given(SEQUENCES)
def test_every_prefix_has_exactly_one_node(sequences: list[list[int]]) -> None:
    tokens = pack(sequences)
    of_node = [prefix_of(tokens, node) for node in range(len(tokens))]
    assert sorted(of_node) == sorted(prefixes(sequences))
    assert len(tokens.input_ids) == len(tokens.positions) == len(tokens.parents) == len(of_node)
    assert tokens.input_ids.dtype == tokens.positions.dtype == torch.int64


@given(SEQUENCES, st.randoms())
def test_the_order_of_the_sequences_does_not_change_the_row(sequences: list[list[int]], random: Any) -> None:
    shuffled = sequences.copy()
    random.shuffle(shuffled)
    one, other = pack(sequences), pack(shuffled)
    assert torch.equal(one.input_ids, other.input_ids)
    assert one.parents == other.parents
    of = {tuple(s): last for s, last in zip(sequences, one.last, strict=True)}
    assert [of[tuple(s)] for s in shuffled] == list(other.last)


def test_equal_sequences_and_a_sequence_within_another_share_their_nodes() -> None:
    tokens = pack([[5, 6], [5, 6, 7], [5, 6], [8]])
    assert tokens.input_ids.tolist() == [5, 6, 7, 8]
    assert tokens.parents == (-1, 0, 1, -1)
    assert tokens.last == (1, 2, 1, 3)
    assert tokens.lengths == (2, 3, 2, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_tensors_pack_as_lists_do(dtype: torch.dtype) -> None:
    lists = [[1, 2, 3], [1, 2, 4], [4, 1, 2]]
    expected = pack(lists)
    tensors: list[Any] = [
        torch.tensor(lists, dtype=dtype),
        [torch.tensor(s, dtype=dtype) for s in lists],
        tuple(tuple(s) for s in lists),
        [torch.tensor(lists[0], dtype=dtype), *lists[1:]],
    ]
    for given_so in tensors:
        got = pack(given_so)
        assert torch.equal(got.input_ids, expected.input_ids)
        assert got.input_ids.dtype == torch.int64
        assert (got.parents, got.last, got.lengths) == (expected.parents, expected.last, expected.lengths)


def test_the_given_lists_are_neither_changed_nor_kept() -> None:
    lists = [[3, 1], [2]]
    tokens = pack(lists)
    assert lists == [[3, 1], [2]]
    lists[0].append(9)
    assert (tokens.lengths, len(tokens)) == ((2, 1), 3)


# --- Tiles ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SEQUENCES, WINDOWS, st.sampled_from([1, 2, 3, 5, 64]))
def test_tiles_let_a_query_see_its_ancestors_alone(
    sequences: list[list[int]], window: int | None, size: int
) -> None:
    tokens = pack(sequences)
    n = len(tokens)
    tiles = tokens.tiles(window, size)
    queries = [list(range(n)[tile.queries]) for tile in tiles]
    assert [query for part in queries for query in part] == list(range(n))
    assert all(len(part) == size for part in queries[:-1])
    seen = [relation(tile, part, n) for tile, part in zip(tiles, queries, strict=True)]
    assert set().union(*seen) == expected_relation(tokens, window)
    for tile, of_tile in zip(tiles, seen, strict=True):
        assert_lean(tile, of_tile, n)


@settings(deadline=None)
@given(SEQUENCES, WINDOWS, st.data())
def test_a_readout_tile_lets_a_query_see_its_ancestors_alone(
    sequences: list[list[int]], window: int | None, data: st.DataObject
) -> None:
    tokens = pack(sequences)
    n = len(tokens)
    any_nodes = st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True).map(sorted)
    nodes = data.draw(st.just(sorted(set(tokens.last))) | any_nodes)
    (tile,) = tokens.readout_tiles(torch.tensor(nodes), window)
    assert tile.queries == slice(0, len(nodes))
    seen = relation(tile, nodes, n)
    assert seen == {(q, k) for q, k in expected_relation(tokens, window) if q in nodes}
    assert_lean(tile, seen, n)


def test_tiles_without_a_size_or_a_window_amount_to_the_whole_row_at_once() -> None:
    sequences = [[7, 7, i % 3, i, *range(i)] for i in range(20)]
    tokens = pack(sequences)
    n = len(tokens)
    assert n > 128
    parts = [relation(tile, range(n)[tile.queries], n) for tile in tokens.tiles()]
    assert len(parts) > 1
    assert set().union(*parts) == expected_relation(tokens, None)


def test_a_lone_sequence_is_plain_causal_attention() -> None:
    tiles = pack([list(range(10))]).tiles(size=4)
    for start, tile in zip((0, 4, 8), tiles, strict=True):
        stop = min(start + 4, 10)
        assert (tile.queries, tile.keys) == (slice(start, stop), slice(0, stop))
        assert isinstance(tile.blocked, Tensor)
        assert torch.equal(tile.blocked, torch.ones(stop - start, stop).triu(start + 1).bool()[:, tile.free :])


def test_moving_a_tile_changes_its_device_alone() -> None:
    shared = pack([[1, 2, 3], [1, 4], [1, 5, 6]]).tiles(size=2)
    assert {type(tile.keys) for tile in shared} == {slice, Tensor}
    for tile in shared:
        moved = tile.to(torch.device("meta"))
        assert (moved.queries, type(moved.keys)) == (tile.queries, type(tile.keys))
        for before, after in ((tile.keys, moved.keys), (tile.blocked, moved.blocked)):
            if isinstance(before, Tensor):
                assert isinstance(after, Tensor)
                assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
            else:
                assert after == before


def test_a_long_sequence_can_be_packed_and_tiled() -> None:
    n = 20_000
    ids = [i % 97 for i in range(n)]
    tokens = pack([ids, ids[:-1], ids[:10] * 2])
    assert len(tokens) == n + 10
    assert tokens.positions.max() == n - 1
    tiles = tokens.tiles(window=100, size=500)
    assert max(tile.blocked.numel() for tile in tiles if tile.blocked is not None) <= 500 * 600
    assert tokens.tiles(size=2000)[-1].queries == slice(20_000, 20_010)
    (last,) = tokens.readout_tiles(torch.tensor(sorted(set(tokens.last))))
    assert keys_of(last, n + 10) == list(range(n + 10))
    assert relation(last, sorted(tokens.last), n + 10) == {
        (last, key) for last in tokens.last for key in path(tokens, last)
    }


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "sequences is empty, expected at least one token sequence"),
        ((), "sequences is empty, expected at least one token sequence"),
        (torch.zeros(0, 3, dtype=torch.int64), "sequences is empty, expected at least one token sequence"),
        ([[1], []], "sequence 1 is empty, expected at least one token"),
        ([torch.tensor([], dtype=torch.int64)], "sequence 0 is empty, expected at least one token"),
        ([1, 2, 3], "sequence 0 is one number, expected a list of token ids"),
        ([[1], 2], "sequence 1 is one number, expected a list of token ids"),
        (torch.tensor([1, 2, 3]), r"sequences has shape \(3,\), expected a list of token id lists"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"sequences has shape \(1, 2, 3\), expected a list"),
        ([torch.tensor(4)], "sequence 0 is one number, expected a list of token ids"),
        ([[1], torch.tensor([[1, 2]])], r"sequence 1 holds \[1, 2\], expected integer token ids"),
        ([[1, 2.0]], "sequence 0 holds 2.0, expected integer token ids"),
        ([torch.tensor([1.0, 2.0])], "sequence 0 holds 1.0, expected integer token ids"),
        ([[True, 2]], "sequence 0 holds True, expected integer token ids"),
        ([torch.tensor([True])], "sequence 0 holds True, expected integer token ids"),
        ([[1, None]], "sequence 0 holds None, expected integer token ids"),
        ([[1, "2"]], "sequence 0 holds '2', expected integer token ids"),
        (["a text"], "sequence 0 is a str, expected a list of token ids"),
        ("a text", "sequences is a str, expected a list of token id lists"),
        (None, "sequences is a NoneType, expected a list of token id lists"),
        (7, "sequences is a int, expected a list of token id lists"),
        ([None], "sequence 0 is a NoneType, expected a list of token ids"),
    ],
)
def test_bad_sequences_are_refused(sequences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(sequences)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1], [2, 50]], "token id 50 is outside the vocabulary, expected 0 to 49"),
        ([[1], [-1, 2]], "token id -1 is outside the vocabulary, expected 0 to 49"),
        ([[2**40]], f"token id {2**40} is outside the vocabulary"),
        ([[1], [0] * 7], "sequence 1 has 7 tokens, expected at most max_position_embeddings = 6"),
    ],
)
def test_tokens_that_the_model_has_no_room_for_are_refused(sequences: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(sequences).check_fits(CONFIG)


def test_tokens_that_just_fit_are_taken() -> None:
    pack([[0, 49], [3, 4, 5, 6, 7, 8]]).check_fits(CONFIG)


@settings(max_examples=50)
@given(SEQUENCES)
def test_all_reads_are_every_prefix_of_the_first_sequence_then_of_the_next(sequences: list[list[int]]) -> None:
    tokens = pack(sequences)
    read = [prefix_of(tokens, node) for node in tokens.reads("all")]
    assert read == [tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)]
    assert [prefix_of(tokens, node) for node in tokens.reads("last")] == [tuple(s) for s in sequences]
