"""CrossFusion (Soraki et al. 2026) and its ablations as ``nn.Module``, on this package's operators.

Parameters have the published names, so that a published ``best_model.pt`` loads with ``strict=True``.
Each is called as ``model(x5, x10, x20)`` with one bag of features a scale, ``[1, patches, features]`` or
``[patches, features]``, and returns logits ``[1, n_classes]``; :func:`survival` goes on from there.
Dropout is on in training alone. (The published code leaves attention's dropout on in evaluation,
too: a defect.)
"""

import math

import torch
from torch import nn

from . import ops

__all__ = ["CrossFusion", "CrossFusionConcat", "CrossFusionSingle", "survival"]


def survival(logits):
    """Hazards and survival of each time bin, and risk = -sum of survival (higher is worse)."""
    hazards = torch.sigmoid(logits)
    curve = torch.cumprod(1 - hazards, dim=-1)
    return hazards, curve, -curve.sum(dim=-1)


def _square_pad(x):
    """Tokens ``[n, d]`` padded to the next square by the first ones, and its side."""
    side = math.ceil(math.sqrt(x.shape[0]))
    return torch.cat([x, x[: side * side - x.shape[0]]]), side


class LayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return ops.layer_norm(x, self.weight, self.bias)


class Linear(nn.Linear):
    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)


class FeedForward(nn.Module):
    """x + the feed-forward of x."""

    def __init__(self, dim, ratio=2.0, p=0.3):
        super().__init__()
        hidden = int(dim * ratio)
        # GELU and the dropouts have no parameters, but their places in the published names
        self.net = nn.Sequential(
            Linear(dim, hidden), nn.Identity(), nn.Identity(), Linear(hidden, dim), nn.Identity()
        )
        self.p = p

    def forward(self, x):
        first, second = self.net[0], self.net[3]
        p = self.p if self.training else 0.0
        return ops.feed_forward(x, first.weight, first.bias, second.weight, second.bias, p)


class Attention(nn.Module):
    """Softmax attention of x ``[n, d]`` over a context ``[m, d]``."""

    def __init__(self, dim, heads, p=0.0, scale_embedding=False):
        super().__init__()
        self.heads, self.p = heads, p
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(dim, dim) for _ in range(4))
        # one embedding is added to both sides of a cross-attention
        self.scale_embeddings = nn.Parameter(torch.zeros(1, 1, dim)) if scale_embedding else None

    def forward(self, x, context):
        if self.scale_embeddings is not None:
            x, context = x + self.scale_embeddings[0], context + self.scale_embeddings[0]
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        return self.out_proj(ops.attention(q, k, v, self.heads, self.p if self.training else 0.0))


class Block(nn.Module):
    """Layers of norm, attention, norm, feed-forward, whose residuals start from the NORMALISED x."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([LayerNorm(dim), Attention(dim, heads, p=0.2), LayerNorm(dim), FeedForward(dim)])
            for _ in range(layers)
        )

    def forward(self, x, rows=None):
        """The last layer is computed of the first ``rows`` alone, where they are all that is looked at."""
        last = len(self.layers) - 1
        for i, (norm1, attention, norm2, ffn) in enumerate(self.layers):
            x = norm1(x)
            queries = x[:rows] if i == last and rows else x
            x = ffn(norm2(queries + attention(queries, x)))
        return x


def _convolutions(dim, out, sides):
    return (nn.Conv2d(dim, out, k, padding=k // 2, groups=out) for k in sides)


class PPEG(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj, self.proj1, self.proj2 = _convolutions(dim, dim, (7, 5, 3))

    def forward(self, x, side):
        convolutions = (self.proj, self.proj1, self.proj2)
        return ops.ppeg(x, [c.weight for c in convolutions], [c.bias for c in convolutions], side)


class PadTransformer(nn.Module):
    def __init__(self, dim, heads, layers):
        super().__init__()
        self.pre_layers, self.post_layers = Block(dim, heads, layers), Block(dim, heads, layers)
        self.ppeg = PPEG(dim)

    def forward(self, x, side, rows=None):
        return self.post_layers(self.ppeg(self.pre_layers(x), side), rows)


class MultiScaleConv(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.proj, self.proj1, self.proj2, self.x_proj = _convolutions(dim, out, (7, 5, 3, 1))


class ConvProcessor(nn.Module):
    """Mixes the streams, convolves them on the grid, and projects back to the model's width."""

    def __init__(self, dim, scales=3, p=0.3):
        super().__init__()
        self.p = p
        if scales > 1:
            self.conv3d = nn.Conv3d(scales, 1, 1)
        self.conv_block = nn.Sequential(MultiScaleConv(dim, dim // 2))
        self.linear = nn.Sequential(Linear(dim // 2, dim), LayerNorm(dim))

    def forward(self, streams, side):
        c = self.conv_block[0]
        convolutions = (c.proj, c.proj1, c.proj2, c.x_proj)
        mix = (self.conv3d.weight, self.conv3d.bias) if len(streams) > 1 else ()
        x = ops.conv_fusion(
            streams,
            mix,
            [c.weight for c in convolutions],
            [c.bias for c in convolutions],
            side,
            self.p if self.training else 0.0,
        )
        return self.linear(x)


def _projection(features, dim):
    return nn.Identity() if features == dim else nn.Sequential(Linear(features, dim), LayerNorm(dim))


def _bag(x):
    """``[patches, features]`` of a bag, with or without a batch of one."""
    if x.dim() == 3 and x.shape[0] == 1:
        x = x[0]
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"a bag has shape {tuple(x.shape)}, expected [1, patches, features] with a patch at least")
    return x


class _Model(nn.Module):
    """What the models share: cross-attention to another scale, and the way from tokens to logits."""

    def _cross(self, name, x, context):
        x = getattr(self, f"{name}_ln")(x + getattr(self, name)(x, context))
        return getattr(self, f"{name}_ffn")(x)

    def _add_cross(self, name, dim, heads):
        setattr(self, name, Attention(dim, heads, scale_embedding=True))
        setattr(self, f"{name}_ln", LayerNorm(dim))
        setattr(self, f"{name}_ffn", FeedForward(dim))

    def _add_end(self, dim, heads, layers, n_classes):
        self.final_transformer = PadTransformer(dim, heads, layers)
        self.final_ln = LayerNorm(dim)
        self.mlp_head = nn.Sequential(Linear(dim, n_classes))

    def _end(self, fused, side):
        fused = self.final_transformer(torch.cat([self.cls_token[0], fused]), side, rows=1)
        return self.mlp_head(self.final_ln(fused))


class CrossFusion(_Model):
    """As published: x10 attends to x5 and to x20, and a convolution over the mix fuses the streams."""

    def __init__(self, features, dim=512, heads=4, layers=1, n_classes=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.c_lin_proj, self.s_lin_proj, self.f_lin_proj = (_projection(features, dim) for _ in range(3))
        for scale in ("f", "c"):
            self._add_cross(f"{scale}_cross_attn", dim, heads)
        for scale in ("c", "f", "s"):
            setattr(self, f"{scale}_transformer", PadTransformer(dim, heads, layers))
            setattr(self, f"{scale}_transformer_ln", LayerNorm(dim))
        self._add_end(dim, heads, layers, n_classes)
        self.conv_processor = ConvProcessor(dim)

    def _transform(self, scale, x):
        x, side = _square_pad(x)
        return getattr(self, f"{scale}_transformer_ln")(getattr(self, f"{scale}_transformer")(x, side)), side

    def forward(self, x5, x10, x20):
        coarse, source, fine = self.c_lin_proj(_bag(x5)), self.s_lin_proj(_bag(x10)), self.f_lin_proj(_bag(x20))
        coarse, _ = self._transform("c", self._cross("c_cross_attn", source, coarse))
        fine, _ = self._transform("f", self._cross("f_cross_attn", source, fine))
        source, side = self._transform("s", source)
        return self._end(self.conv_processor([source, fine, coarse], side), side)


class CrossFusionConcat(_Model):
    """Ablation: the three streams are put side by side and projected instead of convolved."""

    def __init__(self, features, dim=512, heads=4, layers=1, n_classes=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        for scale in ("coarse", "source", "fine"):
            setattr(self, f"{scale}_pre_cross_attn", _projection(features, dim))
            setattr(self, f"{scale}_transformer", PadTransformer(dim, heads, layers))
            setattr(self, f"{scale}_ln", LayerNorm(dim))
        for scale in ("coarse", "fine"):
            self._add_cross(f"{scale}_cross_attn", dim, heads)
        self.pre_final_linear = nn.Sequential(Linear(3 * dim, dim), LayerNorm(dim))
        self._add_end(dim, heads, layers, n_classes)

    def _transform(self, scale, x):
        x, side = _square_pad(x)
        return getattr(self, f"{scale}_ln")(getattr(self, f"{scale}_transformer")(x, side)), side

    def forward(self, x5, x10, x20):
        coarse = self.coarse_pre_cross_attn(_bag(x5))
        source = self.source_pre_cross_attn(_bag(x10))
        fine = self.fine_pre_cross_attn(_bag(x20))
        coarse, _ = self._transform("coarse", self._cross("coarse_cross_attn", source, coarse))
        fine, _ = self._transform("fine", self._cross("fine_cross_attn", source, fine))
        source, side = self._transform("source", source)
        return self._end(self.pre_final_linear(torch.cat([source, fine, coarse], dim=1)), side)


class CrossFusionSingle(_Model):
    """Ablation: the x20 bag alone; x5 and x10 are not looked at, and may be None."""

    def __init__(self, features, dim=512, heads=4, layers=1, n_classes=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.source_pre_cross_attn = _projection(features, dim)
        self.source_transformer = PadTransformer(dim, heads, layers)
        self.source_ln = LayerNorm(dim)
        self._add_end(dim, heads, layers, n_classes)
        self.conv_processor = ConvProcessor(dim, scales=1)

    def forward(self, x5, x10, x20):
        x, side = _square_pad(self.source_pre_cross_attn(_bag(x20)))
        x = self.source_ln(self.source_transformer(x, side))
        return self._end(self.conv_processor([x], side), side)
