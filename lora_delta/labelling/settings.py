"""What labels depend on besides the adapter, and a LoRA's spec, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights

from ..delta import DifferentiableDeltaCompute
from ..identity import Identity

# Labels that differ in one of these are never put into the same folder. The rest is for information.
COMPARED = ("dtype", "model_sha256", "layer", "pooling", "probes_sha256")
_DIGESTS_AT_ONCE = 8


def label_settings(
    delta: DifferentiableDeltaCompute, *, model: str = "", fingerprint: str | None = None
) -> dict[str, Any]:
    """What deltas depend on besides the adapter, taken from ``delta`` itself, ready for JSON.

    Args:
        model: the base model's hub id or folder, for information.
        fingerprint: :func:`model_fingerprint` of it, if already known.
    """
    dtype, probes = _dtype_name(delta.weights.dtype), delta.probes
    if delta.weights.multiplied_in not in (None, delta.weights.dtype):
        dtype += f", multiplied in {_dtype_name(delta.weights.compute_dtype)}"
    return {
        "model": model,
        "model_sha256": fingerprint or model_fingerprint(delta.config, delta.weights),
        "dtype": dtype,
        "layer": delta.layer if isinstance(delta.layer, int) else list(delta.layer),
        "pooling": delta.pooling,
        "chat": probes.chat,
        "chat_template_kwargs": dict(probes.chat_template_kwargs),
        "max_length": probes.max_length,
        "probes_sha256": hashlib.sha256(json.dumps(probes.ids).encode()).hexdigest(),
        "probes": list(probes.ids if probes.texts is None else probes.texts),
    }


def label_identity(settings: Mapping[str, Any]) -> Identity:
    """Those of the settings that decide the deltas to the bit."""
    probes = f"chat is {settings.get('chat')!r} here, max_length {settings.get('max_length')!r}"
    shown = {"model_sha256": f"here it is of {settings.get('model')!r}", "probes_sha256": probes}
    return Identity({name: settings.get(name) for name in COMPARED}, shown)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def model_fingerprint(config: Qwen2Config, weights: Qwen2Weights) -> str:
    """sha256, as hex, of a config and of all weights that a delta depends on, as they are in memory.

    The whole content is read, at one to two gigabytes per second and core: any sample of it could miss a difference.
    It is the same for one file or shards, and on a CPU or a GPU, but not for another dtype. The lm_head is left out.
    """
    whole = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    pending: deque[tuple[str, Future[str]]] = deque()

    def finish() -> None:
        head, digest = pending.popleft()
        whole.update(f"{head} {digest.result()}\n".encode())

    with ThreadPoolExecutor() as pool:
        for name, part in weights.named_tensors(config):
            if name != "lm_head.weight":
                tensor = part if weights.parallel is None else weights.parallel.gather(name, part)
                head = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
                pending.append((head, pool.submit(_digest, tensor)))
            while len(pending) > _DIGESTS_AT_ONCE:  # streamed weights must not all be in memory at once
                finish()
        while pending:
            finish()
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()


def spec_facts(spec: LoraSpec) -> dict[str, Any]:
    """The fields of a spec as JSON, for a log of labels for example; :func:`spec_of` reads them."""
    return json.loads(json.dumps({f.name: getattr(spec, f.name) for f in fields(spec)}, default=_plain))


def spec_of(facts: Mapping[str, Any]) -> LoraSpec:
    """The spec whose fields :func:`spec_facts` gave."""
    return LoraSpec(**{**facts, "target_modules": tuple(facts["target_modules"])})


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else list(value)
