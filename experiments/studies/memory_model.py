"""Predicted against measured peaks: `python -m experiments.studies.memory_model`.

The liveness model (`elasticzo.memory`) says what a training step and a plain pass hold before
anything runs; here both run, and what torch's allocator gave out at most is set beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.memory import inference_memory, training_memory
from experiments.commands import RESULTS, plain_console, run_command, tracked
from experiments.files import read_checked, write_checked, write_json
from experiments.studies.networks import NETWORKS, STATE_TENSORS, TAILS
from experiments.studies.study import options
from experiments.train.environment import made_on, use_threads
from experiments.train.memory import peak_of
from experiments.train.resolve import pick_device

COMMAND = "python -m experiments.studies.memory_model"
TOLERANCE = 0.05  # relative to the measured peak
STEPS = 2  # the first checks the plan, the second is like all others


@dataclass(frozen=True)
class GridConfig:
    """Predicted and measured peaks over networks, batches, cuts, pairings and tail optimisers."""

    networks: tuple[str, ...] = ("lenet5", "resnet20", "vgg11", "pointnet")
    """Of experiments/studies/networks.py."""
    batches: tuple[int, ...] = (32, 256)
    """Samples a step, >= 1; of clouds an eighth, which have 30 times the memory."""
    optimizers: tuple[str, ...] = ("momentum", "adam")
    """Of the tail: sgd, momentum or adam."""
    device: str = "cpu"
    """cpu, cuda or cuda:<n>."""
    threads: int = 1
    """CPU threads of torch, >= 1."""
    out: Path = Path("runs/memory_model")
    """Folder of rows.json: a cell that is in it is not measured again by the same commit, on the
    same device with as many threads."""
    results: Path = RESULTS
    """Folder of memory_model.json."""


@dataclass(frozen=True)
class Case:
    """One cell of the grid; `method` None is a plain pass."""

    network: str
    batch: int
    method: str | None = None
    pairing: str = "stacked"
    optimizer: str = "momentum"


def cases(config: GridConfig) -> list[Case]:
    """Every combination; Full ZO has no tail optimiser and Full BP no pair."""
    found = []
    for network, batch in product(config.networks, config.batches):
        batch = max(batch // 8, 1) if network == "pointnet" else batch
        found.append(Case(network, batch))
        for method, pairing, optimizer in product(
            TAILS, ("stacked", "sequential"), config.optimizers
        ):
            if method == "full-zo" and optimizer != config.optimizers[0]:
                continue
            if method == "full-bp" and pairing == "sequential":
                continue
            found.append(Case(network, batch, method, pairing, optimizer))
    return found


def build(case: Case, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The network, and a batch for it."""
    make, size = NETWORKS[case.network]
    with device:
        return make(), torch.randn(case.batch, *size)


def predicted(case: Case, device: torch.device) -> int:
    """What the liveness model says."""
    net, x = build(case, device)
    if case.method is None:
        return inference_memory(net, x).bytes
    model = ElasticZO(net, TAILS[case.method], pairing=case.pairing, eps=1e-2)
    return training_memory(model, x, state_tensors=STATE_TENSORS[case.optimizer]).peak.bytes


def running(case: Case, device: torch.device) -> Callable[[], None]:
    """What is measured, from the making of the network on."""

    def plain() -> None:
        net, x = build(case, device)
        net.eval()
        with torch.no_grad():
            for _ in range(STEPS):
                net(x)

    def training() -> None:
        assert case.method is not None
        net, x = build(case, device)
        y = torch.zeros(case.batch, dtype=torch.int64, device=device)
        model = ElasticZO(net, TAILS[case.method], pairing=case.pairing, eps=1e-2).train()
        zo = ZOSGD(model, lr=1e-9)
        kind = torch.optim.Adam if case.optimizer == "adam" else torch.optim.SGD
        momentum = {"momentum": 0.9} if case.optimizer == "momentum" else {}
        tail = model.tail_optimizer(kind, lr=1e-9, **momentum)
        for _ in range(STEPS):
            losses = pair_losses(cross_entropy, model(x), y)
            model.backward(losses)
            tail.step()
            tail.zero_grad()
            zo.step(losses)

    return plain if case.method is None else training


def row_of(case: Case, device: torch.device, rehearse: bool = True) -> dict[str, Any]:
    """Both figures and their relative difference."""
    said = predicted(case, device)
    held = peak_of(running(case, device), device, rehearse)
    return {**vars(case), "predicted": said, "measured": held, "error": said / held - 1}


def check(config: GridConfig) -> None:
    """Raises: ValueError for what is not known."""
    unknown = set(config.networks) - set(NETWORKS) | set(config.optimizers) - set(STATE_TENSORS)
    if unknown:
        known = ", ".join((*NETWORKS, *STATE_TENSORS))
        raise ValueError(f"networks and optimizers must be of {known}, got {unknown}")
    if min(config.batches, default=0) < 1:
        raise ValueError(f"batches must be at least one number >= 1, got {config.batches}")


def measure(config: GridConfig, device: torch.device, console: Console) -> list[dict[str, Any]]:
    """A row for every case, of an earlier start where the same was measured then."""
    kept = config.out / "rows.json"
    made = made_on(device)
    found = read_checked(kept, "delete it, and all is measured anew") if kept.exists() else {}
    same = all(found.get(name) == value for name, value in made.items())
    before = found["rows"] if same else []
    done = {Case(**{f.name: row[f.name] for f in fields(Case)}): row for row in before}
    ready: set[str] = set()  # networks that ran in this process
    for case in tracked(cases(config), "cells", console):
        if case not in done:
            done[case] = row_of(case, device, rehearse=case.network not in ready)
            ready |= {case.network} if case.method else set()
            write_checked(kept, {**made, "rows": list(done.values())})
    return [done[case] for case in cases(config)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a network, batch and pairing: the largest error of its cells, in %."""
    shown = Table(box=None, pad_edge=False)
    for name in ("network", "batch", "cells", "largest error %"):
        shown.add_column(name, justify="left" if name == "network" else "right")
    for network, batch in dict.fromkeys((r["network"], r["batch"]) for r in rows):
        own = [r["error"] for r in rows if (r["network"], r["batch"]) == (network, batch)]
        worst = max(own, key=abs)
        shown.add_row(network, str(batch), str(len(own)), f"{100 * worst:+.3f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, write; 1 where a prediction is farther off than 5 %."""
    config = tyro.cli(GridConfig, args=arguments, prog=COMMAND)
    console = plain_console()

    def work() -> list[dict[str, Any]]:
        check(config)
        use_threads(config.threads)
        return measure(config, pick_device(config.device), console)

    def finish(rows: list[dict[str, Any]]) -> int:
        console.print(table(rows))
        error = max(abs(row["error"]) for row in rows)
        summary = {
            "command": f"{COMMAND}{options(config)}",
            "measure": "peak bytes of torch's allocator over two steps",
            "rows": rows,
            "largest_error": error,
            **made_on(pick_device(config.device)),
        }
        path = config.results / "memory_model.json"
        write_json(path, summary)
        console.print(f"written: {path}", markup=False)
        return 0 if error <= TOLERANCE else 1

    return run_command(work, finish, console)


if __name__ == "__main__":
    sys.exit(main())
