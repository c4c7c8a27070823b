"""What a generator is conditioned on: prompts, as hidden states of the base model itself."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from qwen_functional import Qwen2Config, Qwen2Weights, pack
from qwen_functional.forward import forward_vjp
from qwen_functional.plan import checked_layers

from ..files import clear_unfinished, replaces
from ..identity import sha256_of
from ..probes.tokenization import check_probes, tokenize_probes

# Few enough that on a GPU, which reads all weights for each pass, a prompt's neighbours cost no extra time.
_PROMPTS_PER_PASS = 8
KEEP_BYTES = 2 * 1024**3


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
        """Collate N tensors (T_i, H)."""
        padded = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        lengths = torch.tensor([len(one) for one in states], device=padded.device)
        return cls(padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None])


class PromptEncoder:
    """Maps prompts to the bare model's hidden states at all their tokens, through the engine.

    A list of prompts is computed in passes of eight, the same passes whichever prompt is requested: rounding makes a
    prompt's states depend on the other prompts of its pass, so this way they depend on the list alone. Computed passes
    are kept in memory up to a number of bytes; the least recently used go first.

    Args:
        layer: the block whose output is read, as in :func:`qwen_functional.forward.forward_vjp`.
        max_length: longer prompts are cut to this many tokens.
        keep_bytes: how many bytes of states are kept in memory.
        cache: keeps them on disk as well, for the next run.

    Raises:
        ValueError: a layer that the model does not have, or a ``max_length`` that leaves no room for a token.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        tokenizer: Tokenizer,
        *,
        layer: int = -1,
        max_length: int = 128,
        keep_bytes: int = KEEP_BYTES,
        cache: ConditionCache | None = None,
    ) -> None:
        (self.layer,) = checked_layers(config, layer)
        self.cache = cache
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.max_length, self.keep_bytes = max_length, keep_bytes
        self._kept: OrderedDict[tuple[str, ...], list[Tensor]] = OrderedDict()
        self._bytes = 0

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """(T_i, H) float32 on the CPU for each prompt.

        Raises:
            ValueError: no prompts, or an empty one.
        """
        return list(self.lazily(prompts))

    def lazily(self, prompts: Sequence[str]) -> PromptStates:
        """The same as a sequence that computes items on access.

        Raises:
            ValueError: as above; on access to an item, a prompt without tokens.
        """
        check_probes(prompts)
        return PromptStates(self, tuple(prompts))

    def states_of(self, texts: tuple[str, ...]) -> list[Tensor]:
        """The states of one pass."""
        states = self._kept.pop(texts, None)
        if states is None:
            states = None if self.cache is None else self.cache.load(texts)
            if states is None:
                states = self._computed(texts)
                if self.cache is not None:
                    self.cache.save(texts, states)
            self._bytes += _nbytes(states)
        self._kept[texts] = states
        while self._bytes > self.keep_bytes:
            self._bytes -= _nbytes(self._kept.popitem(last=False)[1])
        return states

    def _computed(self, texts: tuple[str, ...]) -> list[Tensor]:
        ids = tokenize_probes(self.tokenizer, texts, self.max_length).ids
        value, _ = forward_vjp(self.config, self.weights, pack(ids), layer=self.layer, read="all", wrt=())
        return [states.cpu() for states in value[0].float().split([len(one) for one in ids])]


class ConditionCache:
    """States of prompts on disk, a file for each pass of the encoder. Once the files reach a size, none is added.

    Args:
        folder: a folder for these files alone.
        key: what the states depend on besides the prompts: model, layer, length.
        most_bytes: the limit on the size of all files.
    """

    def __init__(self, folder: str | Path, key: str, most_bytes: int) -> None:
        self.folder, self.key, self.most_bytes = Path(folder), key, most_bytes
        self._bytes = self._counted()

    def clear(self) -> None:
        """Remove what killed processes left unfinished; the caller has locked the folder."""
        if self.folder.is_dir():
            clear_unfinished(self.folder)
        self._bytes = self._counted()

    def _counted(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir()) if self.folder.is_dir() else 0

    def load(self, texts: Sequence[str]) -> list[Tensor] | None:
        """The states of a pass, bit for bit as they were saved; None if they are missing or damaged."""
        path = self._path(texts)
        if not path.is_file():  # a pipe may never open
            return None
        try:
            with safe_open(str(path), "pt") as file:
                states = [file.get_tensor(str(index)) for index in range(len(texts))]
                return states if (file.metadata() or {}).get("sha256") == _digest(states) else None
        except Exception:  # the library may raise anything on garbage; the pass is computed again
            return None

    def save(self, texts: Sequence[str], states: Sequence[Tensor]) -> None:
        """Save a pass, if there is room."""
        path = self._path(texts)
        free = self.most_bytes - self._bytes + (path.stat().st_size if path.exists() else 0)  # it is replaced
        if _nbytes(states) > free:
            return
        tensors = {str(index): one.contiguous() for index, one in enumerate(states)}
        content = save(tensors, metadata={"sha256": _digest(states)})
        if len(content) > free:
            return
        with replaces(path, sync=False) as unfinished:
            unfinished.write_bytes(content)
        self._bytes = self.most_bytes - free + len(content)

    def _path(self, texts: Sequence[str]) -> Path:
        return self.folder / f"{sha256_of([self.key, *texts])}.safetensors"


def _digest(states: Sequence[Tensor]) -> str:
    whole = hashlib.sha256()
    for one in states:
        whole.update(f"{one.dtype}{list(one.shape)}".encode())
        whole.update(one.contiguous().numpy().data)
    return whole.hexdigest()


class PromptStates(Sequence[Tensor]):
    """The states of a list of prompts, made by :meth:`PromptEncoder.lazily`."""

    def __init__(self, encoder: PromptEncoder, prompts: Sequence[str]) -> None:
        self.encoder, self.prompts = encoder, prompts

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # allows negative indices; raises IndexError
        start = position - position % _PROMPTS_PER_PASS
        return self.encoder.states_of(tuple(self.prompts[start : start + _PROMPTS_PER_PASS]))[position - start]


def _nbytes(states: Sequence[Tensor]) -> int:
    return sum(one.nbytes for one in states)
