"""The reference generators: a transformer over slots with cross-attention to a condition, which writes adapters; and
a sum over a condition's tokens.

In the training loop any ``nn.Module`` can replace them that maps (states, mask) to LoRA tokens (B, L, h, w), or to
LoRA tensors {PEFT name: (B, …)}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qwen_functional import LoraSpec, Qwen2Config
from qwen_functional.lora import parse_name

from .fields import Range, check_value
from .tokens import TokenFormat

WRITES = ("B", "AB")
_Place = tuple[str, str, int, int]  # projection, side, rows, columns: matrices that can share a head


class SlotTransformer(nn.Module):
    """Slots (layers × places in a layer) that attend to each other and to a condition, in parallel.

    A slot's embedding is the sum of a layer embedding and a place embedding.

    Args:
        layers, places: how many there are.
        condition_size: H of the conditions.
        width, depth, heads: sizes of the transformer.
    """

    def __init__(self, layers: int, places: int, condition_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        for name, value in {"width": width, "depth": depth, "heads": heads}.items():
            check_value(name, value, int, Range(least=1))
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.shape = layers, places
        self.layer_embedding = nn.Parameter(0.5 * torch.randn(layers, 1, width))
        self.place_embedding = nn.Parameter(0.5 * torch.randn(1, places, width))
        self.condition = nn.Sequential(nn.LayerNorm(condition_size), nn.Linear(condition_size, width))
        block = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerDecoder(block, depth, norm=nn.LayerNorm(width))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B, layers, places, width) for ``states`` (B, T, H) and ``mask`` (B, T), true where there is a token."""
        slots = (self.layer_embedding + self.place_embedding).flatten(0, 1)
        x = self.blocks(slots.expand(len(states), -1, -1), self.condition(states), memory_key_padding_mask=~mask)
        return x.unflatten(1, self.shape)


class LoRAGenerator(nn.Module):
    """Maps conditions to LoRA tokens, in parallel.

    There is a slot for each projection's A and B in each layer. A token is a mean plus a mixture of a few components,
    both learned for its place; its slot gives the mixing weights. The components start as the principal components of
    the teachers' tokens at that place (:meth:`fit`): to anything smoother LoRA weights are noise, and places have
    little in common.

    Args:
        format: the tokens' format.
        condition_size: H of the conditions.
        width, depth, heads: sizes of the transformer.
        components: how many are mixed at each place; they have L·components·h·w parameters.

    Attributes:
        basis: (L, 1 + components, h·w), the mean and the components of each place.
    """

    def __init__(
        self,
        format: TokenFormat,
        condition_size: int,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        components: int = 8,
    ) -> None:
        super().__init__()
        self.sizes = {"width": width, "depth": depth, "heads": heads, "components": components}
        check_value("components", components, int, Range(least=1))
        self.format = format
        self.slots = SlotTransformer(
            format.num_hidden_layers, len(format.groups), condition_size, width, depth, heads
        )
        self.mixtures = nn.ModuleList(nn.Linear(width, n * components) for *_, n in format.groups)
        height, token_width = format.token_shape
        mean = torch.zeros(format.n_tokens, 1, height * token_width)
        of_place = 0.02 * torch.randn(format.n_tokens, components, height * token_width)
        self.basis = nn.Parameter(torch.cat((mean, of_place), 1))

    @torch.no_grad()
    def fit(self, tokens: Tensor) -> None:
        """Initialize from teachers' tokens (N, L, h, w): their mean, and as many principal components as there are.

        A component is scaled so that the teachers' coefficients for it have a mean square of one. NaN padding counts
        as the mean.

        Raises:
            ValueError: no teachers, or tokens whose shape is not the format's.
        """
        shape = (self.format.n_tokens, *self.format.token_shape)
        if tokens.dim() != 4 or not len(tokens) or tuple(tokens.shape[1:]) != shape:
            expected = f"(N, {', '.join(map(str, shape))})"
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected {expected} with an N of 1 or more")
        tokens = tokens.to("cpu", self.basis.dtype)  # eigenvectors' signs differ between devices
        mean = tokens.nanmean(0).nan_to_num()
        rows = (tokens - mean).nan_to_num().flatten(2).transpose(0, 1)  # (L, N, h·w)
        _, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending
        chosen = vectors.flip(-1)[..., : self.sizes["components"]]
        self.basis[:, 0].copy_(mean.flatten(1))
        self.basis[:, 1 : 1 + chosen.shape[-1]].copy_((chosen.mT @ rows) / len(tokens) ** 0.5)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, L, h, w) for ``states`` (B, T, H) and ``mask`` (B, T), true where there is a token."""
        x = self.slots(states, mask)
        mixed = [one(slot).unflatten(-1, (-1, self.sizes["components"])) for one, slot in zip(
            self.mixtures, x.unbind(2), strict=True
        )]  # fmt: skip
        mixture = torch.cat(mixed, 2).flatten(1, 2).to(self.basis.dtype)  # (B, L, components)
        mixture = nn.functional.pad(mixture, (1, 0), value=1.0)  # the mean has weight 1
        with torch.autocast(states.device.type, enabled=False):
            # Place by place: tokens (B, L, h, w) are a view of (L, B, h·w), not a copy.
            tokens = torch.bmm(mixture.transpose(0, 1), self.basis)
        return tokens.transpose(0, 1).unflatten(-1, self.format.token_shape)


class _Matrices(nn.Module):
    """A and B of every module a spec adapts, by kind: all layers' matrices of one projection, side and shape.

    They start as PEFT initializes a LoRA: B is zero, A is random, the same for all conditions.
    """

    def __init__(self, config: Qwen2Config, spec: LoraSpec) -> None:
        super().__init__()
        self.shapes = spec.shapes(config)
        self._kinds: dict[_Place, list[str]] = {}
        for name, shape in self.shapes.items():
            place = parse_name(name)
            assert place is not None
            self._kinds.setdefault((place[1], place[2], *shape), []).append(name)
        self.start = nn.ParameterList()
        for (_, side, rows, columns), names in self._kinds.items():
            start = torch.zeros(len(names), rows, columns)
            if side == "A":
                nn.init.uniform_(start, -(columns**-0.5), columns**-0.5)
            self.start.append(nn.Parameter(start))

    def written(self, moved: Sequence[Tensor | None], n: int) -> dict[str, Tensor]:
        """{PEFT name: (B, rows, columns)} for n conditions.

        Args:
            moved: for each kind, the difference of each matrix from its start, (names, B, rows·columns); or None.
        """
        found: dict[str, Tensor] = {}
        for ((_, _, rows, columns), names), start, one in zip(self._kinds.items(), self.start, moved, strict=True):
            made = start[:, None].expand(-1, n, -1, -1)
            made = made if one is None else made + one.unflatten(-1, (rows, columns))
            found |= zip(names, made.unbind(0), strict=True)
        return {name: found[name] for name in self.shapes}


class DirectGenerator(_Matrices):
    """Maps conditions to A and B of every adapted module, for any ranks and modules of a spec.

    There is a slot for each module of each layer, and a linear head for each kind of matrix, shared by all layers.

    Args:
        config, spec: the base model's config and the adapters' spec.
        condition_size: H of the conditions.
        width, depth, heads: sizes of the transformer.
    """

    def __init__(
        self,
        config: Qwen2Config,
        spec: LoraSpec,
        condition_size: int,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__(config, spec)
        self.sizes = {"width": width, "depth": depth, "heads": heads}
        places = {name: parse_name(name) for name in self.shapes}
        layers = sorted({place[0] for place in places.values() if place})
        modules = list(dict.fromkeys(place[1] for place in places.values() if place))
        self.slots = SlotTransformer(len(layers), len(modules), condition_size, width, depth, heads)
        self.heads = nn.ModuleList()
        for index, ((projection, side, rows, columns), names) in enumerate(self._kinds.items()):
            of_layers = [layers.index(place[0]) for place in map(parse_name, names) if place]
            slots = [layer * len(modules) + modules.index(projection) for layer in of_layers]
            self.register_buffer(f"slots_{index}", torch.tensor(slots), persistent=False)
            head = nn.Linear(width, rows * columns, bias=False)
            if side == "A":
                nn.init.normal_(head.weight, std=0.1 * columns**-0.5 * width**-0.5)
            else:
                nn.init.zeros_(head.weight)
            self.heads.append(head)

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """{PEFT name: (B, rows, columns)} for ``states`` (B, T, H) and ``mask`` (B, T)."""
        x = self.slots(states, mask).flatten(1, 2)
        moved = []
        for index, head in enumerate(self.heads):
            # Layers first: each layer's adapters are contiguous, as the engine needs them.
            moved.append(head(x.index_select(1, self.get_buffer(f"slots_{index}")).transpose(0, 1)))
        return self.written(moved, len(states))


class AdditiveGenerator(_Matrices):
    """Maps conditions to A and B by a sum over their tokens: the effect of two words is the sum of their effects.

    ``z = Σ_t φ(s_t) · σ(gate(s_t)) / scale`` over a condition's tokens, and every matrix is its start plus ``z W``. It
    generalizes to new combinations of known parts if states are read early, for example after the first block: later
    states already mix a text's words. By default only B is written; A is trained, and shared by all conditions.

    Args:
        config, spec: the base model's config and the adapters' spec.
        condition_size: H of the conditions.
        width: hidden size of φ.
        features: size of z.
        scale: about the square root of the number of tokens in a condition.
        writes: ``"B"``, or ``"AB"``.
    """

    def __init__(
        self,
        config: Qwen2Config,
        spec: LoraSpec,
        condition_size: int,
        *,
        width: int = 256,
        features: int = 64,
        scale: int = 3,
        writes: str = "B",
    ) -> None:
        super().__init__(config, spec)
        for name, value in {"width": width, "features": features, "scale": scale}.items():
            check_value(name, value, int, Range(least=1))
        check_value("writes", writes, str, Range(one_of=WRITES))
        self.sizes = {"width": width, "features": features, "scale": scale, "writes": writes}
        self.scale, self.writes, self.features = scale, writes, features
        H = condition_size
        self.phi = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, width), nn.GELU(), nn.Linear(width, features))
        self.gate = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, features))
        self.components = nn.ParameterList()
        for (_, side, rows, columns), names in self._kinds.items():
            if side in writes:
                self.components.append(nn.Parameter(0.02 * torch.randn(len(names), features, rows * columns)))

    @torch.no_grad()
    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Initialize from teachers {PEFT name: (N, rows, columns)}: their mean, and as many principal components, over
        all matrices that are written, as there are.

        Raises:
            ValueError: names or shapes that are not the spec's.
        """
        expected = {name: tuple(shape) for name, shape in self.shapes.items()}
        found = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()))[0]
            raise ValueError(f"teachers' {odd[0]!r} has shape {found.get(odd[0])}, expected {expected.get(odd[0])}")
        n = len(next(iter(tensors.values())))
        rows, gram = [], torch.zeros(n, n, dtype=torch.float64)
        for (_, side, *_), names, start in zip(self._kinds, self._kinds.values(), self.start, strict=True):
            stacked = torch.stack([tensors[name] for name in names]).to("cpu", start.dtype)  # (names, N, …)
            start.copy_(stacked.mean(1))
            if side in self.writes:
                rows.append((stacked - stacked.mean(1, keepdim=True)).flatten(2))
                flat = rows[-1].transpose(0, 1).flatten(1).double()
                gram += flat @ flat.T
        _, vectors = torch.linalg.eigh(gram)  # ascending
        chosen = vectors.flip(-1)[:, : self.features].to(self.start[0].dtype).cpu()
        for components, row in zip(self.components, rows, strict=True):
            components[:, : chosen.shape[1]].copy_(chosen.T @ row / n**0.5)

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """{PEFT name: (B, rows, columns)} for ``states`` (B, T, H) and ``mask`` (B, T)."""
        z = self.phi(states) * torch.sigmoid(self.gate(states))
        z = torch.where(mask[..., None], z, 0.0).sum(1) / self.scale
        moved, components = list[Tensor | None](), iter(self.components)
        for _, side, *_ in self._kinds:
            moved.append(torch.matmul(z, next(components)) if side in self.writes else None)
        return self.written(moved, len(states))
