"""What a generator is conditioned on: prompts, as the hidden states that the base model itself gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qwen_functional import Qwen2Config, Qwen2Weights, pack
from qwen_functional.forward import forward_vjp

from .tokenization import tokenize_probes

_PROMPTS_PER_PASS = 32


@dataclass(frozen=True)
class Condition:
    """A batch of conditions, padded to the longest.

    Attributes:
        states: (N, T, H) float32.
        mask: (N, T) bool, true where there is a token.
    """

    states: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> Condition:
        return Condition(self.states.to(device), self.mask.to(device))

    @classmethod
    def collate(cls, states: Sequence[Tensor]) -> Condition:
        """Of N tensors (T_i, H)."""
        padded = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        lengths = torch.tensor([len(one) for one in states], device=padded.device)
        return cls(padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None])


class PromptEncoder:
    """Prompts to the bare model's hidden states of all their tokens, through the engine; each computed once.

    Args:
        layer: after which block, as in :func:`qwen_functional.forward.forward_vjp`.
        max_length: longer prompts are cut to so many tokens.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        tokenizer: Tokenizer,
        *,
        layer: int = -1,
        max_length: int = 128,
    ) -> None:
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.layer, self.max_length = layer, max_length
        self._cache: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """(T_i, H) float32 on the CPU for each prompt.

        Raises:
            ValueError: no prompts, or an empty one.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(missing), _PROMPTS_PER_PASS):
            texts = missing[start : start + _PROMPTS_PER_PASS]
            self._cache.update(zip(texts, self._states(texts), strict=True))
        return [self._cache[prompt] for prompt in prompts]

    def _states(self, texts: Sequence[str]) -> list[Tensor]:
        ids = tokenize_probes(self.tokenizer, texts, self.max_length).ids
        # Every prefix is a sequence of its own: the prefix tree computes each token once, and reads all of them out.
        prefixes = [one[:end] for one in ids for end in range(1, len(one) + 1)]
        value, _ = forward_vjp(self.config, self.weights, pack(prefixes), layer=self.layer, wrt=())
        return [states.cpu() for states in value[0].float().split([len(one) for one in ids])]
