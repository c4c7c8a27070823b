"""Judging adapters: losses, right answers and deltas against transformers and PEFT, and the figures of verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import call, hf_model, one_by_one, peft_model, random_lora, tiny_config
from torch import Tensor
from torch.nn import functional as F

from lora_delta import DifferentiableLMLoss
from lora_delta.generate.judge import HELD_OUT, SEEN, Case, Judge, Verdict, figures, gibberish, mean_adapter, table
from qwen_functional import LoraSpec, init_weights

F64 = torch.float64
SPEC = LoraSpec(rank=2, alpha=4)
CONFIG = tiny_config()
WEIGHTS = init_weights(CONFIG, dtype=F64)
EXAMPLES: list[list[tuple[list[int], list[int]]]] = [
    [([3, 1, 4], [1, 5, 9]), ([3, 1, 4], [2, 6]), ([7, 7], [8])],
    [([], [2, 3, 4, 5])],
    [([5, 5, 5], [5, 5]), ([6, 5], [1])],
]
CONTEXTS = [[[20, 21, *prompt] for prompt, _ in own] for own in EXAMPLES]


def cases(groups: Sequence[str] = (SEEN, HELD_OUT, HELD_OUT), tasks: Sequence[str] = "abc") -> list[Case]:
    found = []
    for group, task, own, contexts in zip(groups, tasks, EXAMPLES, CONTEXTS, strict=True):
        pairs = [(torch.tensor(p, dtype=torch.int64), torch.tensor(c)) for p, c in own]
        found.append(Case(group, task, f"condition {task}", None, pairs, [torch.tensor(one) for one in contexts], task))
    return found


def states(model: Any, adapter: dict[str, Tensor] | None, before: list[int], text: list[int], n: int) -> Any:
    """The last hidden states of the tokens that predict the last ``n`` of a text, and their logits."""
    found = call(model, adapter, input_ids=torch.tensor([before + text]), output_hidden_states=True)
    return found.hidden_states[-1][0, -1 - n : -1], found.logits[0, -1 - n : -1]


def test_scores_are_those_of_transformers_and_right_is_what_greedy_decoding_writes() -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    model, lm = peft_model(hf_model(CONFIG, WEIGHTS), SPEC), DifferentiableLMLoss(CONFIG, WEIGHTS, SPEC)
    adapters = one_by_one(tensors)
    examples, greedy = list[Any](), list[Any]()
    for adapter, own in zip(adapters, EXAMPLES, strict=True):
        made, written = list(own), []
        for prompt, completion in own:
            text = prompt or completion[:1]
            for _ in completion:  # what greedy decoding writes, token by token
                logits = call(model, adapter, input_ids=torch.tensor([text])).logits[0, -1]
                text = [*text, int(logits.argmax())]
            start = len(prompt) or 1
            written.append(text[start:])
            made.append((text[:start], text[start:]))
        examples.append(made)
        greedy.append(written)
    found = lm.scores(examples, tensors)
    for adapter, own, written, scores in zip(adapters, examples, greedy, found, strict=True):
        for index, ((prompt, completion), score) in enumerate(zip(own, scores, strict=True)):
            targets = completion if prompt else completion[1:]
            _, logits = states(model, adapter, [], prompt + completion, len(targets))
            nats = F.cross_entropy(logits, torch.tensor(targets), reduction="sum")
            assert score.nats == pytest.approx(float(nats), rel=1e-10)
            assert score.n_tokens == len(targets)
            if index < len(written):
                assert score.right == (written[index][: len(targets)] == targets)
            else:
                assert score.right
    assert any(not score.right for own in found for score in own)
    bare = lm.scores(examples)
    _, logits = states(hf_model(CONFIG, WEIGHTS), None, [], [3, 1, 4, 1, 5, 9], 3)
    nats = F.cross_entropy(logits, torch.tensor([1, 5, 9]), reduction="sum")
    found_nats, *rest = bare[0][0]
    assert found_nats == pytest.approx(float(nats), rel=1e-10)
    assert rest == [3, logits.argmax(-1).tolist() == [1, 5, 9]]


@pytest.mark.parametrize("per_pass", [1, 2, 16])
def test_verdicts_are_those_of_peft(per_pass: int) -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    bare, model = hf_model(CONFIG, WEIGHTS), peft_model(hf_model(CONFIG, WEIGHTS), SPEC)
    lm = DifferentiableLMLoss(CONFIG, WEIGHTS)
    judge = Judge(lm, cases(), per_pass=per_pass)
    found = judge.judged(lambda numbers: SPEC.bind(CONFIG, {n: t[list(numbers)] for n, t in tensors.items()}))
    for adapter, own, contexts, verdict, base, prompted in zip(
        one_by_one(tensors), EXAMPLES, CONTEXTS, found, judge.bare(), judge.prompted(), strict=True
    ):
        moved, wanted, nats = [], [], {"adapter": 0.0, "bare": 0.0, "prompted": 0.0}
        for (prompt, completion), context in zip(own, contexts, strict=True):
            targets = torch.tensor(completion if prompt else completion[1:])
            read = {
                "adapter": states(model, adapter, [], prompt + completion, len(targets)),
                "bare": states(bare, None, [], prompt + completion, len(targets)),
                "prompted": states(bare, None, context, completion, len(targets)),
            }
            for name, (_, logits) in read.items():
                nats[name] += float(F.cross_entropy(logits, targets, reduction="sum"))
            moved.append(read["adapter"][0] - read["bare"][0])
            wanted.append(read["prompted"][0] - read["bare"][0])
        d, w = torch.cat(moved), torch.cat(wanted)
        assert verdict.nats == pytest.approx(nats["adapter"], rel=1e-10)
        assert base.nats == pytest.approx(nats["bare"], rel=1e-10)
        assert prompted.nats == pytest.approx(nats["prompted"], rel=1e-10)
        assert verdict.cosine == pytest.approx(float(F.cosine_similarity(d, w).mean()), rel=1e-9)
        assert verdict.distance == pytest.approx(float((d - w).norm() / w.norm()), rel=1e-9)
        assert (base.cosine, base.distance) == (None, 1.0)
        assert prompted.cosine == pytest.approx(1.0)
        assert prompted.distance == 0.0
        assert verdict.n_texts == len(own)


def test_another_conditions_adapter_is_of_the_group_and_of_another_task() -> None:
    lm = DifferentiableLMLoss(CONFIG, WEIGHTS)
    assert Judge(lm, cases((SEEN, SEEN, SEEN), "aab")).others() == [2, 2, 0]
    assert Judge(lm, cases((SEEN, HELD_OUT, SEEN), "abc")).others() == [2, 2, 0]  # alone in its group: any other
    assert Judge(lm, cases((SEEN, HELD_OUT, HELD_OUT), "abc")).others()[1:] == [2, 1]


def test_figures_are_means_with_an_interval_over_tasks_and_runs() -> None:
    chance = torch.Generator().manual_seed(0)
    given = [Case(SEEN, f"task {index // 4}", f"{index}", None, [], []) for index in range(48)]
    rates = torch.rand(12, generator=chance)

    def verdicts() -> list[Verdict]:
        found = []
        for index in range(48):
            n_right = int((torch.rand(10, generator=chance) < rates[index // 4]).sum())
            found.append(Verdict(2.0 * index, 1 + index, n_right, 10, None if index else 0.5, 0.25))
        return found

    runs = [{"generated": verdicts()}, {"generated": verdicts()}]
    one = figures(given, runs)[SEEN]["generated"]
    every = [verdict for run in runs for verdict in run["generated"]]
    assert one["accuracy"] == pytest.approx(sum(verdict.n_right for verdict in every) / 960)
    assert one["loss"] == pytest.approx(sum(v.nats for v in every) / sum(v.n_tokens for v in every))
    assert (one["cosine"], one["distance"]) == (0.5, 0.25)
    assert (one["conditions"], one["tasks"], one["runs"], one["texts"]) == (48, 12, 2, 480)
    low, high = one["accuracy_interval"]
    by_task = torch.tensor([[v.n_right / 10 for v in run["generated"]] for run in runs]).view(2, 12, 4).mean((0, 2))
    spread = float(by_task.std() / 12**0.5)
    each = torch.tensor([one["task_accuracies"][f"task {number}"] for number in range(12)])  # (tasks, runs)
    torch.testing.assert_close(each.mean(1), by_task)
    assert float(each.mean()) == pytest.approx(one["accuracy"])
    assert low < one["accuracy"] < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.35)
    assert figures(given, runs) == figures(given, runs)
    assert "12 tasks, 48 conditions, 480 texts, 2 runs" in table(figures(given, runs))


def test_a_way_without_a_verdict_on_a_case_has_no_figures_of_its_group() -> None:
    verdict = Verdict(1.0, 2, 1, 1, None, 1.0)
    found = figures(cases(), [{"all": [verdict] * 3, "seen alone": [verdict, None, verdict]}])
    assert list(found[SEEN]) == ["all", "seen alone"]
    assert list(found[HELD_OUT]) == ["all"]


def test_gibberish_is_as_long_and_the_same_again() -> None:
    made = gibberish("reverse then add ing", 0)
    assert made == gibberish("reverse then add ing", 0) != gibberish("reverse then add ing", 1)
    assert abs(len(made) - 20) <= 4
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert gibberish("a", 0)


def test_the_mean_adapter_is_over_all_batches() -> None:
    parts = [{"x": torch.randn(n, 2, 3)} for n in (2, 5)]
    assert torch.allclose(mean_adapter(parts)["x"], torch.cat([one["x"] for one in parts]).mean(0), atol=1e-6)
