"""CrossFusion (Soraki et al. 2026) and its ablations as ``nn.Module``, on this package's operators.

Parameters have the published names, so that a published ``best_model.pt`` loads with ``strict=True``.
Each is called as ``model(x5, x10, x20)`` with one bag of features a scale, ``[1, patches, features]`` or
``[patches, features]``, and returns logits ``[1, n_classes]``; :func:`survival` goes on from there.
Dropout is on in training alone. (The published code leaves attention's dropout on in evaluation,
too: a defect.)
"""

import math
import operator
import os
import typing

from . import _crossfusion, ops  # first: without PyTorch it says so

import torch
from torch import Tensor, nn

__all__ = ["CrossFusion", "CrossFusionConcat", "CrossFusionSingle", "load", "survival"]


def survival(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hazards and survival of each time bin ``[..., classes]``, and risk = -sum of survival ``[...]``
    (higher is worse), of logits ``[..., classes]``."""
    hazards = torch.sigmoid(logits)
    curve = torch.cumprod(1 - hazards, dim=-1)
    return hazards, curve, -curve.sum(dim=-1)


def _square_pad(x: Tensor) -> tuple[Tensor, int]:
    """Tokens ``[n, d]`` padded to the next square by the first ones, and its side."""
    side = math.ceil(math.sqrt(x.shape[0]))
    return torch.cat([x, x[: side * side - x.shape[0]]]), side


class LayerNorm(nn.Module):
    """LayerNorm of x ``[..., dim]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)


class Linear(nn.Linear):
    """``nn.Linear`` of x ``[n, in_features]``, and + residual ``[n, out_features]``."""

    def forward(self, x: Tensor, residual: typing.Optional[Tensor] = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, residual)


class FeedForward(nn.Module):
    """x + the feed-forward of x ``[n, dim]``."""

    def __init__(self, dim: int, ratio: float = 2.0, p: float = 0.3) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        # GELU and the dropouts have no parameters, but their places in the published names
        self.net = nn.Sequential(
            Linear(dim, hidden), nn.Identity(), nn.Identity(), Linear(hidden, dim), nn.Identity()
        )
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        first, second = typing.cast(Linear, self.net[0]), typing.cast(Linear, self.net[3])
        p = self.p if self.training else 0.0
        return ops.feed_forward(x, first.weight, first.bias, second.weight, second.bias, p)


class Attention(nn.Module):
    """Softmax attention of x ``[n, d]`` over a context ``[m, d]``."""

    def __init__(self, dim: int, heads: int, p: float = 0.0, scale_embedding: bool = False) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(dim, dim) for _ in range(4))
        # one embedding is added to both sides of a cross-attention
        self.scale_embeddings = nn.Parameter(torch.zeros(1, 1, dim)) if scale_embedding else None

    def _project(self, projection: Linear, x: Tensor) -> Tensor:
        """``projection`` of x + the embedding e, as x Wᵀ + (e Wᵀ + b)."""
        weight: Tensor = projection.weight
        bias: Tensor = projection.bias
        if self.scale_embeddings is not None:
            bias = ops.linear(self.scale_embeddings[0], weight, bias)[0]
        return ops.linear(x, weight, bias)

    def forward(self, x: Tensor, context: Tensor, residual: Tensor) -> Tensor:
        """+ residual ``[n, d]``."""
        q, k, v = (self._project(p, y) for p, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context)))
        attended = ops.attention(q, k, v, self.heads, self.p if self.training else 0.0)
        y: Tensor = self.out_proj(attended, residual)
        return y


class Block(nn.Module):
    """Layers of norm, attention, norm, feed-forward, whose residuals start from the NORMALISED x."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([LayerNorm(dim), Attention(dim, heads, p=0.2), LayerNorm(dim), FeedForward(dim)])
            for _ in range(layers)
        )

    def forward(self, x: Tensor, rows: typing.Optional[int] = None) -> Tensor:
        """The last layer is computed of the first ``rows`` alone, where they are all that is looked at."""
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            norm1, attention, norm2, ffn = typing.cast(nn.ModuleList, layer)
            x = norm1(x)
            queries = x[:rows] if i == last and rows else x
            x = ffn(norm2(attention(queries, x, queries)))
        return x


def _weights(*convolutions: nn.Conv2d) -> tuple[list[Tensor], list[Tensor]]:
    """Their kernels and biases."""
    return [c.weight for c in convolutions], [typing.cast(Tensor, c.bias) for c in convolutions]


def _convolutions(dim: int, out: int, sides: tuple[int, ...]) -> typing.Iterator[nn.Conv2d]:
    return (nn.Conv2d(dim, out, k, padding=k // 2, groups=out) for k in sides)


class PPEG(nn.Module):
    """The positional encoding of tokens ``[first + side * side, dim]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj, self.proj1, self.proj2 = _convolutions(dim, dim, (7, 5, 3))

    def forward(self, x: Tensor, side: int) -> Tensor:
        return ops.ppeg(x, *_weights(self.proj, self.proj1, self.proj2), side)


class PadTransformer(nn.Module):
    """Two blocks with the positional encoding between, of tokens ``[first + side * side, dim]``."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.pre_layers, self.post_layers = Block(dim, heads, layers), Block(dim, heads, layers)
        self.ppeg = PPEG(dim)

    def forward(self, x: Tensor, side: int, rows: typing.Optional[int] = None) -> Tensor:
        y: Tensor = self.post_layers(self.ppeg(self.pre_layers(x), side), rows)
        return y


class MultiScaleConv(nn.Module):
    """The convolutions' parameters: :class:`ConvProcessor` applies them."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj, self.proj1, self.proj2, self.x_proj = _convolutions(dim, out, (7, 5, 3, 1))


class ConvProcessor(nn.Module):
    """Mixes the streams, convolves them on the grid, and projects back to the model's width."""

    def __init__(self, dim: int, scales: int = 3, p: float = 0.3) -> None:
        super().__init__()
        self.p = p
        if scales > 1:
            self.conv3d = nn.Conv3d(scales, 1, 1)
        self.conv_block = nn.Sequential(MultiScaleConv(dim, dim // 2))
        self.linear = nn.Sequential(Linear(dim // 2, dim), LayerNorm(dim))

    def forward(self, streams: list[Tensor], side: int) -> Tensor:
        c = typing.cast(MultiScaleConv, self.conv_block[0])
        mix = (self.conv3d.weight, typing.cast(Tensor, self.conv3d.bias)) if len(streams) > 1 else ()
        kernels, biases = _weights(c.proj, c.proj1, c.proj2, c.x_proj)
        x = ops.conv_fusion(streams, mix, kernels, biases, side, self.p if self.training else 0.0)
        y: Tensor = self.linear(x)
        return y


def _projection(features: int, dim: int) -> nn.Module:
    return nn.Identity() if features == dim else nn.Sequential(Linear(features, dim), LayerNorm(dim))


def _check_sizes(features: int, dim: int, heads: int, layers: int, n_classes: int) -> None:
    sizes = {"features": features, "dim": dim, "heads": heads, "layers": layers, "n_classes": n_classes}
    for name, size in sizes.items():
        if operator.index(size) < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")
    if dim % 2 or dim % heads or dim // heads > 128:
        raise ValueError(f"dim is {dim} in {heads} heads: expected an even number, and at most 128 for each head")


class _Model(nn.Module):
    """What the models share: cross-attention to another scale, and the way from tokens to logits."""

    def __init__(self, features: int, dim: int, heads: int, layers: int, n_classes: int) -> None:
        _check_sizes(features, dim, heads, layers, n_classes)
        super().__init__()
        self.features = features

    def _bag(self, x: Tensor) -> Tensor:
        """``[patches, features]`` of a bag, with or without a batch of one."""
        if not isinstance(x, Tensor):
            raise TypeError(f"a bag is of type {type(x).__name__}, expected a tensor [1, patches, features]")
        if x.dim() == 3 and x.shape[0] == 1:
            x = x[0]
        # one column would be repeated for all features where nothing projects them
        if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] != self.features:
            raise ValueError(
                f"a bag has shape {tuple(x.shape)}, expected [1, patches, {self.features}] with a patch at least"
            )
        return x

    def _cross(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        x = getattr(self, f"{name}_ln")(getattr(self, name)(x, context, x))
        y: Tensor = getattr(self, f"{name}_ffn")(x)
        return y

    def _add_cross(self, name: str, dim: int, heads: int) -> None:
        setattr(self, name, Attention(dim, heads, scale_embedding=True))
        setattr(self, f"{name}_ln", LayerNorm(dim))
        setattr(self, f"{name}_ffn", FeedForward(dim))

    # What stands between the two in the published classes is registered between them here: optimizers
    # tell parameters apart by their order, and a seed draws in it.
    def _add_final(self, dim: int, heads: int, layers: int) -> None:
        self.final_transformer = PadTransformer(dim, heads, layers)
        self.final_ln = LayerNorm(dim)

    def _add_head(self, dim: int, n_classes: int) -> None:
        self.mlp_head = nn.Sequential(Linear(dim, n_classes))

    cls_token: nn.Parameter

    def _end(self, fused: Tensor, side: int) -> Tensor:
        fused = self.final_transformer(torch.cat([self.cls_token[0], fused]), side, rows=1)
        logits: Tensor = self.mlp_head(self.final_ln(fused))
        return logits


class CrossFusion(_Model):
    """As published: x10 attends to x5 and to x20, and a convolution over the mix fuses the streams.

    Called with x5, x10, x20 ``[1, patches, features]`` or ``[patches, features]``; logits
    ``[1, n_classes]``.
    """

    def __init__(
        self, features: int, dim: int = 512, heads: int = 4, layers: int = 1, n_classes: int = 4
    ) -> None:
        super().__init__(features, dim, heads, layers, n_classes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.c_lin_proj, self.s_lin_proj, self.f_lin_proj = (_projection(features, dim) for _ in range(3))
        for scale in ("f", "c"):
            self._add_cross(f"{scale}_cross_attn", dim, heads)
        for scale in ("c", "f", "s"):
            setattr(self, f"{scale}_transformer", PadTransformer(dim, heads, layers))
            setattr(self, f"{scale}_transformer_ln", LayerNorm(dim))
        self._add_final(dim, heads, layers)
        self.conv_processor = ConvProcessor(dim)
        self._add_head(dim, n_classes)

    def _transform(self, scale: str, x: Tensor) -> tuple[Tensor, int]:
        x, side = _square_pad(x)
        return getattr(self, f"{scale}_transformer_ln")(getattr(self, f"{scale}_transformer")(x, side)), side

    def forward(self, x5: Tensor, x10: Tensor, x20: Tensor) -> Tensor:
        coarse, source = self.c_lin_proj(self._bag(x5)), self.s_lin_proj(self._bag(x10))
        fine = self.f_lin_proj(self._bag(x20))
        coarse, _ = self._transform("c", self._cross("c_cross_attn", source, coarse))
        fine, _ = self._transform("f", self._cross("f_cross_attn", source, fine))
        source, side = self._transform("s", source)
        return self._end(self.conv_processor([source, fine, coarse], side), side)


class CrossFusionConcat(_Model):
    """Ablation: the three streams are put side by side and projected instead of convolved."""

    coarse_pre_cross_attn: nn.Module
    source_pre_cross_attn: nn.Module
    fine_pre_cross_attn: nn.Module

    def __init__(
        self, features: int, dim: int = 512, heads: int = 4, layers: int = 1, n_classes: int = 4
    ) -> None:
        super().__init__(features, dim, heads, layers, n_classes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        for scale in ("coarse", "source", "fine"):
            setattr(self, f"{scale}_pre_cross_attn", _projection(features, dim))
            setattr(self, f"{scale}_transformer", PadTransformer(dim, heads, layers))
            setattr(self, f"{scale}_ln", LayerNorm(dim))
        for scale in ("coarse", "fine"):
            self._add_cross(f"{scale}_cross_attn", dim, heads)
        self.pre_final_linear = nn.Sequential(Linear(3 * dim, dim), LayerNorm(dim))
        self._add_final(dim, heads, layers)
        self._add_head(dim, n_classes)

    def _transform(self, scale: str, x: Tensor) -> tuple[Tensor, int]:
        x, side = _square_pad(x)
        return getattr(self, f"{scale}_ln")(getattr(self, f"{scale}_transformer")(x, side)), side

    def forward(self, x5: Tensor, x10: Tensor, x20: Tensor) -> Tensor:
        coarse = self.coarse_pre_cross_attn(self._bag(x5))
        source = self.source_pre_cross_attn(self._bag(x10))
        fine = self.fine_pre_cross_attn(self._bag(x20))
        coarse, _ = self._transform("coarse", self._cross("coarse_cross_attn", source, coarse))
        fine, _ = self._transform("fine", self._cross("fine_cross_attn", source, fine))
        source, side = self._transform("source", source)
        return self._end(self.pre_final_linear(torch.cat([source, fine, coarse], dim=1)), side)


class CrossFusionSingle(_Model):
    """Ablation: the x20 bag alone; x5 and x10 are not looked at, and may be None."""

    def __init__(
        self, features: int, dim: int = 512, heads: int = 4, layers: int = 1, n_classes: int = 4
    ) -> None:
        super().__init__(features, dim, heads, layers, n_classes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.source_pre_cross_attn = _projection(features, dim)
        self.source_transformer = PadTransformer(dim, heads, layers)
        self.source_ln = LayerNorm(dim)
        self._add_final(dim, heads, layers)
        self.conv_processor = ConvProcessor(dim, scales=1)
        self._add_head(dim, n_classes)

    def forward(self, x5: typing.Optional[Tensor], x10: typing.Optional[Tensor], x20: Tensor) -> Tensor:
        x, side = _square_pad(self.source_pre_cross_attn(self._bag(x20)))
        x = self.source_ln(self.source_transformer(x, side))
        return self._end(self.conv_processor([x], side), side)


def load(path: typing.Union[str, "os.PathLike[str]"], heads: typing.Optional[int] = None) -> _Model:
    """The model of ``best.safetensors`` of cf-train, or of a published ``best_model.pt``, on the CPU.

    It is in training mode, as any new module: call ``eval()`` before you predict. ``heads`` leave no trace in
    a published checkpoint (by default its 4). An OSError names the file and what is wrong with it. PyTorch's
    generator is left alone.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    heads = None if heads is None else operator.index(heads)
    if heads is not None and not 1 <= heads < 2**31:
        raise ValueError(f"heads is {heads}, expected at least 1")
    name, sizes, tensors = _crossfusion.read_model(path, heads)
    classes: dict[str, type[_Model]] = {
        "crossfusion": CrossFusion,
        "crossfusion-concat": CrossFusionConcat,
        "crossfusion-single": CrossFusionSingle,
    }
    config = dict(sizes)
    with torch.device("meta"):  # nothing is drawn, and no memory taken
        model = classes[name](*(int(config[size]) for size in ("features", "dim", "heads", "layers", "n_classes")))
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.p = config["ffn_dropout"]
        elif isinstance(module, ConvProcessor):
            module.p = config["fusion_dropout"]
        elif isinstance(module, Block):
            for layer in module.layers:
                typing.cast(Attention, typing.cast(nn.ModuleList, layer)[1]).p = config["attention_dropout"]
    state = {name: torch.from_numpy(values).view(shape) for name, shape, values in tensors}
    model.load_state_dict(state, assign=True)
    return model
