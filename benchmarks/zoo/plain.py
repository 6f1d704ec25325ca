"""Plain torch models without transformers, their losses computed outside from what they return."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.common import Batch
from benchmarks.zoo.entries import CLASSES, HEADS, HIDDEN, LAYERS, ROWS, VOCABULARY, WIDE, Entry


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 16] -> [rows, classes]."""
        out: torch.Tensor = self.layers(x)
        return out


def _vectors() -> Batch:
    return {"x": torch.randn(8, 16)}


def _squares(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


class _Tagger(nn.Module):
    """Embedding, a bidirectional LSTM, one class a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows, tokens] -> [rows, tokens, classes]."""
        logits: torch.Tensor = self.head(self.lstm(self.embed(ids))[0])
        return logits


def _ids() -> Batch:
    return {"ids": torch.randint(VOCABULARY, (ROWS, 6))}


def _first_class(output: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(0, -2), torch.zeros(output[..., 0].numel(), dtype=torch.long))


class _DitBlock(nn.Module):
    """Self-attention and MLP, shifted, scaled and gated by the time (adaLN-Zero, Peebles and Xie 2023, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(HIDDEN, 6 * HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, WIDE), nn.GELU(), nn.Linear(WIDE, HIDDEN))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """[rows, patches, hidden], [rows, hidden] -> [rows, patches, hidden]."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(functional.silu(time))[:, None].chunk(6, -1)
        y = functional.layer_norm(x, (HIDDEN,)) * (1 + scale) + shift
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        x = x + gate * self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: torch.Tensor = x + gate2 * self.mlp(functional.layer_norm(x, (HIDDEN,)) * (1 + scale2) + shift2)
        return result


class _Dit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, HIDDEN, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, HIDDEN))
        self.time = nn.Sequential(nn.Linear(16, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        self.label = nn.Embedding(CLASSES, HIDDEN)
        self.blocks = nn.ModuleList([_DitBlock() for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, 16)

    def forward(self, image: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Noisy latents [rows, 4, 8, 8], times [rows] and classes [rows] -> predicted noise, patch by patch."""
        waves = time[:, None] * torch.exp(-math.log(100.0) * torch.arange(8) / 8)
        condition = self.time(torch.cat([waves.cos(), waves.sin()], -1)) + self.label(label)
        x = self.patch(image).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        noise: torch.Tensor = self.head(x)
        return noise


def _noisy() -> Batch:
    return {"image": torch.randn(ROWS, 4, 8, 8), "time": torch.rand(ROWS), "label": torch.randint(CLASSES, (ROWS,))}


class _Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, out, 3, padding=1)
        self.time, self.skip = nn.Linear(16, out), nn.Conv2d(width, out, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """One residual block of a UNet, told the time."""
        result: torch.Tensor = self.skip(x) + self.conv(functional.silu(self.norm(x))) + self.time(time)[:, :, None, None]
        return result


class _Unet(nn.Module):
    """Down, middle, up with skip connections that reach over the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.time = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(1, 16)
        self.down = nn.ModuleList([_Residual(16, 16), _Residual(16, 32)])
        self.middle = _Residual(32, 32)
        self.up = nn.ModuleList([_Residual(64, 16), _Residual(32, 16)])
        self.widen = nn.ModuleList([nn.ConvTranspose2d(32, 32, 2, 2), nn.ConvTranspose2d(16, 16, 2, 2)])
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, image: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Noisy images [rows, 3, 16, 16] and times [rows] -> predicted noise."""
        t, x, skips = functional.silu(self.time(time[:, None])), self.enter(image), []
        for block in self.down:
            x = block(x, t)
            skips.append(x)
            x = functional.avg_pool2d(x, 2)
        x = self.middle(x, t)
        for block, widen in zip(self.up, self.widen, strict=True):
            x = block(torch.cat([widen(x), skips.pop()], 1), t)
        noise: torch.Tensor = self.leave(functional.interpolate(x, scale_factor=1.0))
        return noise


def _pictures() -> Batch:
    return {"image": torch.randn(ROWS, 3, 16, 16), "time": torch.rand(ROWS)}


@dataclass
class Scores:
    """What the two-headed model returns."""

    classes: torch.Tensor
    value: torch.Tensor


torch.utils._pytree.register_dataclass(Scores)


class _TwoHeads(nn.Module):
    """Several outputs in a dataclass, weight norm, one layer used twice, a buffer that counts, a per-head temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = weight_norm(nn.Linear(16, HIDDEN))
        self.shared = nn.Linear(HIDDEN, HIDDEN)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1))
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.classes, self.value = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> Scores:
        """[rows, 16] -> two outputs."""
        self.calls.add_(1)  # type: ignore[operator]
        y = torch.relu(self.shared(torch.relu(self.shared(self.enter(x)))))
        y = self.norm((y.view(len(y), HEADS, -1) * self.temperature).flatten(1))
        return Scores(self.classes(y), self.value(y))


def _both(output: Any) -> torch.Tensor:
    loss: torch.Tensor = _first_class(output.classes) + output.value.square().mean()
    return loss


PLAIN = (
    Entry("MLP", "no repeated stack, loss outside the model", _Mlp, _vectors, _squares),
    Entry("LSTM tagger", "recurrent weights used at every token", _Tagger, _ids, _first_class),
    Entry("DiT", "adaLN-Zero diffusion transformer, patch convolution", _Dit, _noisy, _squares),
    Entry("UNet", "2-D and transposed convolutions, long skip connections", _Unet, _pictures, _squares),
    Entry("two heads", "dataclass of outputs, weight norm, a layer used twice, mutated buffers", _TwoHeads, _vectors, _both),
)
