"""Makes the embedded checkpoint: ``python -m lora_delta.embedded.build [FOLDER]``, ten minutes on two cores."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.tasks import TASKS, example, padded
from qwen_functional import Qwen2Config, Qwen2Weights, init_weights
from qwen_functional.forward import forward

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# ChatML, as the instruct models of the Qwen2 family use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP = 2500, 96, 2e-3, 150
BARE = 0.25  # share of examples without an instruction: their task cannot be known


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


def batch(tokenizer: Tokenizer, generator: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of :func:`padded`, of random tasks with and without an instruction."""
    examples = []
    for _ in range(BATCH_SIZE):
        task = generator.choice(TASKS)
        prompt = None if generator.random() < BARE else generator.choice(task.prompts)
        examples.append(example(task, generator, prompt))
    return padded(tokenizer, examples)


def trained_weights(config: Qwen2Config, tokenizer: Tokenizer, steps: int = STEPS) -> Qwen2Weights:
    """Weights trained on the answers of :data:`TASKS`, with and without an instruction."""
    weights = init_weights(config, seed=0)
    assert isinstance(weights.embed_tokens, Tensor)
    parameters = [weights.embed_tokens, weights.norm]
    parameters += [tensor for block in weights.blocks for tensor in block.tensors().values()]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP), eta_min=LEARNING_RATE / 50)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [WARMUP])
    generator, progress = random.Random(0), tqdm(range(steps), desc="train the embedded checkpoint")
    for step in progress:
        ids, mask, targets = batch(tokenizer, generator)
        logits = forward(config, weights, ids, mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    for parameter in parameters:
        parameter.requires_grad_(False)
    return weights


def build(folder: Path, steps: int = STEPS) -> None:
    """Train, and write config, weights (bfloat16) and tokenizer to ``folder``, each to a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    config = embedded_config(tokenizer)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
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
