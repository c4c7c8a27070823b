"""Builds the embedded checkpoint: ``python -m lora_delta.embedded.build [FOLDER]``, half an hour on two cores."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.tasks import CONTEXT, SEEN, word
from lora_delta.progress import progress_bar
from qwen_functional import Qwen2Config, Qwen2Weights, init_weights
from qwen_functional.forward import forward

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = SPECIAL_TOKENS[2]
# ChatML, as the instruct models of the Qwen2 family use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS, CONDITIONS, WORDS = 3000, 32, 6  # a step has CONDITIONS conditions with WORDS answers each
BARE = 0.15  # share of rows without an instruction: their tasks cannot be known
LEARNING_RATE, MATRIX_RATE = 4e-3, 2e-2
WEIGHT_DECAY = 0.02  # for matrices
WARMUP, FLAT = 40, 0.3  # steps, share of the steps


def byte_tokenizer() -> Tokenizer:
    """One token per byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def embedded_config(tokenizer: Tokenizer) -> Qwen2Config:
    """0.8 million parameters."""
    return Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def batch(tokenizer: Tokenizer, chance: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a condition followed by several questions, which do not attend to each other.

    Returns:
        ids and positions (N, T), mask (N, 1, T, T), and targets (N, T), the next token of an answer, else −100.
    """
    end, rows = tokenizer.encode(END).ids, []
    for _ in range(CONDITIONS):
        tasks, before = [chance.choice(SEEN) for _ in range(WORDS)], ""
        if chance.random() >= BARE:
            tasks = tasks[:1] * WORDS
            before = CONTEXT.format(condition=chance.choice(tasks[0].conditions()), prompt="")
        words = [word(chance) for _ in tasks]
        pairs = [(f"{given}=", task.answer(given)) for task, given in zip(tasks, words, strict=True)]
        encoded = [[one.ids for one in tokenizer.encode_batch_fast(list(pair))] for pair in pairs]
        rows.append((tokenizer.encode(before).ids, [(question, answer + end) for question, answer in encoded]))
    return _padded(rows)


def _padded(
    rows: Sequence[tuple[list[int], list[tuple[list[int], list[int]]]]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = max(len(before) + sum(len(q) + len(a) for q, a in pairs) for before, pairs in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, part, targets = ids.clone(), torch.full_like(ids, -1), torch.full_like(ids, -100)
    for row, (before, pairs) in enumerate(rows):
        at = len(before)
        ids[row, :at], positions[row, :at], part[row, :at] = torch.tensor(before), torch.arange(at), 0
        for number, (question, answer) in enumerate(pairs, 1):
            n = len(question) + len(answer)
            own = slice(at, at + n)
            ids[row, own], part[row, own] = torch.tensor(question + answer), number
            positions[row, own] = len(before) + torch.arange(n)
            targets[row, at + len(question) - 1 : at + n - 1] = torch.tensor(answer)
            at += n
    sees = (part[:, :, None] == part[:, None]) | (part[:, None] == 0)
    sees &= torch.ones(length, length, dtype=torch.bool).tril()
    return ids, positions, sees[:, None], targets


def rate(step: int, steps: int) -> float:
    """The learning rate factor: linear warm-up, constant, linear decay."""
    done = step / steps
    return min(1.0, (step + 1) / WARMUP) * (1.0 if done < FLAT else max(0.02, (1 - done) / (1 - FLAT)))


@torch.no_grad()
def muon_step(matrix: Tensor, momentum: Tensor, rate: float) -> None:
    """A step of Muon (Jordan et al. 2024): momentum, with singular values brought near one by five Newton-Schulz steps.

    torch's Muon does these in bfloat16, which on a CPU without bfloat16 products would take most of the training time.
    """
    assert matrix.grad is not None
    momentum.mul_(0.95).add_(matrix.grad)
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.grad + 0.95 * momentum
    x = (x.T if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    rows, columns = matrix.shape
    matrix.mul_(1 - rate * WEIGHT_DECAY).add_(x.T if tall else x, alpha=-rate * max(1, rows / columns) ** 0.5)


def trained_weights(config: Qwen2Config, tokenizer: Tokenizer, steps: int = STEPS) -> Qwen2Weights:
    """Weights trained on the seen tasks' answers, with and without an instruction."""
    weights = init_weights(config, seed=0)
    assert isinstance(weights.embed_tokens, Tensor)
    inner = [one for block in weights.blocks for one in block.tensors().values()]
    matrices = [one for one in inner if one.dim() == 2]
    others = [weights.embed_tokens, weights.norm, *(one for one in inner if one.dim() != 2)]
    for parameter in (*matrices, *others):
        parameter.requires_grad_()
    adam = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    chance, progress, recent = random.Random(0), progress_bar(range(steps), "train the embedded checkpoint"), math.nan
    for step in progress:
        ids, positions, sees, targets = batch(tokenizer, chance)
        logits = forward(config, weights, ids, sees, positions).logits
        loss = F.cross_entropy(logits[targets >= 0], targets[targets >= 0])
        for parameter in (*matrices, *others):
            parameter.grad = None
        loss.backward()
        adam.param_groups[0]["lr"] = LEARNING_RATE * rate(step, steps)
        adam.step()
        for matrix, momentum in zip(matrices, momenta, strict=True):
            muon_step(matrix, momentum, MATRIX_RATE * rate(step, steps))
        recent = loss.item() if math.isnan(recent) else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{recent:.3f}", refresh=False)
    for parameter in (*matrices, *others):
        parameter.requires_grad_(False)
    return weights


def build(folder: Path, steps: int = STEPS) -> None:
    """Train, and write config, weights (bfloat16) and tokenizer to ``folder``, each to a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    config = embedded_config(tokenizer)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": "<|endoftext|>",
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    texts = {
        "config.json": json.dumps({**config.to_dict(), "dtype": "bfloat16"}, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.tmp").write_text(text, encoding="utf-8")
    views = trained_weights(config, tokenizer, steps).named_views(config)
    tensors = {name: view.to(torch.bfloat16).contiguous() for name, view in views.items()}
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    for name in (*texts, "model.safetensors"):
        (folder / f"{name}.tmp").replace(folder / name)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else embedded_checkpoint())
