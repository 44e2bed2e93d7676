"""Whether a change of the code kept every bit: each model of the zoo, trained in every form.

    python -m tests.same_bits record before.json            # on the code before the change
    python -m tests.same_bits compare before.json           # on the code after it, same machine

A run is a network of the zoo in a form (stacked, sequential; at once, deferred, captured; normals,
signs; floats, integers). What it leaves is digested part by part: weights and buffers, the states
of both optimisers, the trajectory log, what a replay of it gives. Only public names are used.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

from elasticzo import (
    ZOSGD,
    ElasticZO,
    TrajectoryLog,
    capture_step,
    pair_losses,
    read_trajectory,
    replay,
)
from elasticzo.int8 import ElasticZOInt8, Int8TrajectoryLog, Int8ZO, replay_int8
from tests.elasticzo.int8.nets import batch, fixed_weights, one_step, point_net, small_net
from tests.elasticzo.zoo import ZOO, Case, build, smooth_loss

STEPS = 20
Parts = dict[str, str]
FORMS: dict[str, dict[str, Any]] = {
    "at once": {},
    "deferred": {"defer": True},
    "captured": {"captured": True},
    "signs, reference": {"noise": "rademacher", "backend": "reference"},
}
# Triton's interpreter is slow: these have every fused layer between them.
INTERPRETED = ("residual_cnn", "conv1d", "input_twice", "padding", "small_net")
INT8_NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "small_net": (small_net, (1, 8, 8)),
    "point_net": (point_net, (3, 10)),
}
MODELS = ZOO | {"small_net": Case(small_net, lambda n: (torch.randn(n, 1, 8, 8),), tail=["6"])}


def digest(value: Any) -> str:
    """Of tensors, numbers and text in any nesting."""
    found = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            found.update(f"{x.dtype}{list(x.shape)}".encode())
            found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(x, dict):
            for key, inner in x.items():
                found.update(repr(key).encode())
                add(inner)
        elif isinstance(x, (list, tuple)):
            for inner in x:
                add(inner)
        else:
            found.update(repr(x).encode())

    add(value)
    return found.hexdigest()[:16]


def _log_text(path: Path) -> str:
    """The records of a log."""
    return "\n".join(map(json.dumps, read_trajectory(path)[1]))


def _groups(model: ElasticZO) -> list[dict[str, Any]]:
    first = next(iter(model.head_parameters()))
    return [{"params": [first], "lr": torch.tensor(2e-3), "weight_decay": 0.3}]


def run_float(case: Case, pairing: str, form: str, steps: int, folder: Path) -> Parts:
    """Digests of one run in floats."""
    how = dict(FORMS[form]) if form in FORMS else {"backend": form}
    captured, defer = how.pop("captured", False), how.pop("defer", False)
    net, inputs = build(case, batch=4, dtype=torch.float32)
    start = copy.deepcopy(net)
    settings = {"tail": case.tail, "pairing": pairing, "queries": 2, "seed": 7, "eps": 1e-2, **how}
    model = ElasticZO(net, **settings).train()
    groups = _groups(model)
    zo = ZOSGD(model, torch.tensor(1e-2), groups, clip=5.0, weight_decay=0.01, defer=defer)
    tail = None
    if model.cut.tail_parameters:
        tail = model.tail_optimizer(torch.optim.SGD, lr=torch.tensor(0.05), momentum=0.9)
    log = TrajectoryLog(folder / "log.jsonl", zo)
    losses = []
    if captured:
        try:
            step = capture_step(zo, smooth_loss, inputs, (), tail=tail)
        except RuntimeError as error:
            return {"refused": str(error)}
        losses = [step(inputs, ()).clone() for _ in range(steps)]
    else:
        for _ in range(steps):
            torch.manual_seed(3)  # models that draw from torch's generator
            here = pair_losses(smooth_loss, model(*inputs))
            model.backward(here)
            if tail is not None:
                tail.step()
                tail.zero_grad()
            zo.step(here)
            losses.append(here.detach().clone())
    log.drain()
    parts = {
        "weights": digest(model.state_dict()),
        "zo": digest(zo.state_dict()),
        "tail": digest(tail.state_dict() if tail is not None else None),
        "losses": digest(losses),
        "log": digest(_log_text(log.path)),
    }
    again = ElasticZO(start, **settings)
    replay(log.path, again)
    parts["replayed"] = digest(list(again.head_parameters()))
    return parts


def run_int8(name: str, pairing: str, tail: Any, steps: int, folder: Path, backend: str) -> Parts:
    """Digests of one run in integers."""
    make, shape = INT8_NETS[name]
    settings = {"tail": tail, "r_max": 7, "queries": 2, "seed": 3, "scale": {"*": 0.75}}
    if tail == "all":
        settings.pop("scale")

    def wrapped() -> ElasticZOInt8:
        how = {"pairing": pairing, "backend": backend, **settings}
        return ElasticZOInt8(fixed_weights(make()), **how)

    model = wrapped().train()
    zo, bp = Int8ZO(model, b_zo=2), model.tail_optimizer(b_bp=3)
    log = Int8TrajectoryLog(folder / "log.jsonl", zo)
    for i in range(steps):
        x, y = batch((4, *shape), 4, seed=i)
        one_step(model, zo, bp, x, y, source="mean")
    log.drain()
    again = wrapped()
    replay_int8(log.path, again)
    return {
        "weights": digest(model.state_dict()),
        "zo": digest(zo.state_dict()),
        "tail": digest(bp.state_dict()),
        "log": digest(_log_text(log.path)),
        "replayed": digest(list(again.head_parameters())),
    }


def float_runs(interpreted: bool) -> Iterator[tuple[str, str, str]]:
    """(model, pairing, form) of the float runs."""
    for name, case in MODELS.items():
        for pairing in case.pairings:
            yield from ((name, pairing, form) for form in FORMS)
            if interpreted and name in INTERPRETED:
                yield name, pairing, "triton"


def int8_runs() -> Iterator[tuple[str, str, Any]]:
    """(network, pairing, tail) of the integer runs."""
    for name in INT8_NETS:
        for pairing in ("stacked", "sequential"):
            yield from ((name, pairing, tail) for tail in (0, 1, "all"))


def measure(steps: int) -> dict[str, Parts]:
    """Digests of all runs, by name."""
    from rich.progress import track

    found = {}
    floats, integers = list(float_runs(interpreted=True)), list(int8_runs())
    with tempfile.TemporaryDirectory() as top, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, pairing, form in track(floats, "floats"):
            folder = Path(tempfile.mkdtemp(dir=top))
            n = min(steps, 2) if form == "triton" else steps
            found[f"{name}, {pairing}, {form}"] = run_float(MODELS[name], pairing, form, n, folder)
        for name, pairing, tail in track(integers, "integers"):
            for backend in ("reference", "numba"):
                folder = Path(tempfile.mkdtemp(dir=top))
                parts = run_int8(name, pairing, tail, steps, folder, backend)
                found[f"{name}, {pairing}, int8, tail={tail}, {backend}"] = parts
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="JSON with the digests")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run")
    args = parser.parse_args()
    if args.what == "record":
        args.file.write_text(json.dumps(measure(args.steps), indent=1))
        return 0
    before, after = json.loads(args.file.read_text()), measure(args.steps)
    different = [
        f"{run}: {', '.join(k for k in before[run] if before[run][k] != after[run].get(k))}"
        for run in before
        if before[run] != after.get(run)
    ]
    print("\n".join(different) or f"{len(before)} runs, every bit the same")
    return bool(different)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
