"""
The image tokenizer: LlamaGen's VQGAN (arXiv 2406.06525, section 2.1; VQGAN: arXiv 2012.09841).

    image (3, H, W) -> encoder -> (z, h, w) -> quant_conv -> (D, h, w) -> nearest code of V -> tokens (h*w,)
    tokens (h*w,) -> code vectors (D, h, w) -> post_quant_conv -> decoder -> image (3, H, W)

The transformer never sees a pixel, and the tokenizer never sees a class. Code vectors and encoder output are
l2-normalised before they are compared, so "nearest" means "highest cosine". With D = 8 this keeps nearly all of the
codebook in use.

Module attributes have LlamaGen's own names, so official files load without conversion. We add `patch` (1 in every
official model): the toy folds 4x4 pixels into channels before the first convolution, because on a CPU convolutions over
many pixels and few channels run at a tenth of the speed.

Shapes: B images, H x W px, h x w = T tokens, D = codebook_dim, V = codebook_size.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class VQConfig:
    ch_mult: tuple = (1, 1, 2, 2, 4)  # channels of each resolution level, times ch; one halving between levels
    z_channels: int = 256
    codebook_size: int = 16384  # V
    codebook_dim: int = 8  # D
    ch: int = 128
    patch: int = 1  # px folded into channels on each side, before the encoder and after the decoder


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):  # (B, c_in, h, w) -> (B, c_out, h, w)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):  # (B, C, h, w)
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # each (B, hw, C)
        y = F.scaled_dot_product_attention(q, k, v)  # scale C^-0.5
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Halves (stride-2 convolution) or doubles (nearest neighbour, then convolution) height and width."""

    def __init__(self, c, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0))
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros right and below only: the official padding


class Level(nn.Module):
    """One resolution: residual blocks, attention blocks at the coarsest level, then the resampling."""

    def __init__(self, c_in, c_out, n_blocks, attention, resample):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out) for j in range(n_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if attention else nn.Identity() for _ in range(n_blocks))
        if resample:
            setattr(self, resample, Resample(c_out, up=resample == "upsample"))
        self.resample = resample

    def forward(self, x):
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(c_in, c, 2, attention=i == last, resample="downsample" if i < last else None)
            for i, (c_in, c) in enumerate(pairwise([config.ch, *widths]))
        )
        top = widths[-1]
        self.mid = nn.ModuleList([ResBlock(top, top), AttnBlock(top), ResBlock(top, top)])
        self.norm_out, self.conv_out = group_norm(top), nn.Conv2d(top, config.z_channels, 3, padding=1)

    def forward(self, x):  # (B, 3*patch^2, H/patch, W/patch) -> (B, z, h, w)
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]  # coarsest first
        last, top = len(widths) - 1, widths[0]
        self.conv_in = nn.Conv2d(config.z_channels, top, 3, padding=1)
        self.mid = nn.ModuleList([ResBlock(top, top), AttnBlock(top), ResBlock(top, top)])
        self.conv_blocks = nn.ModuleList(
            Level(c_in, c, 3, attention=i == 0, resample="upsample" if i < last else None)
            for i, (c_in, c) in enumerate(pairwise([top, *widths]))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)

    def forward(self, z):  # (B, z, h, w) -> (B, 3*patch^2, H/patch, W/patch)
        z = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            z = block(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class Codebook(nn.Module):
    def __init__(self, size, dim):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)  # as the official code

    def vectors(self):
        return F.normalize(self.embedding.weight, dim=-1)  # (V, D)


class VQModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def latents(self, images):
        """The encoder's unit vectors before quantisation: images (B, 3, H, W) in [-1, 1] -> (B, T, D)."""
        z = self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.patch)))  # (B, D, h, w)
        return F.normalize(z.flatten(2).transpose(1, 2), dim=-1)

    def nearest(self, latents):
        """The code of highest cosine for each latent (B, T, D) -> tokens (B, T). Peak memory: B*T*V floats."""
        return (latents @ self.quantize.vectors().T).argmax(-1)

    def from_codes(self, codes):
        """Code vectors (B, T, D) of a square grid -> images (B, 3, H, W), about [-1, 1]."""
        side = math.isqrt(codes.shape[1])
        z = codes.transpose(1, 2).unflatten(2, (side, side))  # (B, D, h, w)
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, T), int64, in raster order."""
        return self.nearest(self.latents(images))

    def decode(self, tokens):
        """Tokens (B, T) of a square grid, 0 <= token < V -> images (B, 3, H, W), about [-1, 1] (not clamped)."""
        return self.from_codes(self.quantize.vectors()[tokens])


def to_unit(images):
    """Images about [-1, 1], as the decoder writes them -> [0, 1], as judges and the verifier read them."""
    return (images / 2 + 0.5).clamp(0, 1)


def to_uint8(images):
    """Images in [-1, 1] -> uint8, rounded as the official code does: clamp(127.5 x + 128), truncated."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
