"""The reference of the three models in plain PyTorch.

This is the specification in runnable form: the parameter names are the public
checkpoint names (a published `best_model.pt` loads with strict=True), every
tensor is `[batch, tokens, channels]`, batch is 1.

Each model is called as `model(x5, x10, x20)` with one feature bag per
magnification and returns logits `[1, n_classes]`; `survival(logits)` gives the
discrete hazards and the survival curve.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def survival(logits):
    """hazards = sigmoid(logits); S[t] = prod_{u<=t} (1 - hazards[u]); risk = -sum_t S[t]."""
    hazards = torch.sigmoid(logits)
    return hazards, torch.cumprod(1 - hazards, dim=1)


def square_pad(x):
    """Pads tokens to the next square by repeating the first ones; returns (x, side)."""
    n = x.shape[1]
    side = math.ceil(math.sqrt(n))
    return torch.cat([x, x[:, : side * side - n]], dim=1), side


def grid(x, side):
    """[b, side*side, c] -> [b, c, side, side], row major."""
    b, _, c = x.shape
    return x.transpose(1, 2).reshape(b, c, side, side)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def split_heads(x, heads):
    b, n, c = x.shape
    return x.view(b, n, heads, c // heads).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, dim, ratio=2.0, p=0.3):
        super().__init__()
        hidden = int(dim * ratio)
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(p), nn.Linear(hidden, dim), nn.Dropout(p)
        )

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    """Softmax attention of `x` over `context`, scale 1/sqrt(head_dim), biases everywhere."""

    def __init__(self, dim, heads, p=0.0, scale_embedding=False):
        super().__init__()
        self.heads, self.p = heads, p
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        # one embedding is added to both sides of a cross-attention
        self.scale_embeddings = nn.Parameter(torch.zeros(1, 1, dim)) if scale_embedding else None

    def forward(self, x, context):
        if self.scale_embeddings is not None:
            x, context = x + self.scale_embeddings, context + self.scale_embeddings
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(context), self.heads)
        v = split_heads(self.v_proj(context), self.heads)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        b, _, n, _ = out.shape
        return self.out_proj(out.transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    """`layers` of [norm, attention, norm, ffn]. The residual starts from the NORMALISED x:
    x = norm1(x); x = x + attn(x); x = norm2(x); x = x + ffn(x)."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(dim), Attention(dim, heads, p=0.2), nn.LayerNorm(dim), FeedForward(dim)])
            for _ in range(layers)
        )

    def forward(self, x):
        for norm1, attention, norm2, ffn in self.layers:
            x = norm1(x)
            x = x + attention(x, x)
            x = norm2(x)
            x = x + ffn(x)
        return x


class PPEG(nn.Module):
    """Positional encoding: depthwise 7x7 + 5x5 + 3x3 convolutions + identity, on the token grid."""

    def __init__(self, dim):
        super().__init__()
        self.proj, self.proj1, self.proj2 = (
            nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in (7, 5, 3)
        )

    def forward(self, x, side):
        g = grid(x, side)
        return tokens(self.proj(g) + g + self.proj1(g) + self.proj2(g))


class PadTransformer(nn.Module):
    def __init__(self, dim, heads, layers, class_token=False):
        super().__init__()
        self.class_token = class_token
        self.pre_layers = Block(dim, heads, layers)
        self.post_layers = Block(dim, heads, layers)
        self.ppeg = PPEG(dim)

    def forward(self, x, side):
        x = self.pre_layers(x)
        if self.class_token:
            x = torch.cat([x[:, :1], self.ppeg(x[:, 1:], side)], dim=1)
        else:
            x = self.ppeg(x, side)
        return self.post_layers(x)


class MultiScaleConv(nn.Module):
    """Grouped 7x7 + 5x5 + 3x3 plus a grouped 1x1 shortcut; dim -> dim/2, two inputs a group."""

    def __init__(self, dim, out):
        super().__init__()
        self.proj, self.proj1, self.proj2, self.x_proj = (
            nn.Conv2d(dim, out, k, padding=k // 2, groups=out) for k in (7, 5, 3, 1)
        )

    def forward(self, x):
        return self.proj(x) + self.proj1(x) + self.proj2(x) + self.x_proj(x)


class ConvProcessor(nn.Module):
    """Mixes the scales (one weight each, one bias), convolves on the grid, and projects back to dim."""

    def __init__(self, dim, scales=3, p=0.3):
        super().__init__()
        self.p = p
        if scales > 1:
            self.conv3d = nn.Conv3d(scales, 1, 1)
        self.conv_block = nn.Sequential(MultiScaleConv(dim, dim // 2), nn.ReLU(), nn.Dropout2d(p))
        self.linear = nn.Sequential(nn.Linear(dim // 2, dim), nn.LayerNorm(dim))

    def forward(self, streams, side):
        grids = torch.stack([grid(x, side) for x in streams], dim=1)
        x = self.conv3d(grids).squeeze(1) if len(streams) > 1 else grids[:, 0]
        return self.linear(tokens(self.conv_block(x)))


def projection(features, dim):
    if features == dim:
        return nn.Identity()
    return nn.Sequential(nn.Linear(features, dim), nn.LayerNorm(dim))


class CrossFusion(nn.Module):
    def __init__(self, features, dim=512, heads=4, layers=1, n_classes=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.c_lin_proj, self.s_lin_proj, self.f_lin_proj = (projection(features, dim) for _ in range(3))
        for scale in ("f", "c"):
            setattr(self, f"{scale}_cross_attn", Attention(dim, heads, scale_embedding=True))
            setattr(self, f"{scale}_cross_attn_ln", nn.LayerNorm(dim))
            setattr(self, f"{scale}_cross_attn_ffn", FeedForward(dim))
        for scale in ("c", "f", "s"):
            setattr(self, f"{scale}_transformer", PadTransformer(dim, heads, layers))
            setattr(self, f"{scale}_transformer_ln", nn.LayerNorm(dim))
        self.final_transformer = PadTransformer(dim, heads, layers, class_token=True)
        self.final_ln = nn.LayerNorm(dim)
        self.conv_processor = ConvProcessor(dim)
        self.mlp_head = nn.Sequential(nn.Linear(dim, n_classes))

    def cross(self, scale, x, context):
        """Cross-attention block: x + attn, then norm, then a residual FFN from the normalised x."""
        x = getattr(self, f"{scale}_cross_attn_ln")(x + getattr(self, f"{scale}_cross_attn")(x, context))
        return x + getattr(self, f"{scale}_cross_attn_ffn")(x)

    def pad_transform(self, scale, x):
        x, side = square_pad(x)
        return getattr(self, f"{scale}_transformer_ln")(getattr(self, f"{scale}_transformer")(x, side)), side

    def forward(self, x5, x10, x20):
        coarse, source, fine = self.c_lin_proj(x5), self.s_lin_proj(x10), self.f_lin_proj(x20)
        coarse, _ = self.pad_transform("c", self.cross("c", source, coarse))
        fine, _ = self.pad_transform("f", self.cross("f", source, fine))
        source, side = self.pad_transform("s", source)
        fused = self.conv_processor([source, fine, coarse], side)
        fused = torch.cat([self.cls_token.expand(fused.shape[0], -1, -1), fused], dim=1)
        fused = self.final_transformer(fused, side)
        return self.mlp_head(self.final_ln(fused)[:, 0])


class CrossFusionConcat(nn.Module):
    """Ablation: the three streams are concatenated and projected instead of convolved."""

    def __init__(self, features, dim=512, heads=4, layers=1, n_classes=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        for scale in ("coarse", "source", "fine"):
            setattr(self, f"{scale}_pre_cross_attn", projection(features, dim))
            setattr(self, f"{scale}_transformer", PadTransformer(dim, heads, layers))
            setattr(self, f"{scale}_ln", nn.LayerNorm(dim))
        for scale in ("coarse", "fine"):
            setattr(self, f"{scale}_cross_attn", Attention(dim, heads, scale_embedding=True))
            setattr(self, f"{scale}_cross_attn_ln", nn.LayerNorm(dim))
            setattr(self, f"{scale}_cross_attn_ffn", FeedForward(dim))
        self.pre_final_linear = nn.Sequential(nn.Linear(3 * dim, dim), nn.LayerNorm(dim))
        self.final_transformer = PadTransformer(dim, heads, layers, class_token=True)
        self.final_ln = nn.LayerNorm(dim)
        self.mlp_head = nn.Sequential(nn.Linear(dim, n_classes))

    cross = CrossFusion.cross

    def pad_transform(self, scale, x):
        x, side = square_pad(x)
        return getattr(self, f"{scale}_ln")(getattr(self, f"{scale}_transformer")(x, side)), side

    def forward(self, x5, x10, x20):
        coarse, source, fine = (
            self.coarse_pre_cross_attn(x5), self.source_pre_cross_attn(x10), self.fine_pre_cross_attn(x20)
        )
        coarse, _ = self.pad_transform("coarse", self.cross("coarse", source, coarse))
        fine, _ = self.pad_transform("fine", self.cross("fine", source, fine))
        source, side = self.pad_transform("source", source)
        fused = self.pre_final_linear(torch.cat([source, fine, coarse], dim=2))
        fused = torch.cat([self.cls_token.expand(fused.shape[0], -1, -1), fused], dim=1)
        fused = self.final_transformer(fused, side)
        return self.mlp_head(self.final_ln(fused)[:, 0])


class CrossFusionSingle(nn.Module):
    """Ablation: the 20x bag alone."""

    def __init__(self, features, dim=512, heads=4, layers=1, n_classes=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.source_pre_cross_attn = projection(features, dim)
        self.source_transformer = PadTransformer(dim, heads, layers)
        self.source_ln = nn.LayerNorm(dim)
        self.final_transformer = PadTransformer(dim, heads, layers, class_token=True)
        self.final_ln = nn.LayerNorm(dim)
        self.conv_processor = ConvProcessor(dim, scales=1)
        self.mlp_head = nn.Sequential(nn.Linear(dim, n_classes))

    def forward(self, x5, x10, x20):
        x, side = square_pad(self.source_pre_cross_attn(x20))
        x = self.source_ln(self.source_transformer(x, side))
        fused = self.conv_processor([x], side)
        fused = torch.cat([self.cls_token.expand(fused.shape[0], -1, -1), fused], dim=1)
        fused = self.final_transformer(fused, side)
        return self.mlp_head(self.final_ln(fused)[:, 0])
