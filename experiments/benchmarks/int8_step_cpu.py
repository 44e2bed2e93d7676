"""A whole training step of LeNet-5 on the CPU: INT8 against FP32, time and memory.

`python -m experiments.benchmarks.int8_step_cpu` verifies, then times the steps of all methods in
one process and in turn, so that a drift of the machine meets all of them. On one thread the time is
that of the thread, which does not count when others have the core. FP32 runs in both memory
formats, Full BP also as plain torch, and the faster one is what INT8 is compared with. Beside the
steps: two plain passes alone, the stages of a step (experiments/studies/stages.py), and memory in
two models (experiments/benchmarks/int8_step_memory.py). JSON goes to
`experiments/results/int8_step_cpu.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from elasticzo.int8 import ElasticZOInt8, quantize
from experiments.benchmarks import int8_step_memory
from experiments.benchmarks.int8_steps import (
    FORMATS,
    PAIRINGS,
    Fp32Step,
    Int8Step,
    TorchStep,
    images,
    network,
    verify,
)
from experiments.commands import plain_console, tracked
from experiments.files import write_json
from experiments.studies import step_times
from experiments.studies.networks import TAILS
from experiments.timing import Timings, in_turn
from experiments.train.environment import made_on, use_threads

COMMAND = "python -m experiments.benchmarks.int8_step_cpu"
RESULT = Path(__file__).parent.parent / "results" / "int8_step_cpu.json"
PAPER = {"time": (1.38, 1.42), "memory": (1.46, 1.60)}  # ElasticZO-INT8 over FP32, its abstract
SETS = 4  # batches that the steps take in turn
WARM_UP = 5
Run = Callable[[int], object]  # gets the number of the round


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    batches: tuple[int, ...] = (32, 256)
    """Batch sizes."""
    rounds: int = 100
    """Timed rounds; each runs every contestant once."""
    threads: int = 1
    """CPU threads; set OMP_NUM_THREADS to as many."""
    out: Path = RESULT
    """Where the JSON goes."""
    reduced: bool = False
    """A rehearsal on small batches: its times are no measurements."""


def two_passes(model: nn.Module, x: Any) -> None:
    """What a zeroth-order step cannot do without, without noise."""
    with torch.no_grad():
        model(x)
        model(x)


# ---- time


def contestants(batch: int) -> dict[str, Run]:
    """All steps by name; round i takes batch i of `SETS`."""
    floats = [images(batch, seed) for seed in range(SETS)]
    integers = [(quantize(x), y) for x, y in floats]
    runs: dict[str, Run] = {}

    def add(name: str, call: Callable[..., object], sets: list[Any], labels: bool = True) -> None:
        runs[name] = lambda i: call(*sets[i % SETS][: 1 + labels])

    for name, memory_format in FORMATS.items():
        laid = [(x.to(memory_format=memory_format), y) for x, y in floats]
        plain = network().to(memory_format=memory_format).eval()  # type: ignore[call-overload]
        add(f"fp32 passes {name}", partial(two_passes, plain), laid, labels=False)
        add(f"torch full-bp {name}", TorchStep(memory_format), laid)
        for method in TAILS:
            add(f"fp32 {method} {name}", Fp32Step(method, memory_format, "stacked"), laid)
    model = ElasticZOInt8(network(), 0).eval()
    add("int8 passes", partial(two_passes, model), integers, labels=False)
    for method in TAILS:
        add(f"int8 {method}", Int8Step(method, "stacked"), integers)
    return runs


def measure(batch: int, config: Config, console: Console) -> Timings:
    """Seconds of each contestant, round by round."""
    clock = time.thread_time_ns if config.threads == 1 else time.perf_counter_ns
    rounds = tracked(range(config.rounds + WARM_UP), f"batch {batch}", console)
    return in_turn(contestants(batch), rounds, clock, WARM_UP)


def row(batch: int, method: str, timings: Timings) -> dict[str, Any]:
    """The speed-up of a step, of two passes alone, and what part of a step they are."""
    own = f"int8 {method}"
    step = timings.faster(*(f"fp32 {method} {name}" for name in FORMATS))
    passes = timings.faster(*(f"fp32 passes {name}" for name in FORMATS))
    found = {
        "batch": batch,
        "method": method,
        "fp32": {"what": step, **timings.row(step)},
        "int8": timings.row(own),
        "speedup": timings.ratio(step, own),
        "passes": {
            "fp32": {"what": passes, **timings.row(passes)},
            "int8": timings.row("int8 passes"),
            "speedup": timings.ratio(passes, "int8 passes"),
            "part_of_fp32_step": timings.ratio(passes, step)["median"],
            "part_of_int8_step": timings.ratio("int8 passes", own)["median"],
        },
        "speedup_over_two_fp32_passes": timings.ratio(passes, own),
    }
    if method == "full-bp":
        plain = timings.faster(*(f"torch full-bp {name}" for name in FORMATS))
        found["torch"] = {"what": plain, **timings.row(plain)}
        found["speedup_over_torch"] = timings.ratio(plain, own)
    return found


def stages(config: Config, console: Console) -> list[dict[str, Any]]:
    """What a step does: noise, forward, loss, tail backward, update, in both precisions."""
    given = step_times.BreakdownConfig(
        batches=config.batches, device="cpu", threads=config.threads, rounds=config.rounds
    )
    found = []
    for batch in config.batches:
        measured = step_times.measure(given, batch, console)
        found += [step_times.row(name, batch, timings) for name, timings in measured.items()]
    return found


# ---- report


def table(rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> Table:
    columns = ("batch", "method", "fp32 ms", "int8 ms", "faster", "passes alone", "smaller")
    shown = Table(*columns, "smaller, sequential", title="LeNet-5, INT8 against FP32")
    for one in rows:
        ratios = {
            m["pairing"]: f"{m['ratio']:.2f}x"
            for m in memory
            if (m["batch"], m["method"]) == (one["batch"], one["method"])
        }
        shown.add_row(
            str(one["batch"]),
            one["method"],
            *(f"{1e-3 * one[kind]['us']:.2f}" for kind in ("fp32", "int8")),
            f"{one['speedup']['median']:.2f}x",
            f"{one['passes']['speedup']['median']:.2f}x",
            *(ratios.get(pairing, "") for pairing in PAIRINGS),
        )
    return shown


def main(config: Config) -> None:
    use_threads(config.threads)
    console = plain_console()
    if config.reduced:
        config = replace(config, batches=(8,), rounds=3)
        console.print("reduced: these times are no measurements")
    pairings = PAIRINGS[:1] if config.reduced else PAIRINGS
    for method, form, pairing in product(TAILS, FORMATS.values(), pairings):
        verify(method, form, pairing)
    rows = []
    for batch in config.batches:
        timings = measure(batch, config, console)
        rows += [row(batch, method, timings) for method in TAILS]
    memory = int8_step_memory.rows((32,) if config.reduced else config.batches)
    console.print(table(rows, memory))
    written = {
        "command": COMMAND + (" --reduced" if config.reduced else ""),
        "meaning": " ".join((__doc__ or "").split()),
        "clock": "CPU time of the thread" if config.threads == 1 else "wall",
        "rounds": config.rounds,
        "seeds": list(range(SETS)),
        "paper": PAPER,
        "time": rows,
        "stages": stages(config, console),
        "memory": memory,
        "memory_meaning": " ".join((int8_step_memory.__doc__ or "").split()),
        "static": int8_step_memory.static_figures(),
        **made_on(torch.device("cpu")),
    }
    write_json(config.out, written)
    console.print(f"wrote {config.out}", markup=False)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
