"""What the ranks of a test do. It is apart from the tests so that a spawned process imports little."""

from __future__ import annotations

import functools
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import text_case
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lora_delta import DifferentiableDeltaCompute, DifferentiableLMLoss
from lora_delta.generate.evaluation import Evaluation
from lora_delta.generate.options import TrainingOptions
from lora_delta.generate.terms import TextLosses
from lora_delta.generate.tokens import TokenFormat
from lora_delta.generate.training import train
from lora_delta.labelling.labels import compute_labels
from lora_delta.labelling.settings import model_fingerprint
from lora_delta.lm_loss import Examples
from lora_delta.shares import Shares
from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, init_weights, load_pretrained, pack, weights
from qwen_functional.backends.onednn import can_pack, packing_pays
from qwen_functional.forward import forward, forward_vjp

Values = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A model, adapters and probes; the same on every rank."""

    config: Qwen2Config
    spec: LoraSpec
    tensors: Mapping[str, Tensor]
    probes: Sequence[Sequence[int]]
    dtype: torch.dtype = torch.float64
    folder: Path | None = None  # a checkpoint to use instead of random weights

    def weights(self, mesh: DeviceMesh | None = None) -> Qwen2Weights:
        if self.folder is not None:
            return load_pretrained(self.folder, self.dtype, mesh=mesh)[1]
        whole = init_weights(self.config, dtype=self.dtype)
        return whole if mesh is None else whole.shard(self.config, mesh)


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class Sums:
    """Records the bytes of every sum over ranks."""

    def __enter__(self) -> Sums:
        self.sizes: list[int] = []
        self._real = dist.all_reduce
        dist.all_reduce = self._counted
        return self

    def _counted(self, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        self.sizes.append(tensor.nbytes)
        return self._real(tensor, *arguments, **options)

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._real


def engine(case: Case, base: Qwen2Weights, **options: Any) -> Values:
    lora = case.spec.bind(case.config, case.tensors)
    value, vjp = forward_vjp(case.config, base, pack(case.probes), lora, **options)
    return value, vjp(torch.sin(torch.arange(value.numel(), dtype=value.dtype)).view(value.shape))


def plain_forward(case: Case, base: Qwen2Weights, input_ids: Tensor) -> Values:
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    output = forward(case.config, base, input_ids, lora=case.spec.bind(case.config, tensors))
    output.logits.double().square().sum().backward()
    return output.logits.detach(), gradients_of(tensors)


def delta_of(case: Case, base: Qwen2Weights, mesh: DeviceMesh | None, mean_loss: bool, **options: Any) -> Values:
    delta = DifferentiableDeltaCompute(case.config, base, case.probes, case.spec, mesh=mesh, **options)
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    if mean_loss:
        value = delta.mean_loss(tensors, lambda deltas, _: deltas.square().sum(-1).mean())
        value.backward()
    else:
        value = delta(tensors)
        value.square().sum().backward()
    return value.detach(), gradients_of(tensors)


def lm_loss_of(
    case: Case,
    base: Qwen2Weights,
    mesh: DeviceMesh | None,
    mean_loss: bool,
    examples: Examples,
    teacher: str | None = None,
    **options: Any,
) -> Values:
    """The loss of adapters, optionally with the bare model as teacher, by its ``"states"`` or its ``"top k"``."""
    lm = DifferentiableLMLoss(case.config, base, case.spec, mesh=mesh, **options)
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    said: Any = None
    if teacher is not None:
        say = lm.states if teacher == "states" else functools.partial(lm.top_k, k=5)
        said = say(examples, temperature=1.5)
    value_of = lm.mean_loss if mean_loss else lm
    value = value_of(tensors, examples, said, cross_entropy=teacher is not None)
    value.square().sum().backward()
    return value.detach(), gradients_of(tensors)


def split_lm_loss(
    case: Case, sizes: dict[str, int], mean_loss: bool, examples: Examples, options: dict[str, Any]
) -> Values:
    mesh = mesh_of(**sizes)
    return lm_loss_of(case, case.weights(mesh), mesh, mean_loss, examples, **options)


def gradients_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


# Functions that ranks are called with


def split_engine(case: Case, options: dict[str, Any]) -> Values:
    return engine(case, case.weights(mesh_of(tp=2)), **options)


def split_packed_engine(case: Case) -> Values:
    weights.packing_pays = can_pack  # pack in this process, whatever its processor
    try:
        return engine(case, case.weights(mesh_of(tp=2)).prepack())
    finally:
        weights.packing_pays = packing_pays


def split_streamed_engine(case: Case) -> Values:
    assert case.folder is not None
    return engine(case, load_pretrained(case.folder, case.dtype, mesh=mesh_of(tp=2), stream=True)[1])


def split_forward(case: Case, input_ids: Tensor) -> Values:
    return plain_forward(case, case.weights(mesh_of(tp=2)), input_ids)


def split_delta(case: Case, sizes: dict[str, int], mean_loss: bool, options: dict[str, Any]) -> Values:
    mesh = mesh_of(**sizes)
    return delta_of(case, case.weights(mesh), mesh, mean_loss, **options)


def sums_of(case: Case, checkpoint: str) -> tuple[int, int]:
    """The number of sums over ranks in the forward, and in the vjp."""
    base, lora = case.weights(mesh_of(tp=2)), case.spec.bind(case.config, case.tensors)
    with Sums() as sums:
        value, vjp = forward_vjp(case.config, base, pack(case.probes), lora, checkpoint=checkpoint)
        forwards = len(sums.sizes)
        vjp(torch.ones_like(value))
    return forwards, len(sums.sizes) - forwards


def summed_bytes(case: Case) -> list[int]:
    """The bytes of each sum over ranks in a step."""
    base = case.weights(mesh_of(tp=2))
    with Sums() as sums:
        engine(case, base)
    return sums.sizes


def held_bytes(case: Case) -> int:
    return case.weights(mesh_of(tp=2)).nbytes()


def fingerprint(case: Case) -> str:
    return model_fingerprint(case.config, case.weights(mesh_of(tp=2)))


def labels_of_a_split_delta(case: Case, sizes: dict[str, int], out: Path) -> str:
    mesh = mesh_of(**sizes)
    delta = DifferentiableDeltaCompute(case.config, case.weights(mesh), case.probes, case.spec, mesh=mesh)
    try:
        compute_labels(delta, ["nowhere"], out)
    except ValueError as error:
        return str(error)
    return ""


def refusal(config: Qwen2Config) -> str:
    try:
        init_weights(config).shard(config, mesh_of(tp=2))
    except ValueError as error:
        return str(error)
    return ""


Run = tuple[list[dict[str, float]], dict[str, Tensor]]


class Generator(nn.Module):
    """A small generator in float64 in which every parameter matters. Otherwise Adam takes full steps on gradients that
    are only rounding error, such as that of an attention's key bias.
    """

    def __init__(self, condition_size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        sizes = (condition_size, 16, math.prod(shape))
        self.layers = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).double()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, L, h, w) from the mean of the states (B, T, H) where ``mask`` (B, T) is true."""
        mean = (states.double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.layers(mean).unflatten(-1, self.shape)


class CutOff(RuntimeError):
    """Ends a run that is to be resumed."""


@dataclass(frozen=True)
class Training:
    """A training run for any number of ranks."""

    case: Case
    teachers: list[tuple[list[Tensor], Tensor, Tensor]]
    options: TrainingOptions
    chunk_width: int
    passes: int | None = None  # of the generator, after which the run is cut off
    spoilt: tuple[int, ...] = ()  # passes in which the gradient has a NaN on the last rank
    signalled: int | None = None  # the pass in which the last rank gets Ctrl-C
    drawn: list[float] | None = None  # collects a random number from each pass, as a generator would draw it

    def run(self, out: Path | None, mesh: DeviceMesh | None = None) -> Run | None:
        """The metrics of every step and the final parameters; None if it was cut off or interrupted."""
        case = self.case
        delta = DifferentiableDeltaCompute(case.config, case.weights(mesh), case.probes, case.spec)
        format = TokenFormat.for_config(case.config, case.spec.rank, self.chunk_width)
        torch.manual_seed(3)
        generator = Generator(self.teachers[0][0][0].shape[1], (format.n_tokens, *format.token_shape))
        calls: list[None] = []
        is_last = mesh is None or dist.get_rank() == dist.get_world_size() - 1

        def count(*_: object) -> None:
            calls.append(None)
            if self.passes is not None and len(calls) > self.passes:
                raise CutOff
            if self.drawn is not None:
                self.drawn.append(float(torch.rand(())))
            if is_last and len(calls) == self.signalled:
                os.kill(os.getpid(), signal.SIGINT)

        def spoil(gradient: Tensor) -> Tensor:
            return gradient * math.nan if is_last and len(calls) in self.spoilt else gradient

        next(generator.parameters()).register_hook(spoil)
        generator.register_forward_pre_hook(count)
        try:
            history = train(
                generator, self.teachers, self.options, format=format, delta=delta, out=out, progress=False, mesh=mesh
            )
        except (CutOff, KeyboardInterrupt):
            return None
        return history, generator.state_dict()


def trained(training: Training, out: Path | None, sizes: dict[str, int]) -> Run | None:
    return training.run(out, mesh_of(**sizes))


def drawn(training: Training, sizes: dict[str, int]) -> list[float]:
    """The random numbers drawn on this rank, one for each pass of the generator."""
    numbers: list[float] = []
    replace(training, drawn=numbers).run(None, mesh_of(**sizes))
    return numbers


@dataclass(frozen=True)
class TextTraining:
    """A training run on texts for any number of ranks."""

    options: TrainingOptions

    def run(self, mesh: DeviceMesh | None = None) -> Run:
        """The metrics of every step and the final parameters."""
        tasks, generator, base = text_case.text_tasks(6), text_case.direct_generator(), text_case.weights()
        base = base if mesh is None else base.shard(text_case.CONFIG, mesh)
        losses = TextLosses(DifferentiableLMLoss(text_case.CONFIG, base, text_case.SPEC), 1.5)
        held_out = Evaluation(text_case.text_tasks(3, seed=9), every=2)
        history = train(
            generator, tasks, self.options, texts=losses, evaluation=held_out, progress=False, mesh=mesh
        )
        return history, generator.state_dict()


def trained_on_texts(training: TextTraining, sizes: dict[str, int]) -> Run:
    return training.run(mesh_of(**sizes))


def balanced(costs: Sequence[float]) -> list[int]:
    return Shares.of(mesh_of(dp=2)).balanced(costs)
