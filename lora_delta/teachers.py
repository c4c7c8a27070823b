"""A teacher's predictions of a text's next tokens: its states, or the likeliest tokens and their log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from qwen_functional.dtypes import accumulation_dtype

from .files import replaces
from .stored import LENGTHS, StoredTexts

ROWS = 256  # of logits at a time
_FORMAT = "lora-delta top-k 1"
_TENSORS = ("indices", "log_probs")


@dataclass(frozen=True)
class TopK:
    """Predictions of T consecutive tokens: the k likeliest ones.

    Attributes:
        indices: (T, k) integer, token ids.
        log_probs: (T, k) float, at most 0: of the softmax over the whole vocabulary at that temperature.
        temperature: by which logits were divided.
    """

    indices: Tensor
    log_probs: Tensor
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def of_states(cls, h: Tensor, weight: Tensor, k: int, temperature: float = 1.0) -> TopK:
        """From hidden states (T, H) after the final norm and the lm_head (V, H); on the CPU, float32."""
        indices, log_probs = [], []
        for start in range(0, len(h), ROWS):
            z = torch.mm(h[start : start + ROWS], weight.T).to(accumulation_dtype(h.dtype)).div_(temperature)
            most = z.topk(k)
            indices.append(most.indices.int().cpu())
            log_probs.append((most.values - z.logsumexp(-1, keepdim=True)).clamp_(max=0).cpu())
        return cls(torch.cat(indices), torch.cat(log_probs), temperature)

    def split(self, lengths: Sequence[int]) -> list[TopK]:
        """Split into those of several texts."""
        parts = zip(self.indices.split(list(lengths)), self.log_probs.split(list(lengths)), strict=True)
        return [TopK(indices, log_probs, self.temperature) for indices, log_probs in parts]

    def check(self, n_tokens: int, vocab_size: int, name: str) -> None:
        """Raises ``ValueError``, which mentions ``name``, unless it fits this many tokens and this vocabulary."""
        shape = tuple(self.indices.shape)
        if len(shape) != 2 or shape[0] != n_tokens or tuple(self.log_probs.shape) != shape or not shape[1]:
            found = f"indices {shape} and log_probs {tuple(self.log_probs.shape)}"
            raise ValueError(f"{name} has {found}, expected ({n_tokens}, k) each, a row per token of the completion")
        if self.indices.is_floating_point() or self.indices.dtype == torch.bool:
            raise ValueError(f"{name} has indices of {self.indices.dtype}, expected integers")
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name} names token {bad}, expected 0 to {vocab_size - 1}: is it from another tokenizer?")
        # −inf is a probability of 0; NaN is invalid.
        if bool(self.log_probs.isnan().any()) or float(self.log_probs.max()) > 0:
            raise ValueError(f"{name} has log_probs up to {float(self.log_probs.max()):.3g}, expected at most 0")
        if not self.temperature > 0:
            raise ValueError(f"{name} has temperature {self.temperature!r}, expected above 0")


@dataclass(frozen=True)
class States:
    """Predictions of T consecutive tokens: the states from which the model's own lm_head computes the distributions.

    Attributes:
        states: (T, H), after the final norm.
        temperature: by which logits are divided.
    """

    states: Tensor
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.states)

    def check(self, n_tokens: int, hidden_size: int, name: str) -> None:
        """Raises ``ValueError``, which mentions ``name``, unless it fits this many tokens and this hidden size."""
        if tuple(self.states.shape) != (n_tokens, hidden_size):
            shape = tuple(self.states.shape)
            raise ValueError(f"{name} has states {shape}, expected {(n_tokens, hidden_size)} to match the completion")
        if not self.temperature > 0:
            raise ValueError(f"{name} has temperature {self.temperature!r}, expected above 0")


def save_top_k(path: str | Path, texts: Sequence[TopK], vocab_size: int) -> None:
    """Write a teacher's predictions of some texts to one file, whole or not at all: safetensors, float16 and int32.

    Raises:
        ValueError: no texts, or texts of different k or temperature.
    """
    kinds = {(one.indices.shape[1], one.temperature) for one in texts}
    if len(kinds) != 1:
        raise ValueError(f"texts have (k, temperature) {sorted(kinds)}, expected one for all")
    ((_, temperature),) = kinds
    tensors = {
        "indices": torch.cat([one.indices.int() for one in texts]).cpu(),
        "log_probs": torch.cat([one.log_probs.half() for one in texts]).cpu(),
        LENGTHS: torch.tensor([len(one) for one in texts], dtype=torch.int64),
    }
    facts = {"format": _FORMAT, "temperature": json.dumps(temperature), "vocab_size": str(vocab_size)}
    with replaces(Path(path)) as unfinished:
        unfinished.write_bytes(save(tensors, metadata=facts))


class StoredTopK(StoredTexts):
    """What :func:`save_top_k` wrote; each text is read on demand.

    Attributes:
        lengths: (N,) tokens of each text.
        temperature: by which logits were divided.
        sha256: of the file.

    Raises:
        ValueError: no such file, a file of something else, or one for another vocabulary than ``vocab_size``.
    """

    format, content, unit = _FORMAT, "a teacher's log-probabilities", "tokens"

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        self._wanted_size = vocab_size
        self._file: Any = None
        super().__init__(path)

    def _open(self, file: Any, told: Mapping[str, str]) -> None:
        self.vocab_size, self.temperature = int(told["vocab_size"]), float(told["temperature"])
        shapes = [tuple(file.get_slice(name).get_shape()) for name in _TENSORS]
        if self._wanted_size not in (None, self.vocab_size):
            found = f"its vocabulary size is {self.vocab_size}"
            raise ValueError(f"{found}, expected {self._wanted_size} as in the model")
        rows, odd = int(self.lengths.sum()), self.lengths.dim() != 1 or bool((self.lengths < 0).any())
        if odd or shapes[0] != shapes[1] or shapes[0][:1] != (rows,):
            expected = f"({rows}, k) each for its {len(self.lengths)} texts"
            raise ValueError(f"its shapes are {shapes}, expected {expected}")

    def __getitem__(self, index: int) -> TopK:
        """The predictions of one text, in float32.

        Raises:
            ValueError: the content is not valid predictions.
        """
        rows = self._rows(index)
        try:
            if self._file is None:
                self._file = safe_open(str(self.path), "pt").__enter__()
            indices, log_probs = (self._file.get_slice(name)[rows] for name in _TENSORS)
            said = TopK(indices, log_probs.float(), self.temperature)
            said.check(rows.stop - rows.start, self.vocab_size, f"text {index}")
        except Exception as error:
            raise self._no_file(error) from error
        return said


def load_top_k(path: str | Path, vocab_size: int | None = None) -> list[TopK]:
    """What :func:`save_top_k` wrote, text by text, in float32.

    Raises:
        ValueError: no such file, a file of something else, or one for another vocabulary than ``vocab_size``; its
            content is not valid predictions.
    """
    stored = StoredTopK(path, vocab_size)
    return [stored[index] for index in range(len(stored))]
