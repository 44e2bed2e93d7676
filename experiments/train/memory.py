"""Peak memory of a method's training step, measured and not guessed.

On the CPU every allocation of torch's allocator is recorded by its profiler while a fresh run of
the method does a few steps: weights, one batch, activations, gradients, optimiser state, scratch.
Not counted: what the allocator does not see (the interpreter, the libraries), and the data set with
the order of its samples.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from elasticzo.data import ImageData
from experiments.train.config import TrainConfig
from experiments.train.data import Samples, load_data
from experiments.train.inputs import BatchOrder
from experiments.train.learner import FloatLearner

STEPS = 3  # the optimiser's state appears in the first, is held in the others
MEASURE_CPU = "peak bytes in torch's CPU allocator over three steps, data set left out"
MEASURE_CUDA = "torch.cuda.max_memory_allocated over three steps, data set left out"


def measure_step(config: TrainConfig) -> dict[str, Any]:
    """Peak bytes of a few training steps of a resolved configuration, and what was measured."""
    data = load_data(config)
    device = torch.device(config.device)
    # An epoch's order has 8 bytes a sample, more than a small step holds: it is the data set's.
    order = BatchOrder(len(data.train_x), config.batch_size, config.seed, device)
    order(0)
    measure = MEASURE_CUDA if device.type == "cuda" else MEASURE_CPU
    return {"bytes": peak_of(lambda: _steps(config, data, order), device), "measure": measure}


def peak_of(run: Callable[[], object], device: torch.device, rehearse: bool = True) -> int:
    """The most bytes that torch's allocator holds at once in a second call of `run`, above what was
    there before; in the first where the like of it ran already (`rehearse=False`)."""
    if device.type != "cuda":
        return recorded_peak(run, rehearse)
    if rehearse:
        run()  # handles and workspaces of libraries are there before
    gc.collect()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def recorded_peak(run: Callable[[], object], rehearse: bool = True) -> int:
    """The most bytes that torch's CPU allocator gives out at once in a second call of `run`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks of its own start and stop
    if rehearse:
        run()  # compiled and cached things are there before
    gc.collect()  # what is freed while recording must have been recorded
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return _peak(recorded)


def _steps(config: TrainConfig, data: Samples, order: BatchOrder) -> None:
    # The statistics of the data are not part of a step: computed before anything is recorded.
    assert not isinstance(data, ImageData) or data.std > 0
    learner = FloatLearner(replace(config, epochs=1), data)
    learner.inputs.order = order
    for _ in range(STEPS):
        learner.step()


def _peak(recorded: Any) -> int:
    """The most bytes held at once, of the profiler's list of allocations and frees."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moves = [e for e in events if e.get("name") == "[memory]"]
    moves.sort(key=lambda e: float(e["ts"]))
    held = peak = 0
    for move in moves:
        held += int(move["args"]["Bytes"])
        peak = max(peak, held)
    return peak
