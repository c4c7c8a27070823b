"""The reference generators: what they write before training, and what it depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import call, hf_model, peft_model, random_lora, relative_error, tiny_config
from torch import Tensor

from lora_delta.generate.conditions import Condition
from lora_delta.generate.generator import AdditiveGenerator, DirectGenerator, LoRAGenerator
from lora_delta.generate.tokens import TokenFormat
from qwen_functional import LoraSpec, init_weights

CONFIG = tiny_config(num_hidden_layers=3, hidden_size=16, intermediate_size=32, head_dim=8)
SIZE = 6
SPECS = [
    LoraSpec(rank=4),
    LoraSpec(rank=2, target_modules=("q_proj", "v_proj"), use_rslora=True),
    LoraSpec(rank=3, target_modules=("down_proj",), layers_to_transform=(0, 2)),
    LoraSpec(rank=2, target_modules=("q_proj", "up_proj"), rank_pattern={"layers.1.self_attn.q_proj": 5}),
]


def condition(*lengths: int, seed: int = 0) -> Condition:
    chance = torch.Generator().manual_seed(seed)
    return Condition.collate([torch.randn(length, SIZE, generator=chance) for length in lengths])


def direct(spec: LoraSpec, **sizes: int) -> DirectGenerator:
    torch.manual_seed(0)
    return DirectGenerator(CONFIG, spec, SIZE, **{"width": 16, "depth": 1, "heads": 2, **sizes})


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{len(spec.target_modules)} {spec.rank}")
def test_a_direct_generator_writes_the_tensors_of_its_spec(spec: LoraSpec) -> None:
    given = condition(3, 5)
    written = direct(spec)(given.states, given.mask)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        name: (2, *shape) for name, shape in spec.shapes(CONFIG).items()
    }
    assert list(written) == list(spec.shapes(CONFIG))
    assert all(tensor.is_contiguous() for tensor in written.values())
    spec.bind(CONFIG, written)


@pytest.mark.parametrize("spec", SPECS[:2], ids=["seven", "two"])
def test_an_adapter_that_is_not_trained_yet_begins_as_pefts_do_and_changes_nothing(spec: LoraSpec) -> None:
    given, ids = condition(4), torch.tensor([[3, 1, 4, 1, 5]])
    written = {name: tensor[0].detach() for name, tensor in direct(spec)(given.states, given.mask).items()}
    base = hf_model(CONFIG, init_weights(CONFIG))
    expected = call(base, None, input_ids=ids).logits
    model = peft_model(hf_model(CONFIG, init_weights(CONFIG)), spec)
    fresh: dict[str, Tensor] = {name.replace(".default", ""): value for name, value in model.named_parameters()}
    assert torch.equal(call(model, written, input_ids=ids).logits, expected)
    for name, tensor in written.items():
        assert tensor.shape == fresh[name].shape
        if "lora_A" in name:
            assert tensor.std() == pytest.approx(float(fresh[name].std()), rel=0.35), name


def test_conditions_make_a_little_difference_to_a_and_none_to_b_before_training() -> None:
    given = condition(4, 4)
    for name, tensor in direct(SPECS[0])(given.states, given.mask).items():
        one, other = tensor.detach()
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert 0 < float((one - other).norm()) < 0.3 * float(one.norm()), name


@pytest.mark.parametrize("kind", ["tokens", "direct"])
def test_an_adapter_does_not_depend_on_the_others_of_its_batch_or_on_padding(kind: str) -> None:
    torch.manual_seed(0)
    made: Any = direct(SPECS[0])
    if kind == "tokens":
        made = LoRAGenerator(TokenFormat.for_config(CONFIG, 4, 8), SIZE, width=16, depth=1, heads=2)
    together, alone = condition(3, 7), condition(3)
    both, one = (made(given.states, given.mask) for given in (together, alone))
    if isinstance(both, Tensor):
        both, one = {"tokens": both}, {"tokens": one}
    for name in both:
        torch.testing.assert_close(both[name][:1], one[name], rtol=1e-4, atol=1e-5)


def test_tokens_are_a_mean_and_mixtures_of_their_places_components() -> None:
    torch.manual_seed(0)
    format = TokenFormat.for_config(CONFIG, 4, 8)
    made = LoRAGenerator(format, SIZE, width=16, depth=1, heads=2, components=3)
    given = condition(5, 2)
    x = made.slots(given.states, given.mask)
    expected, place = [], 0
    for layer in range(3):
        for slot, (_, _, n) in enumerate(format.groups):
            shares = made.mixtures[slot](x[:, layer, slot]).view(2, n, 3)
            for index in range(n):
                mean, components = made.basis[place, 0], made.basis[place, 1:]
                expected.append(mean + shares[:, index] @ components)
                place += 1
    tokens = made(given.states, given.mask)
    assert tokens.shape == (2, format.n_tokens, *format.token_shape)
    torch.testing.assert_close(tokens.flatten(2), torch.stack(expected, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tokens", "direct"])
def test_bfloat16_autocast_gives_a_generators_numbers_within_its_rounding(kind: str) -> None:
    torch.manual_seed(0)
    made: Any = direct(SPECS[0])
    if kind == "tokens":
        made = LoRAGenerator(TokenFormat.for_config(CONFIG, 4, 8), SIZE, width=16, depth=1, heads=2)
    given = condition(5, 2)
    exact = made(given.states, given.mask)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = made(given.states, given.mask)
    pairs = [(narrow, exact)] if isinstance(exact, Tensor) else [(narrow[name], exact[name]) for name in exact]
    for one, other in pairs:
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.05 * other.norm()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 15}, "width is 15, expected a multiple of heads = 2"),
        ({"depth": 0}, "depth is 0, expected an integer of at least 1"),
        ({"heads": 2.0}, r"heads is 2\.0, expected an integer"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        direct(SPECS[0], **sizes)
    with pytest.raises(ValueError, match=message):
        LoRAGenerator(TokenFormat.for_config(CONFIG, 4, 8), SIZE, **{"width": 16, "heads": 2, **sizes})


# The additive generator


def additive(spec: LoraSpec, **options: Any) -> AdditiveGenerator:
    torch.manual_seed(0)
    made = AdditiveGenerator(CONFIG, spec, SIZE, width=16, features=5, **options)
    return made.double()


@pytest.mark.parametrize("writes", ["B", "AB"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{len(spec.target_modules)} {spec.rank}")
def test_an_additive_generator_writes_the_tensors_of_its_spec(spec: LoraSpec, writes: str) -> None:
    given = condition(3, 5)
    written = additive(spec, writes=writes)(given.states.double(), given.mask)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        name: (2, *shape) for name, shape in spec.shapes(CONFIG).items()
    }
    assert list(written) == list(spec.shapes(CONFIG))
    spec.bind(CONFIG, written)
    for name, tensor in written.items():  # an A that is not generated is shared
        assert torch.equal(tensor[0], tensor[1]) == ("lora_A" in name and writes == "B"), name


@pytest.mark.parametrize("writes", ["B", "AB"])
def test_what_an_additive_generator_writes_of_two_conditions_together_is_what_it_writes_of_each_added(
    writes: str,
) -> None:
    made, nothing = additive(SPECS[0], writes=writes), torch.zeros(1, 1, SIZE, dtype=torch.float64)
    one, other = (condition(n, seed=n).states.double() for n in (2, 3))
    both = torch.cat((other, one), 1)

    def written(states: Tensor, there: bool = True) -> dict[str, Tensor]:
        return made(states, torch.full(states.shape[:2], there))

    start = written(nothing, there=False)
    for name, tensor in written(both).items():
        parts = [written(states)[name] - start[name] for states in (one, other)]
        assert torch.allclose(tensor - start[name], parts[0] + parts[1], rtol=1e-10, atol=1e-12), name


def test_padding_changes_nothing_that_an_additive_generator_writes() -> None:
    made, given = additive(SPECS[1]), condition(3, 7)
    alone = made(given.states[:1, :3].double(), given.mask[:1, :3])
    states = given.states.double().masked_fill(~given.mask[..., None], float("nan"))
    for name, tensor in made(states, given.mask).items():
        assert torch.allclose(tensor[:1], alone[name], rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("writes", ["B", "AB"])
def test_an_additive_generator_that_starts_from_teachers_has_their_mean_and_can_write_each(writes: str) -> None:
    made = additive(SPECS[3], writes=writes)
    teachers = random_lora(CONFIG, SPECS[3], 4)
    made.fit(teachers)
    sides = [names for (_, side, *_), names in made._kinds.items() if side in writes]
    for start, names in zip(made.start, made._kinds.values(), strict=True):
        for one, name in zip(start, names, strict=True):
            assert torch.allclose(one, teachers[name].mean(0), atol=1e-12)
    # Four teachers span three directions around their mean: each is a mixture of three components.
    basis = torch.cat([one.transpose(0, 1).flatten(1) for one in made.components], 1)[:3]
    moved = torch.cat([(teachers[name] - teachers[name].mean(0)).flatten(1) for names in sides for name in names], 1)
    solved = torch.linalg.lstsq(basis.T, moved.T).solution
    assert relative_error(basis.T @ solved, moved.T) <= 1e-9
    with pytest.raises(ValueError, match=r"teachers' '.*' has shape None"):
        made.fit({})


@pytest.mark.parametrize(("name", "value"), [("width", 0), ("features", True), ("scale", 1.5), ("writes", "A")])
def test_a_size_of_an_additive_generator_that_cannot_be_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected"):
        AdditiveGenerator(CONFIG, SPECS[0], SIZE, **{name: value})
