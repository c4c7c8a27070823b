"""Conditions: the hidden states of prompts, through the engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_delta.embedded import embedded_checkpoint
from lora_delta.files import UNFINISHED
from lora_delta.generate import conditions
from lora_delta.generate.conditions import Condition, ConditionCache, PromptEncoder
from lora_delta.probes.tokenization import load_tokenizer
from qwen_functional import load_pretrained

PROMPTS = ["write it backwards", "write it", "a", "write it backwards"]


def encoder_on(device: str, **options: Any) -> PromptEncoder:
    folder = embedded_checkpoint()
    config, weights = load_pretrained(folder, dtype=torch.float32, device=device)
    return PromptEncoder(config, weights, load_tokenizer(folder), **options)


@pytest.fixture(scope="module")
def encoder(device: str) -> PromptEncoder:
    return encoder_on(device)


def test_a_prompts_states_are_those_of_transformers(encoder: PromptEncoder) -> None:
    model = transformers.Qwen2Model.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    for prompt, states in zip(PROMPTS, encoder(PROMPTS), strict=True):
        ids = torch.tensor([encoder.tokenizer.encode(prompt).ids])
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0]
        assert states.shape == expected.shape
        assert states.device == expected.device == torch.device("cpu")
        assert (states - expected).norm() <= 1e-5 * expected.norm()


def test_a_prompt_is_computed_once(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoder(PROMPTS)
    monkeypatch.setattr("lora_delta.generate.conditions.forward_vjp", None)
    again = encoder.lazily(PROMPTS)
    assert all(again[index] is states for index, states in enumerate(first))
    assert again[-1] is first[-1]
    assert [one is other for one, other in zip(again[1:3], first[1:3], strict=True)] == [True, True]
    with pytest.raises(IndexError):
        again[4]


def test_a_longer_prompt_is_cut(device: str) -> None:
    short = encoder_on(device, max_length=5, layer=1)
    assert short(["write it backwards"])[0].shape == (5, short.config.hidden_size)


MANY = [f"task {index}, {'do it ' * (index % 5)}now" for index in range(21)]


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts in each pass from now on."""
    sizes: list[int] = []
    tokenize = conditions.tokenize_probes

    def counted(tokenizer: Any, texts: Sequence[str], max_length: int) -> Any:
        sizes.append(len(texts))
        return tokenize(tokenizer, texts, max_length)

    monkeypatch.setattr(conditions, "tokenize_probes", counted)
    return sizes


def test_only_the_pass_of_a_prompt_that_is_asked_for_is_computed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = encoder_on(device)
    sizes, states = passes_of(monkeypatch), fresh.lazily(MANY)
    assert len(states) == 21
    assert not sizes
    assert states[20].shape == states[-1].shape
    assert sizes == [5]
    states[3], states[7]
    assert sizes == [5, 8]
    fresh(MANY)
    assert sizes == [5, 8, 8]


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_states_are_the_same_to_the_bit_whatever_is_kept_and_what_is_kept_is_bounded(
    passes: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoder_on(device)
    expected = whole(MANY)
    largest = max(sum(one.nbytes for one in expected[start : start + 8]) for start in (0, 8, 16))
    bound = passes * largest
    short = encoder_on(device, keep_bytes=bound)
    sizes, states, order = passes_of(monkeypatch), short.lazily(MANY), [20, 3, 12, 4, 11, 20, 0, 9, 17, 2]
    for index in order:
        assert torch.equal(states[index], expected[index]), index
        assert kept_bytes(short) <= bound
    assert len(sizes) == {0: 10, 1: 10, 2: 8}[passes]
    assert (kept_bytes(short) > 0) == (passes > 0)


def kept_bytes(encoder: PromptEncoder) -> int:
    kept: list[Tensor] = [one for states in encoder._kept.values() for one in states]
    return sum(one.nbytes for one in kept)


def test_what_was_used_longest_ago_goes_first(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[f"{word}ish"] for word in ("red", "sea", "oak")]
    size = encoder_on(device)(prompts[0])[0].nbytes
    short = encoder_on(device, keep_bytes=2 * size)
    assert {short(one)[0].nbytes for one in prompts[:2]} == {size}
    short(prompts[0])
    short(prompts[2])  # displaces the second
    sizes = passes_of(monkeypatch)
    short(prompts[0])
    assert not sizes
    short(prompts[1])
    assert sizes == [1]


def test_padding_is_no_token(encoder: PromptEncoder) -> None:
    states = encoder(PROMPTS)
    condition = Condition.collate(states)
    assert condition.states.shape == (4, 18, 128)
    assert condition.mask.sum(1).tolist() == [18, 8, 1, 18]
    for row, one in enumerate(states):
        assert torch.equal(condition.states[row][condition.mask[row]], one)


def test_a_condition_moves_as_a_whole(device: str) -> None:
    condition = Condition.collate([torch.ones(2, 3), torch.ones(1, 3)])
    moved = condition.to(device)
    assert moved.states.device.type == moved.mask.device.type == device
    again = Condition.collate([states[mask] for states, mask in zip(moved.states, moved.mask, strict=True)])
    assert again.mask.device == moved.mask.device
    assert torch.equal(again.states.cpu(), condition.states)
    assert torch.equal(again.mask.cpu(), condition.mask)


@pytest.mark.parametrize("prompts", [[""], ["a", ""]])
def test_an_empty_prompt_is_refused(encoder: PromptEncoder, prompts: list[str]) -> None:
    for call in (encoder, encoder.lazily):
        with pytest.raises(ValueError, match=r"probe . is empty"):
            call(prompts)


@pytest.mark.parametrize("layer", [-2, 4, 99])
def test_a_layer_that_the_model_lacks_is_refused(layer: int, device: str) -> None:
    with pytest.raises(ValueError, match=f"layer is {layer}, expected -1 or 0 to 3"):
        encoder_on(device, layer=layer)


def test_states_are_those_after_the_block_that_was_asked_for(device: str) -> None:
    model = transformers.Qwen2Model.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    lower = encoder_on(device, layer=1)
    ids = torch.tensor([lower.tokenizer.encode(PROMPTS[0]).ids])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2][0]
    assert (lower(PROMPTS)[0] - expected).norm() <= 1e-5 * expected.norm()


# --- On disk ------------------------------------------------------------------------------------------------

PASSES = [tuple(MANY[start : start + 8]) for start in (0, 8, 16)]


def counts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The passes that are computed from now on."""
    computed: list[tuple[str, ...]] = []
    compute = PromptEncoder._computed

    def counted(self: PromptEncoder, texts: tuple[str, ...]) -> list[Tensor]:
        computed.append(texts)
        return compute(self, texts)

    monkeypatch.setattr(PromptEncoder, "_computed", counted)
    return computed


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0


def test_what_is_on_disk_is_not_computed_again_and_is_the_same_to_the_bit(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, computed = encoder_on(device)(MANY), counts(monkeypatch)
    assert_equal(encoder_on(device, cache=ConditionCache(tmp_path / "cache", "key", 1 << 30))(MANY), expected)
    assert computed == PASSES
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert_equal(encoder_on(device, cache=ConditionCache(tmp_path / "cache", "key", 1 << 30))(MANY), expected)
    assert computed == PASSES
    model = transformers.Qwen2Model.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    again = encoder_on(device, cache=ConditionCache(tmp_path / "cache", "key", 0)).lazily(MANY)[20]
    ids = transformers.AutoTokenizer.from_pretrained(embedded_checkpoint())(MANY[20], return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(ids).last_hidden_state[0]
    assert (again - theirs).norm() <= 1e-5 * theirs.norm()
    assert computed == PASSES


def test_another_key_and_other_prompts_do_not_mix(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {layer: encoder_on(device, layer=layer)(MANY[:8]) for layer in (1, 2)}
    computed = counts(monkeypatch)
    for _ in range(2):
        for layer, states in expected.items():
            cache = ConditionCache(tmp_path, f"layer {layer}", 1 << 30)
            assert_equal(encoder_on(device, layer=layer, cache=cache)(MANY[:8]), states)
    assert computed == PASSES[:1] * 2
    cache = ConditionCache(tmp_path, "layer 1", 1 << 30)
    for others in (MANY[:7], MANY[7::-1], MANY[1:9], ["".join(MANY[:8])], []):
        assert cache.load(others) is None
    assert ConditionCache(tmp_path / "elsewhere", "layer 1", 1 << 30).load(MANY[:8]) is None


@pytest.mark.parametrize("room", [-1, 0, 1])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_no_more_bytes_are_on_disk_than_there_may_be(
    passes: int, room: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = ConditionCache(tmp_path / "plenty", "key", 1 << 30)
    expected = encoder_on(device, cache=plenty)(MANY)
    sizes = [plenty._path(one).stat().st_size for one in PASSES]
    most, computed = sum(sizes[:passes]) + room, counts(monkeypatch)
    kept: list[tuple[str, ...]] = []  # those that fit, in order
    for one, size in zip(PASSES, sizes, strict=True):
        if sum(sizes[PASSES.index(other)] for other in kept) + size <= most:
            kept.append(one)
    for _ in range(2):  # the second cache counts the files it finds
        cache = ConditionCache(tmp_path / "cache", "key", most)
        assert_equal(encoder_on(device, cache=cache)(MANY), expected)
        assert bytes_in(tmp_path / "cache") == sum(sizes[PASSES.index(one)] for one in kept) <= max(most, 0)
    assert computed == [*PASSES, *(one for one in PASSES if one not in kept)]


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda good: b"",
    "half": lambda good: good[: len(good) // 2],
    "a byte less": lambda good: good[:-1],
    "a byte more": lambda good: good + b"x",
    "zeros": lambda good: bytes(len(good)),
    "a header without end": lambda good: b"\xff" * 8 + good[8:],
    "text": lambda good: b"{}",
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_damaged_file_is_computed_again_and_takes_its_own_room(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ConditionCache(tmp_path, "key", 1 << 30)
    expected = encoder_on(device, cache=first)(MANY)
    path, most, computed = first._path(PASSES[1]), bytes_in(tmp_path), counts(monkeypatch)
    good = path.read_bytes()
    path.write_bytes(SPOILS[name](good))
    for _ in range(2):
        cache = ConditionCache(tmp_path, "key", max(most, bytes_in(tmp_path)))
        assert_equal(encoder_on(device, cache=cache)(MANY), expected)
    assert computed == PASSES[1:2]
    assert bytes_in(tmp_path) == most
    assert_equal(ConditionCache(tmp_path, "key", 0).load(PASSES[1]) or [], expected[8:16])


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    cache, rng = ConditionCache(tmp_path, "key", 1 << 30), random.Random(0)
    states = [torch.randn(length, 8) for length in (3, 1)]
    cache.save(["a", "b"], states)
    path = cache._path(["a", "b"])
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for place in [place for place in range(len(good)) if place >= header or good[place:header].strip()]:
        spoilt = bytearray(good)
        spoilt[place] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        path.write_bytes(spoilt)
        assert cache.load(["a", "b"]) is None, place
    path.write_bytes(good)
    assert_equal(cache.load(["a", "b"]) or [], states)


@pytest.mark.parametrize("change", [lambda one: one.view(torch.int32), lambda one: one.T.reshape(one.shape[::-1])])
def test_states_of_another_kind_with_the_same_bytes_are_not_taken(
    change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    cache = ConditionCache(tmp_path, "key", 1 << 30)
    cache.save(["a"], [torch.randn(1, 8)])
    path = cache._path(["a"])
    with safe_open(path, "pt") as file:
        states, metadata = file.get_tensor("0").clone(), file.metadata()
    changed = change(states).contiguous()
    assert changed.numpy().tobytes() == states.numpy().tobytes()
    save_file({"0": changed}, path, metadata)
    assert cache.load(["a"]) is None
    save_file({"0": states}, path, metadata)
    assert cache.load(["a"]) is not None


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    (tmp_path / f"x.safetensors.7{UNFINISHED}").write_bytes(bytes(999))
    cache = ConditionCache(tmp_path, "key", 999)
    cache.clear()
    assert not any(tmp_path.iterdir())
    cache.save(["a"], [torch.ones(2, 8)])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ConditionCache(tmp_path, "key", 999)

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device"):
            cache.save(["a"], [torch.ones(2, 8)])
    assert not any(tmp_path.iterdir())
    cache.save(["a"], [torch.ones(2, 8)])  # a failed write takes up no space
    assert cache.load(["a"]) is not None
