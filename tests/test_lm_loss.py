"""The language model's loss under adapters, through autograd, against transformers and PEFT on full logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_checkpoint
from devices import DEVICES, tolerance
from reference import call, hf_model, one_by_one, peft_model, random_lora, relative_error, tiny_config
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lora_delta import DifferentiableLMLoss, States, TopK, load_top_k, save_top_k
from qwen_functional import LoraSpec, init_weights, load_pretrained

F64 = torch.float64
SPEC = LoraSpec(rank=3, alpha=7)
CONFIG = tiny_config()
WEIGHTS = init_weights(CONFIG, dtype=F64)
ON = {device: WEIGHTS if device == "cpu" else init_weights(CONFIG, dtype=F64, device=device) for device in DEVICES}
# Shared prompts, a duplicate text, a completion of one token, no prompt at all.
EXAMPLES: list[list[tuple[list[int], list[int]]]] = [
    [([3, 1, 4], [1, 5, 9]), ([3, 1, 4], [2, 6]), ([7, 7], [8])],
    [([], [2, 3, 4, 5, 6, 7, 8])],
    [([5, 5, 5], [5, 5]), ([5, 5, 5], [5, 5]), ([5, 5, 5, 5], [1])],
]


def make(device: str = "cpu", **options: Any) -> DifferentiableLMLoss:
    return DifferentiableLMLoss(CONFIG, ON[device], SPEC, **options)


def leaves(tensors: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in tensors.items()}


def predicted(model: Any, adapter: dict[str, Tensor] | None, prompt: list[int], completion: list[int]) -> Tensor:
    """The logits that predict a completion's tokens; without a prompt, all but its first token."""
    logits = call(model, adapter, input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[max(0, len(prompt) - 1) : -1]


def in_peft(
    tensors: dict[str, Tensor],
    loss: Callable[[Tensor, int, int], Tensor],
    reduction: str = "token",
    device: str = "cpu",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (G,) and their leaves; ``loss`` maps logits and the indices of adapter and example to a loss per token."""
    model, whole = peft_model(hf_model(CONFIG, ON[device]), SPEC), leaves(tensors)
    values = []
    for g, adapter in enumerate(one_by_one(whole)):
        each = [loss(predicted(model, adapter, *example), g, e) for e, example in enumerate(EXAMPLES[g])]
        values.append(torch.cat(each).mean() if reduction == "token" else torch.stack([e.mean() for e in each]).mean())
    return torch.stack(values), whole


def targets_of(g: int, e: int) -> Tensor:
    prompt, completion = EXAMPLES[g][e]
    return torch.tensor(completion if prompt else completion[1:])


def cross_entropy(smoothing: float = 0.0) -> Callable[[Tensor, int, int], Tensor]:
    return lambda logits, g, e: F.cross_entropy(logits, targets_of(g, e), reduction="none", label_smoothing=smoothing)


def assert_same(value: Tensor, ours: dict[str, Tensor], expected: Tensor, theirs: dict[str, Tensor]) -> None:
    """Values are equal, and so are the gradients of a weighted sum of them."""
    device, value = str(value.device.type), value.cpu()
    assert relative_error(value.detach(), expected.detach()) <= tolerance(device, 1e-11)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    floor = 1e-5 * max(float(tensor.grad.norm()) for tensor in theirs.values() if tensor.grad is not None)
    for name, tensor in theirs.items():
        assert ours[name].grad is not None
        difference = float((ours[name].grad.cpu() - tensor.grad).norm())  # type: ignore[operator, union-attr]
        assert difference <= 1e-9 * max(floor, float(tensor.grad.norm())), name  # type: ignore[union-attr]


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize(
    "options", [{}, {"adapters_per_pass": 2, "checkpoint": "block"}, {"label_smoothing": 0.1}], ids=str
)
def test_the_loss_of_each_adapters_examples_equals_peft(device: str, options: dict[str, Any], reduction: str) -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    ours = leaves(tensors, device)
    value = make(device, reduction=reduction, **options)(ours, EXAMPLES)
    expected, theirs = in_peft(tensors, cross_entropy(options.get("label_smoothing", 0.0)), reduction, device)
    assert_same(value, ours, expected, theirs)


def test_one_adapter_without_a_leading_dimension_has_a_scalar_loss() -> None:
    tensors = random_lora(CONFIG, SPEC)
    value = make()(tensors, EXAMPLES[:1])
    assert value.shape == ()
    batch = make()({name: tensor[None] for name, tensor in tensors.items()}, EXAMPLES[:1])
    assert torch.equal(value, batch[0])


def stored_teacher(k: int, temperature: float = 1.0, device: str = "cpu") -> list[list[TopK]]:
    """Another adapter's likeliest tokens, by transformers."""
    model, tensors = peft_model(hf_model(CONFIG, ON[device]), SPEC), random_lora(CONFIG, SPEC, seed=9)
    said = []
    for own in EXAMPLES:
        each = []
        for prompt, completion in own:
            with torch.no_grad():
                log_p = F.log_softmax(predicted(model, tensors, prompt, completion) / temperature, -1)
            most = log_p.topk(k)
            each.append(TopK(most.indices, most.values, temperature))
        said.append(each)
    return said


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (5, 1.0), (61, 1.0), (5, 2.0)])
def test_the_divergence_from_a_stored_teacher_equals_that_of_whole_logits(
    device: str, k: int, temperature: float
) -> None:
    tensors, teacher = random_lora(CONFIG, SPEC, 3), stored_teacher(k, temperature, device)
    ours = leaves(tensors, device)

    def divergence(logits: Tensor, g: int, e: int) -> Tensor:
        said = teacher[g][e]
        log_q = F.log_softmax(logits / temperature, -1).gather(1, said.indices)
        return (said.log_probs.exp() * (said.log_probs - log_q)).sum(1)

    expected, theirs = in_peft(tensors, divergence, device=device)
    assert_same(make(device)(ours, EXAMPLES, teacher), ours, expected, theirs)
    if k == 61:
        assert (expected >= 0).all()


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_live_teacher_says_what_transformers_says(adapted: bool, temperature: float) -> None:
    """For longer prompts with the same completions, as a student's teacher sees them."""
    longer = [[([9, 9, 8, *prompt], completion) for prompt, completion in own] for own in EXAMPLES]
    tensors = random_lora(CONFIG, SPEC, 3, seed=4) if adapted else None
    said = make().top_k(longer, 4, tensors, temperature=temperature)
    model = peft_model(hf_model(CONFIG, WEIGHTS), SPEC) if adapted else hf_model(CONFIG, WEIGHTS)
    for g, own in enumerate(longer):
        for e, (prompt, completion) in enumerate(own):
            adapter = None if tensors is None else {name: tensor[g] for name, tensor in tensors.items()}
            with torch.no_grad():
                log_p = F.log_softmax(predicted(model, adapter, prompt, completion) / temperature, -1)
            most = log_p.topk(4)
            assert torch.equal(said[g][e].indices.long(), most.indices)
            assert relative_error(said[g][e].log_probs, most.values) <= 1e-11
            assert said[g][e].temperature == temperature
    with_prompts = [own for g, own in enumerate(EXAMPLES) if g != 1]  # it has no prompt, so one target fewer
    value = make()(random_lora(CONFIG, SPEC, 2), with_prompts, [said[0], said[2]])
    assert value.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_from_a_live_teacher_equals_that_of_whole_logits_in_peft(
    device: str, temperature: float
) -> None:
    """The teacher is the bare model with longer prompts: context distillation over the whole vocabulary."""
    longer = [[([9, 9, 8, *prompt], completion) for prompt, completion in own] for own in EXAMPLES]
    longer[1] = [([9, 9, 2], EXAMPLES[1][0][1][1:])]  # it has no prompt, so one target fewer
    tensors, lm, bare = random_lora(CONFIG, SPEC, 3), make(device, adapters_per_pass=2), hf_model(CONFIG, ON[device])

    def divergence(logits: Tensor, g: int, e: int) -> Tensor:
        with torch.no_grad():
            log_p = F.log_softmax(predicted(bare, None, *longer[g][e]) / temperature, -1)
        log_q = F.log_softmax(logits / temperature, -1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    ours = leaves(tensors, device)
    teacher = lm.states(longer, temperature=temperature)
    value = lm(ours, EXAMPLES, teacher)
    expected, theirs = in_peft(tensors, divergence, device=device)
    assert_same(value, ours, expected, theirs)
    assert (value >= 0).all()
    themselves = [[(p, c) for p, c in own] for own in EXAMPLES]
    same = lm.states(themselves, ours)
    assert float(lm(ours, themselves, same).detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("adapters_per_pass", [None, 1, 2])
def test_the_mean_loss_and_its_gradients_are_those_of_the_mean(adapters_per_pass: int | None) -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    one, other = leaves(tensors), leaves(tensors)
    lm = make(adapters_per_pass=adapters_per_pass, reduction="example")
    mean, expected = lm.mean_loss(one, EXAMPLES), make(reduction="example")(other, EXAMPLES).mean()
    assert relative_error(mean.detach(), expected.detach()) <= 1e-13
    mean.backward()
    expected.backward()
    for name, tensor in one.items():
        assert relative_error(tensor.grad, other[name].grad) <= 1e-12  # type: ignore[arg-type]


def test_the_mean_over_tokens_counts_each_once_also_over_accumulated_batches() -> None:
    tensors, lm = random_lora(CONFIG, SPEC, 3), make(reduction="example")
    n = [lm.n_targets([own]) for own in EXAMPLES]
    assert n == [6, 6, 5]
    each = make(reduction="token")(tensors, EXAMPLES)
    expected = (each * torch.tensor(n)).sum() / sum(n)
    assert relative_error(lm.mean_loss(tensors, EXAMPLES, over="tokens"), expected) <= 1e-13
    one = one_by_one(tensors)
    parts = [
        lm.mean_loss({k: t[None] for k, t in one[g].items()}, EXAMPLES[g : g + 1], over="tokens", n_tokens=sum(n))
        for g in range(3)
    ]
    assert relative_error(sum(parts), expected) <= 1e-13  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_lora_tensors_get_gradients_of_their_own_dtype_under_autocast(dtype: torch.dtype) -> None:
    lm = DifferentiableLMLoss(CONFIG, init_weights(CONFIG), SPEC)
    ours = leaves(random_lora(CONFIG, SPEC, 3, dtype=dtype))
    plain = lm(ours, EXAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        value = lm(ours, EXAMPLES)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain)
    value.sum().backward()
    assert {tensor.grad.dtype for tensor in ours.values() if tensor.grad is not None} == {dtype}
    expected, _ = in_peft({name: tensor.detach().double() for name, tensor in ours.items()}, cross_entropy())
    assert relative_error(value.detach(), expected.detach()) <= 1e-5


def test_a_loss_without_gradients_makes_no_gradient_of_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    keeps: list[bool] = []
    head = "qwen_functional.heads.lm_head_loss"
    from qwen_functional.ops.lm_head import lm_head_loss

    def watched(*arguments: Any, keep: bool, **options: Any) -> Any:
        keeps.append(keep)
        return lm_head_loss(*arguments, keep=keep, **options)

    monkeypatch.setattr(head, watched)
    tensors = random_lora(CONFIG, SPEC, 3)
    with torch.no_grad():
        make()(leaves(tensors), EXAMPLES)
    make()(tensors, EXAMPLES)
    make().mean_loss(tensors, EXAMPLES)
    assert keeps == [False, False, False]
    make()(leaves(tensors), EXAMPLES)
    assert keeps[3:] == [True]


def test_a_checkpoint_on_disk_streamed_or_not_gives_the_same_bits(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, vocab_size=61)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "checkpoint": "block"}
    whole = DifferentiableLMLoss.from_pretrained(tmp_path, SPEC, **options)
    streamed = DifferentiableLMLoss.from_pretrained(tmp_path, SPEC, stream=True, **options)
    tensors = random_lora(whole.config, SPEC, 3, dtype=torch.float32)
    one, other = leaves(tensors), leaves(tensors)
    values = whole(one, EXAMPLES), streamed(other, EXAMPLES)
    assert torch.equal(*values)
    for value in values:
        value.sum().backward()
    assert all(torch.equal(one[name].grad, other[name].grad) for name in one)  # type: ignore[arg-type]


def test_a_generator_learns_through_the_loss() -> None:
    torch.manual_seed(0)
    tensors = {name: torch.zeros(3, *shape, dtype=F64) for name, shape in make().lora_shapes.items()}
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor.normal_(std=0.2)
        tensor.requires_grad_()
    optimizer, lm, seen = torch.optim.Adam(tensors.values(), lr=0.02), make(), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = lm.mean_loss(tensors, EXAMPLES)
        loss.backward()
        optimizer.step()
        seen.append(float(loss))
    assert seen[-1] < 0.3 * seen[0]


# --- Bad input ----------------------------------------------------------------------------------------------


def top(n: int, k: int = 2, **changes: Any) -> TopK:
    return replace(TopK(torch.zeros(n, k, dtype=torch.int64), torch.full((n, k), -1.0)), **changes)


BAD: dict[str, tuple[Any, Any, str]] = {
    "no list": (3, None, "examples are of type int, expected a list for each of 2 adapters"),
    "too few": ([[([1], [2])]], None, "examples are of length 1, expected a list for each of 2 adapters"),
    "none": ([[([1], [2])], []], None, r"adapter 1 has no examples, expected at least one \(prompt ids"),
    "a text": ([[([1], [2])], "ab"], None, "adapter 1 has a str of examples"),
    "no pair": ([[([1], [2]), [1]], [([1], [2])]], None, "adapter 0, example 1: is not a pair, expected"),
    "no completion": ([[([1], [2]), ([1], [])], [([1], [2])]], None, "adapter 0, example 1: the completion is empty"),
    "one token alone": ([[([], [2])], [([1], [2])]], None, "example 0: the completion has 1 tokens, expected at l"),
    "no token": ([[([1], [2.5])], [([1], [2])]], None, "adapter 0, example 0: the completion holds 2.5, expected int"),
    "no prompt": ([[("x", [2])], [([1], [2])]], None, "adapter 0, example 0: the prompt is a str, expected a list"),
    "a prompt beyond": ([[([61], [2])], [([1], [2])]], None, "adapter 0: token id 61 is outside the vocabulary"),
    "a target beyond": ([[([1], [2])], [([1], [61])]], None, "adapter 1: token id 61 is outside the vocabulary"),
    "too long": ([[([1], [2])], [([1] * 64, [2, 3])]], None, "adapter 1: sequence 0 has 65 tokens, expected at most"),
    "a teacher of fewer": ([[([1], [2])]] * 2, [[top(1)]], "teacher is for 1 adapters, expected 2"),
    "of fewer examples": ([[([1], [2])]] * 2, [[top(1)], []], "teacher of adapter 1 is for 0 examples, expected 1"),
    "of other lengths": ([[([1], [2])]] * 2, [[top(1)], [top(2)]], r"example 0 has indices \(2, 2\) and log_"),
    "of fewer probabilities": (
        [[([1], [2])]] * 2, [[top(1)], [top(1, log_probs=torch.full((1, 3), -1.0))]], r"2\) and log_probs \(1, 3\)",
    ),
    "of another tokenizer": (
        [[([1], [2])]] * 2, [[top(1)], [top(1, indices=torch.tensor([[3, 61]]))]], "names token 61, expected 0 to 60",
    ),
    "no tokens": ([[([1], [2])]] * 2, [[top(1)], [top(1, indices=torch.rand(1, 2))]], "indices of torch.float32"),
    "above 0": (
        [[([1], [2])]] * 2, [[top(1)], [top(1, log_probs=torch.tensor([[0.5, -1]]))]], "log_probs up to 0.5, expected",
    ),
    "nan": ([[([1], [2])]] * 2, [[top(1)], [top(1, log_probs=torch.full((1, 2), torch.nan))]], "log_probs up to nan"),
    "two temperatures": ([[([1], [2])]] * 2, [[top(1)], [top(1, temperature=2.0)]], r"temperatures \[1.0, 2.0\]"),
    "states of another model": (
        [[([1], [2])]] * 2, [[States(torch.zeros(1, 24))], [States(torch.zeros(1, 25))]], r"has states \(1, 25\), e",
    ),
    "two kinds": ([[([1], [2])]] * 2, [[States(torch.zeros(1, 24))], [top(1)]], "teacher mixes states and top k"),
    "no temperature": ([[([1], [2])]] * 2, [[top(1)], [top(1, temperature=0)]], "has temperature 0, expected above 0"),
}  # fmt: skip


@pytest.mark.parametrize("per_pass", [None, 1])
@pytest.mark.parametrize(("examples", "teacher", "message"), BAD.values(), ids=BAD)
def test_bad_examples_and_teachers_are_refused_by_their_place(
    examples: Any, teacher: Any, message: str, per_pass: int | None
) -> None:
    with pytest.raises(ValueError, match=message):
        make(adapters_per_pass=per_pass)(random_lora(CONFIG, SPEC, 2), examples, teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "sum"}, "reduction is 'sum', expected one of"),
        ({"label_smoothing": 1}, "label_smoothing is 1, expected from 0 to below 1"),
        ({"adapters_per_pass": 0}, "adapters_per_pass is 0, expected 1 or more"),
        ({"checkpoint": "all"}, "checkpoint is 'all', expected one of"),
        ({"prepack": "yes"}, "prepack is 'yes', expected True, False or 'auto'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_options_and_inputs_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights have no lm_head, which a loss needs"):
        DifferentiableLMLoss(CONFIG, replace(WEIGHTS, lm_head=None))
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1, expected 0 for targets from a teacher's states"):
        make(label_smoothing=0.1)(random_lora(CONFIG, SPEC, 3), EXAMPLES, make().states(EXAMPLES))
    with pytest.raises(ValueError, match="over is 'texts', expected 'adapters' or 'tokens'"):
        make().mean_loss(random_lora(CONFIG, SPEC, 3), EXAMPLES, over="texts")
    with pytest.raises(ValueError, match="cross_entropy is True without a teacher, expected False"):
        make()(random_lora(CONFIG, SPEC, 3), EXAMPLES, cross_entropy=True)
    with pytest.raises(ValueError, match="k is 62, expected 1 to 61"):
        make().top_k(EXAMPLES, 62)
    with pytest.raises(ValueError, match="temperature is 0, expected above 0"):
        make().top_k(EXAMPLES, 2, temperature=0)
    with pytest.raises(ValueError, match="LoRA tensors are on meta, expected cpu"):
        make()({name: torch.empty(3, *shape, device="meta") for name, shape in make().lora_shapes.items()}, EXAMPLES)
    with pytest.raises(ValueError, match=r"DifferentiableLMLoss is on cpu and is not moved to meta"):
        make().to("meta")


# --- On disk ------------------------------------------------------------------------------------------------


def test_what_a_teacher_says_is_read_as_it_was_written(tmp_path: Path) -> None:
    said = [one for own in make().top_k(EXAMPLES, 5, temperature=2.0) for one in own]
    save_top_k(tmp_path / "said", said, CONFIG.vocab_size)
    read = load_top_k(tmp_path / "said", CONFIG.vocab_size)
    assert len(read) == len(said)
    for one, other in zip(said, read, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.log_probs.half(), other.log_probs.half())
        assert other.log_probs.dtype == torch.float32
        assert other.temperature == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_files_that_no_teacher_wrote_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "said"
    with pytest.raises(ValueError, match="said is not a file, expected one of a teacher's log-probabilities"):
        load_top_k(path)
    save_top_k(path, [top(3)], 61)
    with pytest.raises(ValueError, match="its vocabulary size is 61, expected 62 as in the model"):
        load_top_k(path, 62)
    content = path.read_bytes()
    for spoilt in (b"", content[:40], content[:-3], content[:8] + b"x" + content[9:]):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match="said is not a file of a teacher's log-probabilities"):
            load_top_k(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="its format is None, expected 'lora-delta top-k 1'"):
        load_top_k(path)
    save_top_k(path, [top(3, indices=torch.full((3, 2), 70))], 61)
    with pytest.raises(ValueError, match="text 0 names token 70, expected 0 to 60"):
        load_top_k(path)
    for texts, message in (([], r"\[\]"), ([top(1), top(1, k=3)], r"\[\(2, 1.0\), \(3, 1.0\)\]")):
        with pytest.raises(ValueError, match=rf"texts have \(k, temperature\) {message}, expected one for all"):
            save_top_k(path, texts, 61)


@pytest.mark.parametrize(
    ("lengths", "rows", "valid"), [([], 0, True), ([2, 1], 3, True), ([-1, 4], 3, False), ([2], 3, False)]
)
def test_a_files_lengths_count_its_rows(lengths: list[int], rows: int, valid: bool, tmp_path: Path) -> None:
    facts = {"format": "lora-delta top-k 1", "temperature": "1.0", "vocab_size": "61"}
    tensors = {"indices": torch.zeros(rows, 2, dtype=torch.int32), "log_probs": torch.full((rows, 2), -1.0).half()}
    save_file(tensors | {"lengths": torch.tensor(lengths, dtype=torch.int64)}, tmp_path / "said", facts)
    if valid:
        assert [len(one) for one in load_top_k(tmp_path / "said")] == lengths
        return
    expected = rf"expected \({sum(lengths)}, k\) each for its {len(lengths)} texts"
    with pytest.raises(ValueError, match=rf"its shapes are .*, {expected}"):
        load_top_k(tmp_path / "said")


# --- On real weights ----------------------------------------------------------------------------------------

REAL = [
    [("The capital of France is", " Paris, and that of Italy is Rome."), ("def add(a, b):\n", "    return a + b\n")],
    [("Translate to German: good morning", "\nGuten Morgen"), ("Once upon a time", " there was a king and a horse")],
    [("1, 2, 3, 4,", " 5, 6, 7, 8, 9, 10")],
]


@pytest.mark.real_checkpoint
def test_on_real_weights_loss_and_gradients_equal_peft(real_checkpoint: str) -> None:
    from lora_delta.probes.tokenization import load_tokenizer
    from qwen_functional.hub import resolve_checkpoint

    folder = resolve_checkpoint(real_checkpoint)
    tokenizer, spec = load_tokenizer(folder), LoraSpec(rank=4, target_modules=("q_proj", "v_proj", "down_proj"))
    examples = [[(tokenizer.encode(p).ids, tokenizer.encode(c).ids) for p, c in own] for own in REAL]
    config, weights = load_pretrained(folder, torch.float32)
    ours = leaves(random_lora(config, spec, 3, dtype=torch.float32, size=0.02))
    value = DifferentiableLMLoss(config, weights, spec)(ours, examples)
    value.sum().backward()
    model = peft_model(hf_model(config, weights), spec)
    for g, adapter in enumerate(one_by_one({name: tensor.detach() for name, tensor in ours.items()})):
        theirs = leaves(adapter)
        each = [
            F.cross_entropy(predicted(model, theirs, p, c), torch.tensor(c), reduction="none") for p, c in examples[g]
        ]
        expected = torch.cat(each).mean()
        expected.backward()
        assert value[g].item() == pytest.approx(expected.item(), rel=1e-4)
        of_peft = {name: tensor.grad for name, tensor in theirs.items() if tensor.grad is not None}
        assert of_peft.keys() == theirs.keys()
        of_ours = {name: ours[name].grad[g] for name in of_peft}  # type: ignore[index]
        whole = (torch.cat([part.flatten() for part in parts.values()]) for parts in (of_ours, of_peft))
        assert relative_error(*whole) <= 1e-4
        for name, gradient in of_peft.items():  # rounding may change a small one by 1e-4
            assert relative_error(of_ours[name], gradient) <= 1e-3, name
