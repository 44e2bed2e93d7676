"""What directions of samples and nodes know of the gradient, by the size of the batch.

`python -m experiments.estimator.by_sample --data mnist --data-dir DIR` takes LeNet-5 with its first
weights and batches of several sizes, and compares many estimates by one pair of passes with
autograd's gradient, in float64: the cosine (mean inner product over the root of the mean square)
beside what theory says of it. JSON and a picture go to `experiments/results`.

With signs, eps -> 0, layers l, a sample's gradient g_i and output errors delta_i, d_l weights with
bias, N_l outputs at a place, K_l inputs, m_l^2 = K_l, and G the gradient of the batch:

    weight          E |estimate|^2 = d |G|^2
    sample, node    E |estimate|^2 = |G|^2 + (mean_i(A_i E_i) - mean_i |g_i|^2) / B
                    E_i = sum_l |g_il|^2 or m_l^2 |delta_il|^2      of c_i^2, by sample or by node
                    A_i = sum_l d_l      or N_l sum_p (|x_ip|^2 + 1) / m_l^2    what meets c_i^2

to leading order: for nodes c_i^2 and the size of the outer product are taken as independent. Only
the directions of a batch do not gain by B.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.data import load_images
from elasticzo.models import LeNet5
from experiments.commands import RESULTS, plain_console, run_command, tracked
from experiments.files import write_json
from experiments.train.environment import made_on
from experiments.train.plots import pyplot, save

KINDS = ("weight", "sample", "node", "auto")
EPS = 1e-5  # in float64


@dataclass(frozen=True)
class Config:
    """Cosine between estimates and the gradient, by kind of direction and size of the batch."""

    data: Literal["digits", "mnist", "fashion-mnist"] = "digits"
    """Images."""
    data_dir: Path | None = None
    """Folder of the data set's files; not needed for digits."""
    batches: tuple[int, ...] = (32, 128, 512, 2048)
    """Samples of a batch."""
    draws: int = 24
    """Estimates of each, >= 2."""
    seed: int = 0
    """Of weights, samples and noise."""
    out: Path = RESULTS
    """Folder of by_sample_<data>.json and its picture."""


@dataclass
class Truth:
    """One batch: its gradient, and what theory needs of its samples.

    Attributes:
        gradient: flat, of all weights.
        energy, gain: `[B]` by layer and kind, the parts of E_i and A_i. own: `[B]`, |g_i|^2.
    """

    gradient: Tensor
    energy: dict[tuple[str, str], Tensor]
    gain: dict[tuple[str, str], Tensor]
    own: Tensor


def truth_of(net: nn.Module, x: Tensor, y: Tensor) -> Truth:
    """By autograd, in the precision of the network."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers: dict[str, Any] = {n: m for n, m in net.named_modules() if hasattr(m, "weight")}
    hooks = [
        m.register_forward_hook(lambda m, args, out, n=n: seen.__setitem__(n, (args[0], out)))
        for n, m in layers.items()
    ]
    loss = F.cross_entropy(net(x), y, reduction="sum")
    for hook in hooks:
        hook.remove()
    outputs = [seen[n][1] for n in layers]
    deltas = dict(zip(layers, torch.autograd.grad(loss, outputs), strict=True))
    energy, gain, gradient = {}, {}, []
    own = x.new_zeros(len(x))
    with torch.no_grad():
        for name, m in layers.items():
            patches = _patches(m, seen[name][0].detach())  # [B, K, P]
            delta = deltas[name].reshape(len(x), m.weight.shape[0], -1)  # [B, N, P]
            g = torch.einsum("bnp,bkp->bnk", delta, patches)
            square = g.flatten(1).square().sum(1) + delta.sum(2).square().sum(1)
            count, k = m.weight.numel() + m.weight.shape[0], m.weight[0].numel()
            energy[name, "sample"], gain[name, "sample"] = square, torch.full_like(own, count)
            energy[name, "node"] = k * delta.flatten(1).square().sum(1)
            places = patches.square().sum((1, 2)) + patches.shape[2]
            gain[name, "node"] = m.weight.shape[0] * places / k
            gradient += [g.mean(0).flatten(), delta.sum(2).mean(0)]
            own = own + square
    return Truth(torch.cat(gradient), energy, gain, own)


def _patches(m: Any, a: Tensor) -> Tensor:
    """What a layer multiplies by its weight at each place."""
    if isinstance(m, nn.Linear):
        return a.unsqueeze(2)
    return F.unfold(a, m.kernel_size, padding=m.padding, stride=m.stride)


def predicted(truth: Truth, kinds: dict[str, str]) -> float:
    """The cosine by theory, for the kind of each layer."""
    square = float(truth.gradient.square().sum())
    if set(kinds.values()) == {"weight"}:
        return 1.0 / math.sqrt(truth.gradient.numel())
    e = torch.stack([truth.energy[at] for at in kinds.items()]).sum(0)
    a = torch.stack([truth.gain[at] for at in kinds.items()]).sum(0)
    spread = float((a * e).mean() - truth.own.mean()) / len(e)
    return math.sqrt(square / (square + spread))


def estimates(net: nn.Module, kind: str, x: Tensor, y: Tensor, draw: int) -> tuple[Tensor, Any]:
    """One, flat, by a step of plain descent with rate 1; and the kind of each layer."""
    how: dict[str, Any] = {"eps": EPS, "noise": "rademacher", "seed": draw, "directions": kind}
    model = ElasticZO(copy.deepcopy(net), 0, **how).train()
    zo = ZOSGD(model, lr=1.0)
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    losses = pair_losses(F.cross_entropy, model(x), y, reduction=model.reduction)
    model.backward(losses)
    zo.step(losses)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    named = {n.rpartition("."): k.name for n, k in model.directions.items()}
    kinds = {layer: kind for (layer, _, own), kind in named.items() if own == "weight"}
    return before - after, kinds


def measure(net: nn.Module, x: Tensor, y: Tensor, draws: Sequence[int]) -> list[dict[str, Any]]:
    """A row a kind, of one batch."""
    truth = truth_of(net, x, y)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        kinds: dict[str, str] = {}
        inner, squares = [], []
        for draw in draws:
            u, kinds = estimates(net, kind, x, y, draw)
            inner.append(float(u @ truth.gradient))
            squares.append(float(u @ u))
        length = float(truth.gradient.norm())
        root = math.sqrt(sum(squares) / len(squares))
        spread = float(torch.tensor(inner).std()) / math.sqrt(len(inner))
        rows.append({
            "kind": kind,
            "batch": len(x),
            "cosine": sum(inner) / len(inner) / (length * root),
            "error": spread / (length * root),
            "theory": predicted(truth, kinds),
            "n": len(inner),
        })  # fmt: skip
    return rows


def draw_picture(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Measured cosines as points, theory as lines."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    for i, kind in enumerate(KINDS):
        own = [row for row in rows if row["kind"] == kind]
        batches = [row["batch"] for row in own]
        color = f"C{i}"
        axes.plot(batches, [row["theory"] for row in own], color=color, label=f"{kind} (theory)")
        bars = {"yerr": [2 * row["error"] for row in own], "fmt": "o", "color": color}
        axes.errorbar(batches, [row["cosine"] for row in own], capsize=3, label=kind, **bars)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="cosine to the gradient")
    axes.set(title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncol=2)
    save(plt, figure, path)


def work(config: Config, console: Console) -> list[dict[str, Any]]:
    """All rows. Raises: ValueError for batches larger than the data set."""
    if config.draws < 2:
        raise ValueError(f"draws must be >= 2, got {config.draws}")
    if config.data != "digits" and config.data_dir is None:
        raise ValueError(f"{config.data} is read from files: data_dir must name their folder")
    data = load_images(config.data, config.data_dir)
    if max(config.batches) > len(data.train_x):
        raise ValueError(f"batches must be <= {len(data.train_x)} samples, got {config.batches}")
    torch.manual_seed(config.seed)
    net = LeNet5().double()
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(config.seed))
    rows: list[dict[str, Any]] = []
    for batch in tracked(config.batches, "batches", console):
        chosen = order[:batch]
        x, y = data.normalized(data.train_x[chosen]).double(), data.train_y[chosen]
        rows += measure(net, x, y, range(config.seed, config.seed + config.draws))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.estimator.by_sample")
    console = plain_console()

    def finish(rows: list[dict[str, Any]]) -> int:
        table = Table("batch", "kind", "cosine", "theory")
        for row in rows:
            found = f"{row['cosine']:.4f} ± {row['error']:.4f}"
            table.add_row(str(row["batch"]), row["kind"], found, f"{row['theory']:.4f}")
        console.print(table)
        where = config.out / f"by_sample_{config.data}.json"
        command = f"python -m experiments.estimator.by_sample --data {config.data} --data-dir DIR"
        meaning = (
            "mean <estimate, gradient> / (|gradient| root of mean |estimate|^2), float64, LeNet-5 "
            "with its first weights; its standard error; n estimates"
        )
        head = {"command": command, "meaning": meaning, **made_on(torch.device("cpu"))}
        write_json(where, {**head, "seed": config.seed, "rows": rows})
        title = f"LeNet-5, first weights, {config.data}"
        draw_picture(where.with_suffix(".png"), rows, title)
        return 0

    return run_command(lambda: work(config, console), finish, console)


if __name__ == "__main__":
    sys.exit(main())
