"""What each kind of direction costs on the CPU: time of a step, operations, peak memory.

`python -m experiments.benchmarks.directions_cpu` times a step of LeNet-5 (Full ZO, and with the
last layer as tail) by every kind beside two plain forwards of the same network, in turn; predicts
its peak memory beside inference's and Full BP's, for LeNet-5 and ResNet-20; and counts the
operations that it dispatches. JSON goes to `experiments/results/directions_cpu.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elasticzo import ElasticZO, Feedback, ZOAdam, pair_losses
from elasticzo.memory import inference_memory, training_memory
from elasticzo.models import LeNet5, ResNet20
from experiments.files import write_json
from experiments.timing import in_turn
from experiments.train.environment import made_on

RESULT = Path(__file__).parent.parent / "results" / "directions_cpu.json"
KINDS: dict[str, Any] = {
    "weight": "weight",
    "rank1": "rank1",
    "sample": "sample",
    "node": "node",
    "auto": "auto",
    "feedback": Feedback(),
    "feedback, 4 parts": Feedback(parts=4),
}
EPS = 1e-2


@dataclass
class Config:
    """Settings of the benchmark."""

    batch: int = 256
    """Images a step of LeNet-5."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which of them, by name."""
    rounds: int = 20
    """Timed rounds; each runs every kind once."""
    threads: int = 2
    """CPU threads of torch."""
    memory: bool = True
    """Predict peak memory, too."""
    out: Path = RESULT
    """Where the JSON goes."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch dispatches; views and shapes too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def step_of(kind: Any, tail: Any, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A whole step by Adam in the head and plain descent in the tail."""
    torch.manual_seed(0)
    model = ElasticZO(LeNet5(), tail, eps=EPS, directions=kind).train()
    zo = ZOAdam(model, lr=1e-6)
    sgd = model.tail_optimizer(torch.optim.SGD, lr=1e-6) if tail else None

    def step() -> None:
        losses = pair_losses(F.cross_entropy, model(x), y, reduction=model.reduction)
        model.backward(losses)
        zo.step(losses)
        if sgd is not None:
            sgd.step()
            sgd.zero_grad()

    return step


def time_and_operations(config: Config) -> dict[str, dict[str, float]]:
    batch = config.batch
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
    plain = LeNet5().eval()

    def two_forwards() -> None:
        with torch.no_grad():
            plain(x)
            plain(x)

    steps: dict[str, Callable[[], None]] = {"two forwards": two_forwards}
    for cut, tail in (("full", 0), ("cls2", ["fc3"])):
        steps |= {f"{name}, {cut}": step_of(KINDS[name], tail, x, y) for name in config.kinds}
    runs = {name: (lambda i, run=run: run()) for name, run in steps.items()}
    times = in_turn(runs, range(config.rounds + 3), warm_up=3)
    found = {}
    for name, run in steps.items():
        with Operations() as counted:  # type: ignore[no-untyped-call]
            run()
        ratio = times.ratio(name, "two forwards")
        found[name] = {"ms": 1e3 * times.median(name), "operations": counted.count, **ratio}
    return found


def memory_of(net: Callable[[], nn.Module], tail: list[str], x: Tensor) -> dict[str, int]:
    """Predicted peaks of a step, bytes, without the optimisers' state."""
    found = {"inference": inference_memory(net(), x).bytes}
    for name, kind in KINDS.items():
        for pairing in ("stacked", "sequential") if "feedback" not in name else ("stacked",):
            model = ElasticZO(net(), tail, eps=EPS, directions=kind, pairing=pairing).train()
            label = name if "feedback" in name else f"{name}, {pairing}"
            found[label] = training_memory(model, x, state_tensors=0).steady.bytes
    full = ElasticZO(net(), "all").train()
    found["Full BP"] = training_memory(full, x, state_tensors=0).steady.bytes
    return found


def predicted(batch: int) -> dict[str, dict[str, int]]:
    """Peaks of both networks."""
    digits, images = torch.zeros(batch, 1, 28, 28), torch.zeros(64, 3, 32, 32)
    return {
        f"LeNet-5, {batch}": memory_of(LeNet5, ["fc3"], digits),
        "ResNet-20, 64": memory_of(lambda: ResNet20(channels=3), ["fc"], images),
    }


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    console = Console(highlight=False)
    steps = time_and_operations(config)
    memory = predicted(config.batch) if config.memory else {}
    table = Table("step", "ms", "over two forwards", "operations")
    for name, row in steps.items():
        cells = (f"{row['ms']:.1f}", f"{row['median']:.2f}", str(row["operations"]))
        table.add_row(name, *cells)
    console.print(table)
    for net, peaks in memory.items():
        table = Table(net, "MB", "over inference")
        for name, size in peaks.items():
            table.add_row(name, f"{size / 1e6:.1f}", f"{size / peaks['inference']:.2f}")
        console.print(table)
    command = "python -m experiments.benchmarks.directions_cpu"
    written = {"command": command, **made_on(torch.device("cpu")), "batch": config.batch}
    write_json(config.out, {**written, "steps": steps, "memory": memory})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
