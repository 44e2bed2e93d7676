"""The integer forward of the halves, block by block, and what it keeps for the tail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elasticzo.int8.layers import Block
from elasticzo.int8.network import Int8Network
from elasticzo.int8.tensor import Int8Tensor
from zo_kernels import (
    int8_conv2d_max_pool,
    int8_paired_conv1d_max,
    int8_paired_conv2d,
    int8_paired_linear,
    int8_range,
    int8_requantize,
)
from zo_kernels.geometry import Geometry, conv_size


@dataclass(frozen=True)
class Noise:
    """The perturbation of one layer."""

    p_zero: float
    r_max: int


@dataclass
class Kept:
    """What the backward of a block needs; dimension 0 is `[halves B]`."""

    x: Int8Tensor  # its input; exponents [halves]
    out: Tensor  # its output, int8: what is 0 there passes no ReLU
    shapes: list[torch.Size]  # of the accumulators, before each pool
    places: list[Tensor]  # of the maxima of each pool; uint8 of windows 2 x 2


@dataclass
class Tape:
    """Of one training forward over `count` halves, from half `first` on."""

    first: int
    count: int
    kept: dict[str, Kept] = field(default_factory=dict)


class Forward:
    """One pass over the halves `start .. stop - 1`; without `key`, over one unperturbed.

    The input is shared by all halves until a perturbed layer reads it: layers before that run once.

    Args:
        noise: of the perturbed layers, by name.
        keep: names of the blocks of which the backward needs something.
    """

    def __init__(
        self,
        network: Int8Network,
        key: Tensor | None,
        start: int,
        stop: int,
        noise: dict[str, Noise],
        keep: frozenset[str],
        backend: str,
    ) -> None:
        self.network, self.key, self.noise = network, key, noise
        self.start, self.stop, self.keep, self.backend = start, stop, keep, backend
        self.tape = Tape(start, stop - start)

    def run(self, x: Int8Tensor) -> Int8Tensor:
        """`[B, ...]` with one exponent -> `[halves B, C]` with `[halves]` exponents."""
        wanted = self.stop - self.start
        q = x.q
        for stage in self.network.before:
            if isinstance(stage, str):
                q = q.clamp_min(0) if stage == "relu" else q.flatten(1)
            else:
                q = stage(q)
        x = Int8Tensor(q, x.exponent.reshape(1))
        halves = 1
        for block in self.network.blocks:
            perturbed = self.key is not None and block.name in self.noise
            after = wanted if perturbed else halves
            x = self._block(block, x, after, perturbed, shared=perturbed and halves < after)
            halves = after
        if halves < wanted:  # no layer is perturbed: all halves are alike
            n = wanted // halves
            x = Int8Tensor(x.q.repeat(n, *[1] * (x.q.ndim - 1)), x.exponent.expand(wanted))
            self.tape.count = 1
        return x

    def _block(
        self, block: Block, x: Int8Tensor, halves: int, perturbed: bool, shared: bool
    ) -> Int8Tensor:
        layer = block.layer
        start = self.start if perturbed else 0
        noise = self.noise[block.name] if perturbed else Noise(0.0, 1)
        settings: dict[str, Any] = {
            "tensor": layer.tensor,
            "start": start,
            "stop": start + halves,
            "shared": shared,
            "p_zero": noise.p_zero,
            "r_max": noise.r_max,
            "backend": self.backend,
        }
        key = self.key if perturbed else None
        keeps = block.name in self.keep
        places: list[Tensor] = []
        shapes: list[torch.Size] = []
        if layer.convolution:
            acc, bits = self._convolution(block, x, key, settings, keeps, places, shapes)
        else:
            acc, bits = int8_paired_linear(x.q, layer.weight, key, relu=block.relu, **settings)
            shapes.append(acc.shape)
        q, exponent = int8_requantize(
            acc,
            bits,
            x.exponent,
            weight_exponent=layer.exponent,
            halves=halves,
            backend=self.backend,
        )
        q = q.flatten(1) if block.flatten else q
        if keeps:
            self.tape.kept[block.name] = Kept(x, q, shapes, places)
        return Int8Tensor(q, exponent)

    def _convolution(
        self,
        block: Block,
        x: Int8Tensor,
        key: Tensor | None,
        settings: dict[str, Any],
        keeps: bool,
        places: list[Tensor],
        shapes: list[torch.Size],
    ) -> tuple[Tensor, Tensor]:
        """Accumulators after ReLU and pooling, and their bits."""
        layer, pools = block.layer, block.pools
        geometry: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        if keeps and key is None and len(pools) == 1 and pools[0].fusible:
            acc, bits, where = int8_conv2d_max_pool(
                *(x.q, layer.weight, settings["stop"] - settings["start"]),
                relu=block.relu,
                backend=self.backend,
                **geometry,
            )
            size = conv_size(x.q.shape[2:], layer.weight.shape[2:], Geometry(**geometry))
            shapes += [torch.Size((*acc.shape[:2], *size)), acc.shape]
            places.append(where)
            return acc, bits
        flat = layer.weight.ndim == 3
        if flat and not keeps and len(pools) == 1 and pools[0].window is None:
            line = {name: pair[1] for name, pair in geometry.items()}
            return int8_paired_conv1d_max(
                x.q, layer.weight, key, relu=block.relu, **line, **settings
            )
        fused = not keeps and not flat and bool(pools) and pools[0].fusible
        acc, bits = int8_paired_conv2d(
            x.q.unsqueeze(2) if flat else x.q,
            layer.weight2d,
            key,
            relu=block.relu,
            pool=fused,
            **geometry,
            **settings,
        )
        if flat:
            acc = acc.squeeze(2)
        shapes.append(acc.shape)
        pools = pools[1:] if fused else pools
        for pool in pools:
            if keeps:
                acc, place = pool.with_places(acc)
                places.append(place)
            else:
                acc = pool(acc)
            shapes.append(acc.shape)
        if pools:
            bits = int8_range(
                acc, halves=settings["stop"] - settings["start"], backend=self.backend
            )
        return acc, bits
