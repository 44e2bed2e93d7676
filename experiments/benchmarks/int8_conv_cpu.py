"""LeNet-5's layers in int8 against fp32 on the CPU: products, ReLU, pooling, range, requantisation.

`python -m experiments.benchmarks.int8_conv_cpu` verifies, then times each layer on one thread. The
contestants run in turn, so that a drift of the machine meets all of them; a speed-up is the median
over rounds of the time of the faster fp32 form (contiguous or channels_last) over the int8 one's.
On one thread time is that of the thread, which does not count when others have the core; on more it
is the clock's. JSON goes to `experiments/results/int8_conv_cpu.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from experiments.files import write_json
from experiments.timing import in_turn
from experiments.train.environment import made_on, use_threads
from zo_kernels import (
    int8_paired_conv2d,
    int8_paired_linear,
    int8_requantize,
    paired_conv2d,
    paired_linear,
)

COMMAND = "python -m experiments.benchmarks.int8_conv_cpu"
RESULT = Path(__file__).parent.parent / "results" / "int8_conv_cpu.json"
NOISE = {"tensor": 0, "p_zero": 0.33, "r_max": 15}
# Input and weight of a sample; convolutions are padded by 2, rectified and pooled.
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "conv1": ((1, 28, 28), (6, 1, 5, 5)),
    "conv2": ((6, 14, 14), (16, 6, 5, 5)),
    "fc1": ((784,), (120, 784)),
}
WARM_UP = 10  # rounds: compilation, caches
Run = Callable[[], object]


@dataclass
class Config:
    """Settings of the benchmark."""

    batches: tuple[int, ...] = (32, 256)
    """Batch sizes."""
    rounds: int = 200
    """Timed rounds; each runs every contestant once."""
    threads: int = 1
    """CPU threads; set OMP_NUM_THREADS to as many."""
    out: Path = RESULT
    """Where the JSON goes."""


def fp32_layer(x: Tensor, w: Tensor) -> Tensor:
    if w.ndim == 2:
        return F.relu(F.linear(x, w))
    return F.max_pool2d(F.relu(F.conv2d(x, w, padding=2)), 2)


def int8_layer(
    x: Tensor, w: Tensor, key: Tensor | None, halves: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Accumulators and the bits of their range."""
    given: dict[str, Any] = {"stop": halves, "relu": True, "backend": backend} | NOISE
    if w.ndim == 2:
        return int8_paired_linear(x, w, key, **given)
    return int8_paired_conv2d(x, w, key, padding=2, pool=True, **given)


def requantized(x: Tensor, w: Tensor, key: Tensor | None, halves: int, exponent: Tensor) -> Tensor:
    acc, bits = int8_layer(x, w, key, halves)
    q, _ = int8_requantize(acc, bits, exponent, halves=halves)
    return q


def fp32_pair(x: Tensor, w: Tensor, key: Tensor) -> Tensor:
    """What the float method does for this layer, noise included."""
    eps = torch.tensor(1e-3, dtype=torch.float64)
    if w.ndim == 2:
        return paired_linear(x, w, None, key, eps, tensor=0, relu=True)
    return paired_conv2d(x, w, None, key, eps, tensor=0, padding=2, relu=True, pool=True)


def operands(name: str, rows: int) -> tuple[Tensor, Tensor]:
    size, shape = LAYERS[name]
    x = torch.randint(0, 128, (rows, *size), dtype=torch.int8)
    return x, torch.randint(-127, 128, shape, dtype=torch.int8)


def last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last)


def verify() -> None:
    """Refuse to time what is wrong: sums are those of float64, bits those of the reference."""
    key = torch.tensor([1, 2])
    for name in LAYERS:
        x, w = operands(name, 6)
        for x_in in (x, last(x)) if x.ndim == 4 else (x,):
            acc, _ = int8_layer(x_in, w, None, 1, "numba")
            if not torch.equal(acc.double(), fp32_layer(x.double(), w.double())):
                raise SystemExit(f"the sums of {name} are wrong")
            found, want = (int8_layer(x_in, w, key, 2, b) for b in ("numba", "reference"))
            if not all(map(torch.equal, found, want)):
                raise SystemExit(f"the backends differ in {name}")


def contestants(name: str, batch: int) -> dict[str, Run]:
    """One plain pass of B rows (`plain_`), and the pair of 2B with its noise (`pair_`)."""
    torch.manual_seed(0)
    key, exponents = torch.tensor([0, 0]), torch.tensor([-7, -7], dtype=torch.int32)
    (x, w), (x2, _) = operands(name, batch), operands(name, 2 * batch)
    formats: dict[str, Callable[[Tensor], Tensor]] = {"": lambda t: t}
    if w.ndim == 4:
        formats["_channels_last"] = last
    runs: dict[str, Run] = {}
    for suffix, laid in formats.items():
        args, args2 = (laid(x), w, None, 1), (laid(x2), w, key, 2)
        runs[f"plain_fp32{suffix}"] = partial(fp32_layer, laid(x.float()), laid(w.float()))
        runs[f"plain_int8{suffix}"] = partial(int8_layer, *args)
        runs[f"plain_int8_requantized{suffix}"] = partial(requantized, *args, exponents[0:1])
        runs[f"pair_fp32{suffix}"] = partial(fp32_pair, laid(x2.float()), laid(w.float()), key)
        runs[f"pair_int8_requantized{suffix}"] = partial(requantized, *args2, exponents)
    return runs


def measure(
    name: str, batch: int, rounds: int, clock: Callable[[], int]
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each contestant, and speed-ups over the faster fp32 one."""
    runs = {run: (lambda i, call=call: call()) for run, call in contestants(name, batch).items()}
    with torch.no_grad():
        times = in_turn(runs, range(rounds + WARM_UP), clock, WARM_UP)
    speedups = {}
    for run in (run for run in runs if "int8" in run):
        kind = run.split("_")[0]
        best = times.faster(*(r for r in runs if r.startswith(f"{kind}_fp32")))
        speedups[run] = round(times.ratio(best, run)["median"], 2)
    return {"ms": {run: round(1e3 * times.median(run), 4) for run in runs}, "speedup": speedups}


def main(config: Config) -> None:
    use_threads(config.threads)
    verify()
    clock = time.thread_time_ns if config.threads == 1 else time.perf_counter_ns
    layers = {}
    for batch in config.batches:
        for name in LAYERS:
            layers[f"{name}-{batch}"] = row = measure(name, batch, config.rounds, clock)
            print(f"{name}, batch {batch}")
            for run, ms in row["ms"].items():
                speedup = row["speedup"].get(run)
                print(f"  {run:40} {ms:8.3f} ms" + (f"  {speedup:.2f}x" if speedup else ""))
    written = {
        "command": COMMAND,
        **made_on(torch.device("cpu")),
        "rounds": config.rounds,
        "layers": layers,
    }
    write_json(config.out, written)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
