"""Training on the language model's loss, against the same run in PEFT one adapter at a time; and what is saved."""

from __future__ import annotations

import gc
import json
import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import call, relative_error
from text_case import ByPeft, Own, TextTasks, direct_generator, text_losses, text_tasks, weights

from lora_delta.generate.checkpoints import BEST, METRICS, best_checkpoint, newest_checkpoint
from lora_delta.generate.evaluation import Evaluation
from lora_delta.generate.options import DeltaOptions, TrainingOptions
from lora_delta.generate.schedules import Schedule
from lora_delta.generate.tasks import Task
from lora_delta.generate.terms import TextLosses, contexts_of, pairs_of
from lora_delta.generate.training import train
from lora_delta.own_texts import in_context
from lora_delta.teachers import StoredTopK, TopK, save_top_k

LM, KL, DELTA = {"lm": Schedule(1.0)}, {"kl": Schedule(1.0)}, {"delta": Schedule(0.7)}
REGULARIZED = LM | {"l1": Schedule(0.3), "l2": Schedule(0.2), "product_l2": Schedule(2.0)}


def options(**changes: Any) -> TrainingOptions:
    given: dict[str, Any] = {"steps": 6, "batch_size": 3, "texts_per_condition": 2, "warmup_steps": 2, "losses": LM}
    return TrainingOptions(**{**given, "learning_rate": 0.01, "clip": 1e9, **changes})


@pytest.fixture(scope="module")
def tasks() -> TextTasks:
    return text_tasks()


@pytest.mark.parametrize(
    ("changes", "lm"),
    [
        ({"steps": 50}, {}),
        ({"losses": REGULARIZED, "accumulate": 2, "clip": 0.1}, {"reduction": "example", "label_smoothing": 0.1}),
        ({"losses": LM, "accumulate": 2, "mean": "tokens"}, {"adapters_per_pass": 2}),
        ({"losses": KL, "prompts_per_condition": 2}, {"temperature": 2.0}),
        ({"losses": LM | {"kl": Schedule(0.5, "linear", 3)}, "mean": "tokens"}, {"adapters_per_pass": 1}),
        ({"losses": KL | LM, "texts_per_condition": 9, "seed": 5}, {"label_smoothing": 0.2}),
        ({"losses": DELTA, "delta": DeltaOptions("own", "context", "all", [0, -1])}, {}),
        ({"losses": DELTA, "delta": DeltaOptions("own", "teacher", "last"), "accumulate": 2}, {"adapters_per_pass": 1}),
        ({"losses": DELTA, "delta": DeltaOptions("own", pooling="mean"), "mse_weight": 0.0}, {}),
        ({"losses": DELTA | KL | LM, "delta": DeltaOptions("own", "context"), "mean": "tokens"}, {}),
        ({"losses": KL | DELTA, "delta": DeltaOptions("own", "context", "all")}, {"adapters_per_pass": 2}),
        ({"losses": LM | DELTA | {"weights": Schedule(2.0)}, "delta": DeltaOptions("own", layers=[0])}, {}),
    ],
    ids=str,
)
def test_a_run_on_texts_is_that_of_peft_one_adapter_at_a_time(
    changes: dict[str, Any], lm: dict[str, Any], tasks: TextTasks
) -> None:
    asked, (made, expected) = options(**changes), (direct_generator() for _ in range(2))
    temperature = lm.get("temperature", 1.0)
    history = train(made, tasks, asked, texts=text_losses(asked=asked, **lm), progress=False)
    peft = ByPeft(tasks, asked, temperature, lm.get("reduction", "token"), lm.get("label_smoothing", 0.0))
    peft.run(expected)
    tolerance = 1e-4 if asked.steps > 10 else 1e-6  # Adam takes full steps on gradients that are only rounding error
    for metrics, wanted in zip(history, peft.history, strict=True):
        assert metrics.keys() - {"seconds"} == wanted.keys()
        for name, value in wanted.items():
            assert metrics[name] == pytest.approx(value, rel=tolerance), (metrics["step"], name)
    for (name, found), parameter in zip(made.named_parameters(), expected.parameters(), strict=True):
        assert (found - parameter).norm() <= 10 * tolerance * parameter.norm(), name


def test_what_a_step_has_written_is_let_go_of(tasks: TextTasks) -> None:
    """A hook that refers to its own tensor would keep it and its tape alive: nothing collects that cycle."""
    written = list[weakref.ref]()
    generator = direct_generator()
    generator.register_forward_hook(lambda module, given, made: written.extend(map(weakref.ref, made.values())))
    history = train(generator, tasks, options(steps=2), texts=text_losses(), progress=False)
    gc.collect()
    assert len(history) == 2
    assert len(written) == 2 * len(generator.shapes)
    assert all(one() is None for one in written)


def test_training_on_texts_lowers_their_loss(tasks: TextTasks) -> None:
    history = train(direct_generator(), tasks, options(steps=80), texts=text_losses(), progress=False)
    first, last = (sum(metrics["lm"] for metrics in part) for part in (history[:8], history[-8:]))
    assert last < 0.85 * first


def test_what_a_teacher_has_said_serves_as_the_teacher_does_where_all_is_stored(
    tasks: TextTasks, tmp_path: Path
) -> None:
    live = text_losses(temperature=1.5)
    numbered, said = TextTasks(), list[TopK]()
    for task in tasks:
        texts = Own()
        for text in task.texts:
            texts.append(type(text)(text.pairs, text.contexts, len(said)))
            behind = in_context(pairs_of([[text]]), contexts_of([[text]]), "completion")
            said += live.lm.top_k(behind, 61, temperature=1.5)[0]
        numbered.append(Task(task.states, texts=texts))
    save_top_k(tmp_path / "said", said, 61)
    stored = StoredTopK(tmp_path / "said", 61)
    asked = options(losses=KL | LM)
    expected = train(direct_generator(), numbered, asked, texts=live, progress=False)
    found = train(
        direct_generator(), numbered, asked, texts=TextLosses(live.lm, 1.5, stored), progress=False
    )
    for one, other in zip(found, expected, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=2e-3, abs=2e-3)  # float16 on disk
        assert one["lm"] == pytest.approx(other["lm"], rel=2e-3)


# Evaluation


def evaluation(**changes: Any) -> Evaluation:
    return Evaluation(text_tasks(4, seed=9), **{"every": 2, **changes})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("losses", [LM, KL | LM], ids=lambda losses: " ".join(losses))
@pytest.mark.parametrize("limits", [{}, {"conditions": 2, "texts": 2}, {"texts": None}], ids=str)
def test_an_evaluation_is_the_loss_per_token_of_held_out_texts(
    losses: Any, limits: dict[str, Any], smoothing: float
) -> None:
    """It is computed without the training's label smoothing."""
    held_out, of_texts = evaluation(**limits), text_losses(label_smoothing=smoothing)
    asked = options(steps=2, losses=losses, learning_rate=1e-12, batch_size=2)
    history = train(direct_generator(), text_tasks(), asked, texts=of_texts, evaluation=held_out, progress=False)
    peft = ByPeft(text_tasks(), options(mean="tokens"))
    peft.bare, peft.model = _models()
    generator, sums, count, right = direct_generator(), dict.fromkeys(losses, 0.0), 0, list[bool]()
    for task in text_tasks(4, seed=9)[:: 4 // limits.get("conditions", 4)]:  # spread evenly
        states = task.states[0][None]
        with torch.no_grad():
            written = {name: one[0] for name, one in generator(states, torch.ones(states.shape[:2]).bool()).items()}
        for text in task.texts[: limits.get("texts", 8)]:
            for pair, context in zip(text.pairs, text.contexts, strict=True):
                targets = peft.targets(*pair)
                count += len(targets)
                logits = call(peft.model, written, input_ids=torch.cat(pair)[None]).logits[0]
                right.append(logits[-1 - len(targets) : -1].argmax(-1).tolist() == targets.tolist())
                for name in losses:
                    sums[name] += float(peft.losses(name, written, pair, context).sum())
    assert "held_out_lm" not in history[0]
    for name in losses:
        assert history[1][f"held_out_{name}"] == pytest.approx(sums[name] / count, rel=1e-5)
    assert history[1]["held_out_accuracy"] == pytest.approx(sum(right) / len(right))


def _models() -> Any:
    from reference import hf_model, peft_model
    from text_case import CONFIG, SPEC

    return hf_model(CONFIG, weights()), peft_model(hf_model(CONFIG, weights()), SPEC)


def test_the_best_generator_on_held_out_texts_is_kept_beside_the_last(tasks: TextTasks, tmp_path: Path) -> None:
    made, states, values = direct_generator(), {}, iter((3.0, 2.5, 2.0, 2.25, 2.75, 3.5, 4.0))

    class Watched(Evaluation):
        def measured(self, generator: torch.nn.Module, *given: Any) -> dict[str, float]:
            found = super().measured(generator, *given) | {"held_out_lm": next(values)}
            states[found["held_out_lm"]] = {n: p.detach().clone() for n, p in generator.named_parameters()}
            return found

    watched = Watched(text_tasks(4, seed=9), every=3)
    given: dict[str, Any] = {"texts": text_losses(), "out": tmp_path, "progress": False}
    history = train(made, tasks, options(steps=20), evaluation=watched, **given)
    measured = {m["step"] + 1: m["held_out_lm"] for m in history if "held_out_lm" in m}
    assert list(measured) == [3, 6, 9, 12, 15, 18, 20]
    best, found, newest = min(measured.values()), best_checkpoint(tmp_path), newest_checkpoint(tmp_path)
    assert found is not None
    assert newest is not None
    assert found[1]["progress"]["best"] == best < measured[20]
    assert measured[found[1]["progress"]["best_step"]] == best
    for name, tensor in states[best].items():
        assert torch.equal(found[1]["generator"][name], tensor), name
        assert torch.equal(newest[1]["generator"][name], states[measured[20]][name]), name
    logged = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert {m["step"] + 1: m["held_out_lm"] for m in logged if "held_out_lm" in m} == measured


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(tasks: TextTasks, tmp_path: Path) -> None:
    asked = options(steps=60, learning_rate=0.05)
    given: dict[str, Any] = {"texts": text_losses(), "progress": False}
    held_out = evaluation(patience=2)
    history = train(direct_generator(), tasks, asked, evaluation=held_out, out=tmp_path, **given)
    measured = [metrics["held_out_lm"] for metrics in history if "held_out_lm" in metrics]
    assert len(history) < 60
    assert min(measured) == measured[-3]
    assert all(min(measured[:i]) not in measured[:i][:-2] for i in range(3, len(measured)))  # it did not end too late
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["progress"]["steps"] == len(history)
    before = (tmp_path / BEST).read_bytes()
    assert len(train(direct_generator(), tasks, asked, evaluation=held_out, out=tmp_path, **given)) == len(history)
    assert (tmp_path / BEST).read_bytes() == before
    patient = evaluation(patience=3)
    assert len(train(direct_generator(), tasks, asked, evaluation=patient, out=tmp_path, **given)) > len(history)


def test_an_evaluation_that_is_not_finite_is_no_best_one_and_the_run_goes_on(tasks: TextTasks, tmp_path: Path) -> None:
    class Spoilt(Evaluation):
        def measured(self, *given: Any) -> dict[str, float]:
            return dict.fromkeys(super().measured(*given), math.nan)

    given: dict[str, Any] = {"texts": text_losses(), "out": tmp_path, "progress": False}
    spoilt = Spoilt(text_tasks(4, seed=9), every=2)
    history = train(direct_generator(), tasks, options(steps=4), evaluation=spoilt, **given)
    assert not any("held_out_lm" in metrics for metrics in history)
    assert best_checkpoint(tmp_path) is None
    history = train(direct_generator(), tasks, options(steps=6), evaluation=evaluation(), **given)
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["progress"]["best"] == history[-1]["held_out_lm"]


class CutOff(RuntimeError):
    """Ends a run."""


@pytest.mark.parametrize("losses", [LM, KL, REGULARIZED], ids=lambda losses: " ".join(losses))
@pytest.mark.parametrize("at", [2, 5])
def test_a_run_on_texts_that_was_cut_off_goes_on_to_the_same_bits(
    losses: Any, at: int, tasks: TextTasks, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"texts": text_losses(), "evaluation": evaluation(patience=9), "progress": False}
    asked = options(losses=losses, checkpoint_every=2)
    whole = direct_generator()
    expected = train(whole, tasks, asked, out=tmp_path / "whole", **given)
    cut, calls = direct_generator(), list[None]()

    def count(*_: object) -> None:
        calls.append(None)
        if len([None for call in calls]) > at:
            raise CutOff

    cut.register_forward_pre_hook(count)
    with pytest.raises(CutOff):
        train(cut, tasks, asked, out=tmp_path / "cut", **given)
    made = direct_generator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns that it mends the log
        found = train(made, tasks, asked, out=tmp_path / "cut", **given)
    for one, other in zip(found, expected, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    for (name, tensor), same in zip(made.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(tensor, same), name
    for folder in ("whole", "cut"):
        assert (tmp_path / folder / BEST).is_file()
    ours, theirs = (best_checkpoint(tmp_path / folder) for folder in ("cut", "whole"))
    assert ours is not None
    assert theirs is not None
    assert ours[1]["progress"] == theirs[1]["progress"]


def test_steps_can_be_raised_and_the_rate_goes_along_the_new_curve(tasks: TextTasks, tmp_path: Path) -> None:
    given: dict[str, Any] = {"texts": text_losses(), "progress": False, "out": tmp_path}
    train(direct_generator(), tasks, options(steps=4), **given)
    history = train(direct_generator(), tasks, options(steps=10), **given)
    assert [metrics["step"] for metrics in history] == list(range(10))
    for metrics in history[4:]:
        part = (metrics["step"] - 2) / 8
        factor = 0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2
        assert metrics["learning_rate"] == pytest.approx(0.01 * factor, rel=1e-12)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="steps is 9, expected at least the 10 that the run has done"):
        train(direct_generator(), tasks, options(steps=9), **given)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# What is refused


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (LM, "texts is None, which the loss 'lm' needs"),
        (KL, "texts is None, which the loss 'kl' needs"),
        ({"delta": Schedule(1.0)}, "delta is None, which the loss 'delta' needs"),
    ],
)
def test_a_loss_without_what_it_needs_is_refused(losses: Any, message: str, tasks: TextTasks) -> None:
    with pytest.raises(ValueError, match=message):
        train(direct_generator(), tasks, options(losses=losses), progress=False)


def test_tasks_without_texts_or_contexts_are_refused(tasks: TextTasks) -> None:
    bare = [Task(task.states, texts=[type(text)(text.pairs) for text in task.texts]) for task in tasks]
    with pytest.raises(ValueError, match="a text has no context for a teacher to read"):
        train(direct_generator(), bare, options(losses=KL), texts=text_losses(), progress=False)
    empty = [Task(task.states) for task in tasks]
    with pytest.raises(ValueError, match="adapter 0 has no examples, expected at least one"):
        train(direct_generator(), empty, options(), texts=text_losses(), progress=False)
    with pytest.raises(ValueError, match="tasks are empty, expected at least one"):
        train(direct_generator(), [], options(), texts=text_losses(), progress=False)
    with pytest.raises(ValueError, match="the tasks of an evaluation are empty"):
        Evaluation([])


def test_gradients_of_the_generator_on_texts_are_those_of_peft_in_double(tasks: TextTasks) -> None:
    from lora_delta.generate.terms import Terms, Written

    made, expected = (direct_generator() for _ in range(2))
    asked, peft = options(losses=KL | LM), ByPeft(tasks, options(losses=KL | LM), 1.5)
    peft.bare, peft.model = _models()
    states, texts, _ = peft.drawn(torch.Generator().manual_seed(0))
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in states])[:, None]
    written = expected(padded, mask)
    loss = peft.term("kl", written, texts, [], 0) + peft.term("lm", written, texts, [], 0)
    loss.backward()
    drawn = [[_text(pair, context) for pair, context in own] for own in texts]
    terms = Terms(asked, texts=text_losses(temperature=1.5))
    assert terms.texts is not None
    output = made(padded, mask)
    total, means = terms.texts.mean(output, drawn, {"lm": 1.0, "kl": 1.0})
    total.backward()
    assert float(total.detach()) == pytest.approx(float(loss.detach()), rel=1e-10)
    assert sum(float(one) for one in means.values()) == pytest.approx(float(loss.detach()), rel=1e-10)
    assert set(Written(output, None).tensors) == set(written)
    for (name, ours), theirs in zip(made.named_parameters(), expected.named_parameters(), strict=True):
        if theirs[1].grad is not None and float(theirs[1].grad.norm()) > 1e-12:
            assert ours.grad is not None
            assert relative_error(ours.grad, theirs[1].grad) <= 1e-9, name


def test_the_norms_of_what_was_written_are_those_of_each_adapters_gradient() -> None:
    from lora_delta.generate.terms import Written

    chance, sides = torch.Generator().manual_seed(0), {"lora_A": 5, "lora_B": 7}
    drawn = {name: torch.randn(3, 4, n, generator=chance, dtype=torch.float64) for name, n in sides.items()}
    tensors = {name: one.requires_grad_() for name, one in drawn.items()}
    weights = {name: torch.randn(one.shape, generator=chance, dtype=torch.float64) for name, one in tensors.items()}
    written = Written(tensors, None)
    torch.stack([(written.tensors[name] * weight).sum() for name, weight in weights.items()]).sum().backward()
    expected = torch.cat([weight.flatten(1) for weight in weights.values()], 1).norm(dim=1)
    (found,) = written.norms
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def _text(pair: Any, context: Any) -> Any:
    from lora_delta.generate.text_lines import Text

    return Text((pair,), (context,))
