"""What each kind of direction costs on the CPU: time of a step, operations, peak memory.

`python -m experiments.benchmarks.directions_cpu` times a step of LeNet-5 (Full ZO, and with the
last layer as tail) by every kind beside two plain forwards of the same network and Full BP's step,
in turn; predicts and measures its peak memory beside inference's and Full BP's, for LeNet-5 and
ResNet-20; and counts what a device would launch for it. JSON goes to
`experiments/results/directions_cpu.json`.
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

from elasticzo import ZOSGD, ElasticZO, Feedback, ZOAdam, pair_losses
from elasticzo.memory import inference_memory, training_memory
from elasticzo.models import LeNet5, ResNet20
from experiments.files import write_json
from experiments.timing import in_turn
from experiments.train.environment import made_on, use_threads
from experiments.train.memory import peak_of

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
Size = tuple[int, ...]
EPS, MEASURED_STEPS, CPU = 1e-2, 3, torch.device("cpu")


@dataclass
class Config:
    """Settings of the benchmark."""

    batch: int = 256
    """Images a step of LeNet-5."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which of them, by name."""
    rounds: int = 20
    """Timed rounds; each runs every kind once."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads of torch; each is timed."""
    memory: bool = True
    """Predict and measure peak memory, too."""
    out: Path = RESULT
    """Where the JSON goes."""


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that make or change values: each is a kernel on a device, or some."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [r.alias_info for r in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in found)
        self.count += not (views or func.__name__.startswith(("empty", "new_empty")))
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


def time_and_launches(config: Config) -> dict[str, dict[str, float]]:
    batch = config.batch
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
    plain = LeNet5().eval()

    def two_forwards() -> None:
        with torch.no_grad():
            plain(x)
            plain(x)

    steps: dict[str, Callable[[], None]] = {"two forwards": two_forwards, "Full BP": full_bp(x, y)}
    for cut, tail in (("full", 0), ("cls2", ["fc3"])):
        steps |= {f"{name}, {cut}": step_of(KINDS[name], tail, x, y) for name in config.kinds}
    runs = {name: (lambda i, run=run: run()) for name, run in steps.items()}
    times = in_turn(runs, range(config.rounds + 3), warm_up=3)
    found = {}
    for name, run in steps.items():
        with Launches() as counted:  # type: ignore[no-untyped-call]
            run()
        ratio = times.ratio(name, "two forwards")
        found[name] = {"ms": 1e3 * times.median(name), "launches": counted.count, **ratio}
    return found


def full_bp(x: Tensor, y: Tensor) -> Callable[[], None]:
    """A step of backpropagation by Adam, in plain torch."""
    torch.manual_seed(0)
    net = LeNet5()
    adam = torch.optim.Adam(net.parameters(), lr=1e-6)

    def step() -> None:
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        adam.step()
        adam.zero_grad()

    return step


def peaks_of(wrap: Callable[[], ElasticZO], size: Size) -> dict[str, int]:
    """Predicted and measured peak of steps by plain descent, bytes, from the making of the network
    and its batch on."""
    predicted = training_memory(wrap(), torch.randn(size), state_tensors=0).peak.bytes

    def steps() -> None:
        model, x = wrap(), torch.randn(size)
        y = torch.zeros(len(x), dtype=torch.int64)
        zo = ZOSGD(model, lr=1e-9)
        tail = model.tail_optimizer(torch.optim.SGD, lr=1e-9)
        for _ in range(MEASURED_STEPS):
            losses = pair_losses(F.cross_entropy, model(x), y, reduction=model.reduction)
            model.backward(losses)
            zo.step(losses)
            tail.step()
            tail.zero_grad()

    return {"predicted": predicted, "measured": peak_of(steps, CPU)}


def memory_of(
    net: Callable[[], nn.Module], tail: list[str], size: Size
) -> dict[str, dict[str, int]]:
    """Peaks of every kind beside inference's and Full BP's."""

    def wrap(kind: Any, pairing: str, cut: Any = tail) -> Callable[[], ElasticZO]:
        how: dict[str, Any] = {"eps": EPS, "directions": kind, "pairing": pairing}
        return lambda: ElasticZO(net(), cut, **how).train()

    def passes() -> None:
        plain, x = net().eval(), torch.randn(size)
        with torch.no_grad():
            for _ in range(MEASURED_STEPS):
                plain(x)

    said = inference_memory(net(), torch.randn(size)).bytes
    inference = {"predicted": said, "measured": peak_of(passes, CPU)}
    found = {"inference": inference}
    for name, kind in KINDS.items():
        for pairing in ("stacked", "sequential") if "feedback" not in name else ("stacked",):
            label = name if "feedback" in name else f"{name}, {pairing}"
            found[label] = peaks_of(wrap(kind, pairing), size)
    found["Full BP"] = peaks_of(wrap("weight", "stacked", "all"), size)
    return found


def memory(batch: int) -> dict[str, dict[str, dict[str, int]]]:
    """Of both networks."""
    return {
        f"LeNet-5, {batch}": memory_of(LeNet5, ["fc3"], (batch, 1, 28, 28)),
        "ResNet-20, 64": memory_of(lambda: ResNet20(channels=3), ["fc"], (64, 3, 32, 32)),
    }


def main(config: Config) -> None:
    console = Console(highlight=False)
    steps = {}
    for threads in config.threads:
        use_threads(threads)
        steps[str(threads)] = time_and_launches(config)
    found = memory(config.batch) if config.memory else {}
    for count, rows in steps.items():
        table = Table(f"threads: {count}", "ms", "over two forwards", "launches")
        for name, row in rows.items():
            cells = (f"{row['ms']:.1f}", f"{row['median']:.2f}", str(row["launches"]))
            table.add_row(name, *cells)
        console.print(table)
    for net, peaks in found.items():
        table = Table(net, "predicted MB", "measured MB", "measured over inference")
        whole = peaks["inference"]["measured"]
        for name, peak in peaks.items():
            sizes = (f"{peak[k] / 1e6:.1f}" for k in ("predicted", "measured"))
            table.add_row(name, *sizes, f"{peak['measured'] / whole:.2f}")
        console.print(table)
    command = "python -m experiments.benchmarks.directions_cpu"
    written = {"command": command, **made_on(torch.device("cpu")), "batch": config.batch}
    write_json(config.out, {**written, "steps": steps, "memory": found})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
