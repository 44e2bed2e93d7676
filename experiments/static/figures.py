"""Predicted time of a linear layer's pair, fused and staged, against two plain products.

`python -m experiments.static.figures` writes `docs/figures/paths.png`: what the rule of
`zo_kernels.paths` predicts for a 4096 x 4096 layer on an H200, over the rows of a half.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.train.plots import pyplot, save
from zo_kernels.paths import DEVICES, VENDOR_PART, Work, seconds

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "paths.png"
SIDE = 4096
KINDS = {"bf16": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32")}


@dataclass
class Config:
    """Settings of the figure."""

    device: str = "H200"
    """Device of `zo_kernels.paths.DEVICES`."""
    out: Path = FIGURE
    """Where the picture goes."""


def plain_seconds(rows: int, kind: str, device: str) -> float:
    """Two products of `rows` without any noise: the floor of the pair."""
    known, dtype = DEVICES[device], KINDS[kind][0]
    products = 4.0 * rows * SIDE * SIDE / (getattr(known, kind) * VENDOR_PART[kind])
    moved = (2 * SIDE * SIDE + 4 * rows * SIDE) * dtype.itemsize
    return float(max(products, moved / known.memory))


def main(config: Config) -> None:
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    rows = [1 << i for i in range(17)]
    for axes, (kind, (dtype, precision)) in zip(panels, KINDS.items(), strict=True):
        plain = [plain_seconds(m, kind, config.device) for m in rows]
        for noise, color in (("normal", "tab:blue"), ("rademacher", "tab:orange")):
            for path, style in (("fused", "-"), ("staged", "--")):
                parts = []
                for m, floor in zip(rows, plain, strict=True):
                    x = m * SIDE
                    work = Work(
                        *(m, SIDE, SIDE, 1, x, x, False, noise, dtype, dtype, dtype), precision
                    )
                    parts.append(100 * floor / seconds(work, DEVICES[config.device])[path])
                axes.plot(rows, parts, style, color=color, label=f"{noise}, {path}")
        axes.axhline(97, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rows of a half", title=f"{kind}, 4096 x 4096, {config.device} (predicted)")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="throughput of two plain products (%)", ylim=(0, None))
    panels[0].legend()
    save(plt, figure, config.out)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
