"""A small training on texts: a base model, conditions with texts, a generator of A and B; and the same run by PEFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from reference import call, hf_model, one_by_one, peft_model, random_lora, tiny_config
from torch import Tensor, nn
from torch.nn import functional as F
from training_case import adam_step

from lora_delta import DifferentiableLMLoss, DifferentiableTextDelta
from lora_delta.generate.generator import DirectGenerator
from lora_delta.generate.options import TrainingOptions
from lora_delta.generate.tasks import Task
from lora_delta.generate.terms import TextLosses
from lora_delta.generate.text_lines import Text
from qwen_functional import LoraSpec, init_weights

CONDITION_SIZE = 6
SPEC = LoraSpec(rank=2, alpha=6, target_modules=("q_proj", "down_proj"), use_rslora=True)
CONFIG = tiny_config(num_hidden_layers=2, hidden_size=16, intermediate_size=32, head_dim=8)


class Own(list[Text]):
    """The texts of a condition, as a training set gives them."""

    def n_tokens(self, index: int) -> int:
        return sum(len(prompt) + len(completion) for prompt, completion in self[index].pairs)


class TextTasks(list[Task]):
    def texts(self, index: int) -> Own:
        found = self[index].texts
        assert isinstance(found, Own)
        return found


@functools.cache
def weights(device: str = "cpu") -> Any:
    return init_weights(CONFIG, dtype=torch.float64, device=device)


def text_tasks(n: int = 5, seed: int = 0) -> TextTasks:
    """Conditions of two prompts, a teacher and four texts each; the third text is a conversation of two turns."""
    chance = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> Tensor:
        size = int(torch.randint(least, most, (), generator=chance))
        return torch.randint(CONFIG.vocab_size, (size,), generator=chance)

    tasks = TextTasks()
    for _ in range(n):
        texts = Own()
        for index in range(4):
            prompt, completion = ids(0, 6), ids(2, 5)
            pairs: list[tuple[Tensor, Tensor]] = [(prompt, completion)]
            contexts = [torch.cat((ids(1, 5), prompt))]
            if index % 3 == 2:
                pairs.append((torch.cat((prompt, completion, ids(1, 4))), ids(2, 5)))
                contexts.append(torch.cat((ids(1, 5), pairs[1][0])))
            for context in contexts:
                if len(context.unique()) == 1:  # else its delta would be only rounding error
                    context[0] = (context[0] + 1) % CONFIG.vocab_size
            texts.append(Text(tuple(pairs), tuple(contexts)))
        states = [torch.randn(3 + i, CONDITION_SIZE, generator=chance, dtype=torch.float64) for i in range(2)]
        teacher = random_lora(CONFIG, SPEC, seed=seed + 100 + len(tasks))
        tasks.append(Task(states, texts=texts, tensors=teacher))
    return tasks


def direct_generator(device: str = "cpu") -> DirectGenerator:
    torch.manual_seed(3)
    made = DirectGenerator(CONFIG, SPEC, CONDITION_SIZE, width=16, depth=1, heads=2)
    with torch.no_grad():  # away from B = 0, where half of the gradients are zero
        for parameter in made.heads.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made.double().to(device)


@dataclass
class ByPeft:
    """The training that the options' docstrings describe, with transformers, PEFT and torch, one adapter at a time."""

    tasks: TextTasks
    options: TrainingOptions
    temperature: float = 1.0
    reduction: str = "token"
    smoothing: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def run(self, generator: nn.Module) -> None:
        asked, device = self.options, next(generator.parameters()).device
        base = hf_model(CONFIG, weights())
        self.bare, self.model = base, peft_model(hf_model(CONFIG, weights()), SPEC)
        adam = torch.optim.AdamW(
            generator.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=asked.weight_decay
        )
        for step in range(asked.steps):
            chance = torch.Generator().manual_seed(asked.seed * 1_000_003 + step)
            adam.zero_grad()
            batches = [self.drawn(chance) for _ in range(asked.accumulate)]
            count = sum(len(self.targets(*pair)) for _, texts, _ in batches for own in texts for pair, _ in own)
            found: dict[str, float] = {}
            for states, texts, teachers in batches:
                padded = nn.utils.rnn.pad_sequence(states, batch_first=True).to(device)
                mask = torch.tensor([[i < len(one) for i in range(padded.shape[1])] for one in states], device=device)
                written = {name: one.cpu() for name, one in generator(padded, mask).items()}
                counted = [name for name, schedule in asked.losses.items() if schedule(step)]
                terms = {name: self.term(name, written, texts, teachers, count) for name in counted}
                loss = torch.stack([asked.losses[name](step) * term for name, term in terms.items()]).sum()
                (loss / asked.accumulate).backward()
                for name, term in {"loss": loss, **terms}.items():
                    found[name] = found.get(name, 0.0) + term.item() / asked.accumulate
            self.history.append({"step": step, **found, **adam_step(adam, asked, step)})

    def drawn(self, chance: torch.Generator) -> tuple[list[Tensor], list[Any], list[Any]]:
        """For each condition of a micro-batch, its states, its texts as a list of (pair, context), and its teacher."""
        asked = self.options
        order = torch.randperm(len(self.tasks), generator=chance)[: asked.batch_size].tolist()
        seeds = torch.randint(2**62, (len(order),), generator=chance).tolist()
        states, texts, teachers = [], list[Any](), [self.tasks[index].tensors for index in order]
        for index, seed in zip(order, seeds, strict=True):
            task = self.tasks[index]
            prompts = torch.randperm(len(task.states), generator=torch.Generator().manual_seed(seed))
            states.append(torch.cat([task.states[one] for one in prompts[: asked.prompts_per_condition]]))
            own = torch.randperm(len(task.texts), generator=torch.Generator().manual_seed(seed ^ 1))
            chosen = [task.texts[one] for one in own[: asked.texts_per_condition].tolist()]
            texts.append([pair for text in chosen for pair in zip(text.pairs, text.contexts, strict=True)])
        return states, texts, teachers

    @staticmethod
    def targets(prompt: Tensor, completion: Tensor) -> Tensor:
        return completion if len(prompt) else completion[1:]

    def term(
        self, name: str, written: dict[str, Tensor], texts: Sequence[Any], teachers: Sequence[Any], count: int
    ) -> Tensor:
        if name == "weights":
            pairs = [(written[key], torch.stack([one[key] for one in teachers])) for key in written]
            return torch.cat([(ours - theirs).square().flatten() for ours, theirs in pairs]).mean()
        if name == "delta":
            triples = zip(one_by_one(written), texts, teachers, strict=True)
            return torch.stack([self.delta(*one) for one in triples]).mean()
        if name == "l1":
            return torch.cat([one.abs().flatten() for one in written.values()]).mean()
        if name == "l2":
            return torch.cat([one.square().flatten() for one in written.values()]).mean()
        if name == "product_l2":
            scaling = SPEC.alpha / math.sqrt(SPEC.rank)
            As = [one for key, one in written.items() if "lora_A" in key]
            Bs = [one for key, one in written.items() if "lora_B" in key]
            return torch.cat([(scaling * B @ A).square().flatten() for A, B in zip(As, Bs, strict=True)]).mean()
        means = []
        for adapter, own in zip(one_by_one(written), texts, strict=True):
            each = [self.losses(name, adapter, pair, context) for pair, context in own]
            if self.options.mean == "tokens":
                means.append(torch.cat(each).sum() * len(texts) * self.options.accumulate / count)
            elif self.reduction == "token":
                means.append(torch.cat(each).mean())
            else:
                means.append(torch.stack([one.mean() for one in each]).mean())
        return torch.stack(means).mean()

    def delta(self, adapter: dict[str, Tensor], texts: Sequence[Any], teacher: dict[str, Tensor]) -> Tensor:
        """The loss of an adapter's deltas, by the formula of ``adapters_delta_loss``."""
        asked, deltas, wanted = self.options.delta, list[Tensor](), list[Tensor]()
        for (prompt, completion), context in texts:
            n = len(prompt) + len(completion)
            first = {"completion": max(0, len(prompt) - 1), "last": n - 1, "all": 0}[asked.positions]
            stop = n - 1 if asked.positions == "completion" else n

            ids, rows = torch.cat((prompt, completion)), slice(first, stop)
            base = self.states(self.bare, None, ids, rows)
            deltas.append(self.states(self.model, adapter, ids, rows) - base)
            with torch.no_grad():
                if asked.target == "context":
                    more = len(context) - len(prompt)
                    behind = torch.cat((context, completion))
                    said = self.states(self.bare, None, behind, slice(first + more, stop + more))
                else:
                    said = self.states(self.model, teacher, ids, rows)
            wanted.append(said - base)
        d, w = torch.cat(deltas, 1), torch.cat(wanted, 1)
        d, w = (one.mean(1, keepdim=True) if asked.pooling == "mean" else one for one in (d, w))
        ratio = (d - w).square().sum((1, 2)) / w.square().sum((1, 2))
        cosine = (1 - F.cosine_similarity(d, w, dim=-1)).mean(1)
        return (self.options.mse_weight * ratio + self.options.cosine_weight * cosine).mean()

    def states(self, model: Any, tensors: dict[str, Tensor] | None, ids: Tensor, rows: slice) -> Tensor:
        """(layers, rows, H)"""
        found = call(model, tensors, input_ids=ids[None], output_hidden_states=True).hidden_states
        return torch.stack([found[one + 1 if one >= 0 else -1][0, rows] for one in self.options.delta.layers])

    def losses(
        self, name: str, adapter: dict[str, Tensor], pair: tuple[Tensor, Tensor], context: Tensor
    ) -> Tensor:
        """The loss of each target token of a pair."""
        prompt, completion = pair
        targets = self.targets(prompt, completion)
        logits = call(self.model, adapter, input_ids=torch.cat((prompt, completion))[None]).logits[0]
        logits = logits[max(0, len(prompt) - 1) : -1]
        if name == "lm":
            return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)
        with torch.no_grad():
            said = call(self.bare, None, input_ids=torch.cat((context, completion))[None]).logits[0]
            said = said[-1 - len(targets) : -1]
        log_p, log_q = (F.log_softmax(one / self.temperature, -1) for one in (said, logits))
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def text_losses(
    device: str = "cpu", asked: TrainingOptions | None = None, temperature: float | None = None, **options: Any
) -> TextLosses:
    """``asked``: the options of a training with deltas of texts."""
    made = TextLosses(DifferentiableLMLoss(CONFIG, weights(device), SPEC, **options))
    if temperature is not None:
        made = replace(made, temperature=temperature)
    if asked is None or "delta" not in asked.text_terms:
        return made
    read: dict[str, Any] = {name: getattr(asked.delta, name) for name in ("positions", "pooling")}
    delta = DifferentiableTextDelta(CONFIG, weights(device), SPEC, layer=asked.delta.layers, **read)
    parts: dict[str, Any] = {name: getattr(asked, name) for name in ("mse_weight", "cosine_weight")}
    return replace(made, delta=delta, from_context=asked.delta_from_context, **parts)
