"""What all contenders compute: the same weights, texts, adapters and cotangent, drawn anew in every process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_delta.lm_loss import Examples
from lora_delta.probes.chat import load_chat_template
from lora_delta.probes.texts import create_generic_probes, create_mixed_probes
from lora_delta.probes.tokenization import load_tokenizer, tokenize_probes
from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, init_weights, load_pretrained, read_config
from qwen_functional.dtypes import default_compute_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Those published for Qwen2.5, and one for tests:
# hidden, intermediate, layers, attention heads, key-value heads, vocabulary, tied lm_head
SIZES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
    "tiny": (64, 192, 3, 4, 2, 1000, True),
}

PROBE_KINDS = ("generic", "mixed", "chat")  # chat: the mixed ones in the checkpoint's chat template
MAX_LENGTH = 256  # of a probe; the first published implementation pads to it
# Tokens per probe under Qwen's tokenizer, in the order of lora_delta.probes.texts.
GENERIC_LENGTHS = (32, 31, 31, 33, 31)
MIXED_LENGTHS = (*GENERIC_LENGTHS, 23, 19, 10, 13, 26, 35, 24, 12, 16, 21)
CHAT_PREFIX, CHAT_SUFFIX = 24, 5  # tokens that the chat template puts before and after each probe


def named_config(size: str) -> Qwen2Config:
    """The config of one of :data:`SIZES`."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def random_checkpoint(size: str, folder: Path) -> str:
    """Random weights of a named size as a checkpoint without a tokenizer, in bfloat16."""
    config = named_config(size)
    weights = init_weights(config, dtype=torch.bfloat16).named_views(config)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({name: view.contiguous() for name, view in weights.items()}, folder / "model.safetensors")
    return str(folder)


def checkpoint_of(model: str | None, size: str | None, scratch: str) -> str:
    """The folder of a checkpoint: ``model``, or the hub's files of that id, or random weights in ``scratch``."""
    if model is None:
        return random_checkpoint(size or "0.5b", Path(scratch))
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    return snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"])


def has_tokenizer(folder: str) -> bool:
    return (Path(folder) / "tokenizer.json").exists() or (Path(folder) / "vocab.json").exists()


def synthetic_probes(kind: str, vocab_size: int) -> list[list[int]]:
    """Token ids with the lengths and the shared prefixes of the real probes, for a model without a tokenizer.

    The real generic probes share 3 tokens with one another, the mixed ones 5: here some share the first one.
    """
    lengths, sharing = (GENERIC_LENGTHS, 4) if kind == "generic" else (MIXED_LENGTHS, 6)
    ids = iter(range(2, 2 + sum(MIXED_LENGTHS) + CHAT_PREFIX + CHAT_SUFFIX * len(MIXED_LENGTHS)))
    probes = [[next(ids) for _ in range(length)] for length in lengths]
    for probe in probes[:sharing]:
        probe[0] = 1
    if kind == "chat":
        prefix = [next(ids) for _ in range(CHAT_PREFIX)]
        probes = [[*prefix, *probe, *(next(ids) for _ in range(CHAT_SUFFIX))] for probe in probes]
    # A stride that is prime to the vocabulary spreads the ids over the whole embedding.
    return [[token * 7919 % vocab_size for token in probe] for probe in probes]


def probe_ids(folder: str, kind: str) -> list[list[int]]:
    """The probes of a kind as token ids, real ones where a checkpoint brings its tokenizer."""
    if not has_tokenizer(folder):
        return synthetic_probes(kind, read_config(folder).vocab_size)
    texts = create_generic_probes() if kind == "generic" else create_mixed_probes()
    if kind == "chat":
        template = load_chat_template(folder)
        texts = [template.apply_chat_template(text) for text in texts]
    return tokenize_probes(load_tokenizer(folder), texts, MAX_LENGTH, add_special_tokens=kind != "chat").ids


def tree_tokens(probes: Sequence[Sequence[int]]) -> int:
    """Tokens of the probes' prefix tree: every distinct prefix counts once."""
    return len({tuple(probe[: end + 1]) for probe in probes for end in range(len(probe))})


@dataclass(frozen=True)
class Workload:
    """A job that a fresh process can do on its own.

    Attributes:
        folder: of a checkpoint.
        probes: token ids that every adapter reads.
        examples: of each adapter, (prompt ids, completion ids) pairs: its own texts, for a language model's loss.
        rounded_to: weights and adapters are rounded to this dtype before they go to ``dtype``: a float32
            workload can so hold exactly the numbers of a bfloat16 one.
        seed_probes: PEFT takes so many probes at a time; None for all at once.
        adapters_per_pass: the engine takes so many adapters at a time; None for all at once.
        adapter_folders: of PEFT adapters on disk, to be labelled.
        top_k: how many log-probabilities of each target a teacher tells; None for no teacher.
        compute: the engine and the floor multiply in this dtype; None for the engine's own choice.
        device: where all of it runs, such as ``"cuda"``.
    """

    folder: str
    probes: list[list[int]]
    adapters: int
    rank: int
    dtype: torch.dtype
    threads: int
    examples: Examples = ()
    rounded_to: torch.dtype | None = None
    seed_probes: int | None = None
    adapters_per_pass: int | None = None
    adapter_folders: tuple[str, ...] = ()
    top_k: int | None = None
    compute: torch.dtype | None = None
    device: str = "cpu"

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(rank=self.rank, alpha=2 * self.rank)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the engine and the floor multiply in."""
        return self.compute or default_compute_dtype(self.dtype, torch.device(self.device))

    @property
    def tokens(self) -> int:
        """Real tokens of one step: the examples', or the probes' once per adapter."""
        if self.examples:
            return sum(len(prompt) + len(completion) for own in self.examples for prompt, completion in own)
        return self.adapters * sum(map(len, self.probes))

    @property
    def tree_tokens(self) -> int:
        """Tokens of one step that cannot be avoided: shared prefixes of probes count once per adapter."""
        return self.tokens if self.examples else self.adapters * tree_tokens(self.probes)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def is_small(self) -> bool:
        """Whether the weights take less memory than the interpreter that holds them."""
        config = self.config()
        embedding, mlp = config.vocab_size * config.hidden_size, config.intermediate_size * config.hidden_size
        return embedding + 3 * config.num_hidden_layers * mlp < 2**24

    def config(self) -> Qwen2Config:
        return read_config(self.folder)

    def lora(self, config: Qwen2Config) -> dict[str, Tensor]:
        """{PEFT name: (G, r, in) or (G, out, r)}, random: A as PEFT starts it, B small but not zero."""
        tensors, generator = {}, self._generator(1)
        for name, (rows, columns) in self.spec.shapes(config).items():
            scale = columns**-0.5 if ".lora_A." in name else 0.005
            tensor = torch.randn(self.adapters, rows, columns, generator=generator, device=self.device) * scale
            tensors[name] = tensor.to(self.rounded_to or self.dtype).to(self.dtype)
        return tensors

    def cotangent(self, config: Qwen2Config) -> Tensor:
        """(G, P, H) float32."""
        shape = self.adapters, len(self.probes), config.hidden_size
        return torch.randn(shape, generator=self._generator(2), device=self.device)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def engine_weights(self, stream: bool = False) -> tuple[Qwen2Config, Qwen2Weights]:
        return load_pretrained(self.folder, dtype=self.dtype, device=self.device, stream=stream)

    def hf_model(self, with_lm_head: bool) -> Any:
        """transformers' Qwen2ForCausalLM or Qwen2Model with the same weights, frozen, in evaluation mode."""
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        kind = transformers.Qwen2ForCausalLM if with_lm_head else transformers.Qwen2Model
        model = kind.from_pretrained(self.folder, dtype=self.dtype)
        if self.rounded_to is not None:
            for parameter in model.parameters():
                parameter.data.copy_(parameter.data.to(self.rounded_to))
        return model.requires_grad_(False).eval().to(self.device)
