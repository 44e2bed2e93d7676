"""A whole zeroth-order step on the CPU, against two plain forwards and a MeZO-style loop.

`python -m experiments.benchmarks.step_cpu` verifies, then times LeNet-5 at batch 32 and 256. The
contestants run in turn, so that a drift of the machine meets all of them; ratios are medians of the
ratios of each round. JSON goes to `experiments/results/step_cpu.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.models import LeNet5
from experiments.benchmarks.models import MeZOLoop
from experiments.files import write_json
from experiments.timing import Contestant, in_turn
from experiments.train.environment import made_on, use_threads
from zo_kernels import perturbed_weights, sample, update_

EPS, LR = 1e-3, 1e-6
RESULT = Path(__file__).parent.parent / "results" / "step_cpu.json"


@dataclass
class Config:
    """Settings of the benchmark."""

    batches: tuple[int, ...] = (32, 256)
    """Batch sizes."""
    rounds: int = 200
    """Timed rounds; each runs every contestant once."""
    threads: int = 2
    """CPU threads of torch."""
    out: Path = RESULT
    """Where the JSON goes."""


def verify() -> None:
    """Refuse to time what is wrong: both estimate the derivative along their own direction."""
    torch.manual_seed(0)
    net, x, y = LeNet5().double(), torch.randn(8, 1, 28, 28).double(), torch.arange(8)
    model = ElasticZO(net, tail="all")
    model.backward(F.cross_entropy(model(x)[0], y).reshape(1))
    slope = sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None)
    zo_net = LeNet5().double()
    zo_net.load_state_dict(net.state_dict())
    wrapped = ElasticZO(zo_net, tail=0, eps=1e-5, queries=200).train()
    zo = ZOSGD(wrapped, lr=0.0)
    zo.step(pair_losses(F.cross_entropy, wrapped(x), y))
    measured = float(zo.projected_gradient.square().mean())
    # E[g^2] = |grad|^2, relative deviation sqrt(2 / 200) = 0.1: 5 sigma.
    if not abs(measured / slope - 1) < 0.5:
        raise SystemExit(f"the estimate is wrong: E[g^2] = {measured}, |grad|^2 = {slope}")


def contestants(batch: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
    x2 = torch.cat([x, x])
    plain = LeNet5().eval()
    mezo = MeZOLoop(LeNet5().eval(), EPS, LR)
    model = ElasticZO(LeNet5(), tail=0, eps=EPS).train()
    zo = ZOSGD(model, lr=LR)

    def two_forwards() -> None:
        with torch.no_grad():
            plain(x)
            plain(x)

    def one_double_forward() -> None:
        with torch.no_grad():
            plain(x2)

    def elasticzo_step() -> None:
        losses = pair_losses(F.cross_entropy, model(x), y)
        model.backward(losses)
        zo.step(losses)

    return {
        "two_forwards": two_forwards,
        "one_double_forward": one_double_forward,
        "elasticzo_step": elasticzo_step,
        "mezo_style_step": lambda: mezo.step(x, y),
    }


def measure(batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each contestant, and medians of the paired ratios."""
    runs = {name: (lambda i, run=run: run()) for name, run in contestants(batch).items()}
    # Warm-up: compilation, caches, the first forward's checks.
    times = in_turn(runs, range(rounds + 20), warm_up=20)
    result = {f"{name}_ms": 1e3 * times.median(name) for name in runs}
    for name in ("elasticzo_step", "mezo_style_step", "one_double_forward"):
        ratio = times.ratio(name, "two_forwards")["median"]
        result[f"{name}_over_two_forwards"] = ratio
    return result


def noise_costs(rounds: int) -> dict[str, float]:
    """Nanoseconds a weight of the noise itself, of both halves from it, and of the update, for a
    matrix of a million weights; `torch.randn` beside them."""
    w = torch.randn(1000, 1024)
    key, eps = torch.tensor([0, 0]), torch.tensor(EPS, dtype=torch.float64)
    one, skip = torch.ones(1, dtype=torch.float64), torch.zeros(())
    runs: dict[str, Contestant] = {
        "normal": lambda i: sample(w.shape, key, tensor=0),
        "sign": lambda i: sample(w.shape, key, tensor=0, noise="rademacher"),
        "both_halves": lambda i: perturbed_weights(w, key, eps, tensor=0),
        "update": lambda i: update_(
            [w], key, 0 * one, one, 0 * one, skip, tensors=[0], groups=[0], scales=[1.0]
        ),
        "torch_randn": lambda i: torch.randn(w.shape),
    }
    times = in_turn(runs, range(rounds + 5), warm_up=5)
    return {name: 1e9 * times.median(name) / w.numel() for name in runs}


def main(config: Config) -> None:
    use_threads(config.threads)
    verify()
    noise = noise_costs(config.rounds)
    print("ns a weight: " + ", ".join(f"{name} {ns:.2f}" for name, ns in noise.items()))
    rows = {}
    for batch in config.batches:
        rows[str(batch)] = row = measure(batch, config.rounds)
        print(
            f"batch {batch}: two forwards {row['two_forwards_ms']:.2f} ms, step "
            f"{row['elasticzo_step_ms']:.2f} ms = {row['elasticzo_step_over_two_forwards']:.2f}x, "
            f"MeZO-style {row['mezo_style_step_ms']:.2f} ms = "
            f"{row['mezo_style_step_over_two_forwards']:.2f}x"
        )
    command = "python -m experiments.benchmarks.step_cpu"
    written = {
        "command": command,
        **made_on(torch.device("cpu")),
        "ns_per_weight": noise,
        "batches": rows,
    }
    write_json(config.out, written)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
