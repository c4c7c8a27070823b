"""What every way of doing it computes: the same weights, probes, adapters and cotangent, in every process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from probe_sets import tree_tokens
from sizes import named_config
from torch import Tensor

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, load_pretrained, read_config
from qwen_functional.dtypes import default_compute_dtype
from qwen_functional.weights import empty_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# One pass over n adapters: the value (n, P, H) and {PEFT name: gradient (n, …)}.
Pass = tuple[Tensor, dict[str, Tensor]]


class Way(Protocol):
    """One way of computing the value and all gradients. Made from a workload, with the weights loaded."""

    def weights(self) -> Iterable[Tensor]:
        """All base weights."""

    def step(self, adapters: int) -> list[Pass]:
        """Forward and backward of the first ``adapters`` adapters, in one pass or in several."""


@dataclass(frozen=True)
class Workload:
    """A job that a fresh process can do on its own.

    Attributes:
        folder: a checkpoint's folder, or None for random weights of the named ``size``.
        rounded_to: weights and adapters are rounded to this dtype before they go to ``dtype``: a float32
            workload can so hold exactly the numbers of a bfloat16 one.
        seed_probes: the seed's way takes so many probes at a time; None for all at once, as the seed does.
        adapters_per_pass: the engine takes so many adapters at a time; None for all at once.
        device: where all of it runs, such as ``"cuda"``.
        compute: the engine and the floor multiply in this dtype; None for the engine's own choice.
    """

    folder: str | None
    size: str | None
    probes: list[list[int]]
    adapters: int
    rank: int
    dtype: torch.dtype
    threads: int
    rounded_to: torch.dtype | None = None
    seed_probes: int | None = None
    adapters_per_pass: int | None = None
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
        """Real tokens of one step: the probes' own, once per adapter."""
        return self.adapters * sum(map(len, self.probes))

    @property
    def tree_tokens(self) -> int:
        """Tokens of one step that cannot be avoided: shared prefixes counted once per adapter."""
        return self.adapters * tree_tokens(self.probes)

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
        return config_of(self.folder, self.size)

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
        if self.folder is not None:
            return load_pretrained(self.folder, dtype=self.dtype, device=self.device, stream=stream)
        if stream:
            raise ValueError("random weights are not on disk, expected a checkpoint to stream them from")
        config = self.config()
        return config, self._random_weights(config)

    def _random_weights(self, config: Qwen2Config) -> Qwen2Weights:
        """Those of ``init_weights``, but drawn on the device: on a GPU other numbers, in no time."""
        generator, weights = self._generator(0), empty_weights(config, self.dtype, self.device)
        for name, view in weights.named_views(config).items():
            values = torch.randn(view.shape, generator=generator, device=self.device)
            if name.endswith("norm.weight"):
                values.mul_(0.1).add_(1.0)
            else:
                values.mul_(0.1 if name.endswith(".bias") else config.initializer_range)
            view.copy_(values)
        return weights

    def hf_model(self, with_lm_head: bool) -> Any:
        """transformers' Qwen2ForCausalLM or Qwen2Model with the same weights, frozen, in evaluation mode."""
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        kind = transformers.Qwen2ForCausalLM if with_lm_head else transformers.Qwen2Model
        if self.folder is not None:
            model = kind.from_pretrained(self.folder, dtype=self.dtype)
        else:
            config = self.config()
            views = self._random_weights(config).named_views(config)
            hf_config = transformers.Qwen2Config.from_dict(config.to_dict())
            with torch.device("meta"):
                model = kind._from_config(hf_config, dtype=self.dtype)
            # The views themselves become the parameters. A tied lm_head is not among them, nor are rope's frequencies.
            prefix = "" if with_lm_head else "model."
            named = {name.removeprefix(prefix): view for name, view in views.items()}
            model.load_state_dict(named, assign=True, strict=False)
            model.tie_weights()
            model.base_model.rotary_emb = type(model.base_model.rotary_emb)(hf_config)
        if self.rounded_to is not None:
            for parameter in model.parameters():
                parameter.data.copy_(parameter.data.to(self.rounded_to))
        return model.requires_grad_(False).eval().to(self.device)


def config_of(folder: str | None, size: str | None) -> Qwen2Config:
    """The config of a checkpoint's folder or, without one, of a named size."""
    if folder is not None:
        return read_config(folder)
    return named_config(size or "0.5b")


def local_folder(model: str) -> str:
    """A checkpoint's folder: itself, or the hub's files of that id, fetched once for all processes."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    return snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
