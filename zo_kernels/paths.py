"""Fused or staged: which path a layer takes, by a roofline of the device.

Fused, every block of BM rows makes the noise of the weights anew; staged, it is made once, but the
halves are written and read. With N x K weights, M rows a half and Q queries:

    fused  = max(bytes / memory, Q ceil(M / BM) N K a / alu + 4 Q M N K / (f peak))
    staged = max((w + 2 Q c) N K / memory, Q N K a' / alu) + max(bytes, 4 Q M N K / (v peak))

a and a' are the instructions that an element of noise costs in each (experiments/results/static),
c the bytes of a staged weight, f and v the parts of the peak that our products and the vendor's
reach. `python -m experiments.benchmarks --only paths` measures where the two lines cross.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from zo_kernels.triton.linear import tile_for

PATHS = ("auto", "fused", "staged")


@dataclass(frozen=True)
class Device:
    """What a roofline needs: bytes, operations and lane instructions a second.

    Attributes:
        alu: instructions of 32 lanes' lanes: SMs * 128 * clock.
    """

    memory: float
    bf16: float
    tf32: float
    fp32: float
    alu: float
    sms: int


# Data-sheet values (dense, boost clock); what matters to the choice are their ratios.
DEVICES = {
    "H200": Device(4.8e12, 989e12, 494e12, 67e12, 132 * 128 * 1.98e9, 132),
    "H100": Device(3.35e12, 989e12, 494e12, 67e12, 132 * 128 * 1.98e9, 132),
    "A100": Device(2.0e12, 312e12, 156e12, 19.5e12, 108 * 128 * 1.41e9, 108),
    "B200": Device(8.0e12, 2250e12, 1125e12, 75e12, 148 * 128 * 1.96e9, 148),
    "MI300X": Device(5.3e12, 1307e12, 653e12, 163e12, 304 * 128 * 2.1e9, 304),
}
LAUNCH = 2e-6  # seconds a kernel costs in a captured graph, whatever it does
# Lane instructions an element of noise, in the loop of the products and in the staging sweep.
FUSED_NOISE = {"normal": 60.0, "rademacher": 27.0}
STAGED_NOISE = {"normal": 56.0, "rademacher": 31.0}
# Parts of the peak: of our products, of the vendor's. fp32 has no tensor core to feed.
FUSED_PART = {"bf16": 0.55, "tf32": 0.55, "tf32x3": 0.55, "ieee": 0.4}
VENDOR_PART = {"bf16": 0.75, "tf32": 0.75, "tf32x3": 0.8, "ieee": 0.8}


@dataclass(frozen=True)
class Work:
    """A layer's call: M rows a half, N outputs, K inputs, Q queries.

    Attributes:
        x, y: elements of input and output a half.
        shared: whether all halves read one x.
        noise: "normal" or "rademacher".
        x_dtype, w_dtype, compute: of input, weight and product.
        precision: of fp32 products.
        half: one half alone runs (sequential pairing).
        convolution: its tiles have 128 rows at the most; staged, the library is called once a half
            and the outputs are joined, which reads and writes them again.
    """

    rows: int
    outputs: int
    inputs: int
    queries: int
    x: int
    y: int
    shared: bool
    noise: str
    x_dtype: torch.dtype
    w_dtype: torch.dtype
    compute: torch.dtype
    precision: str = "ieee"
    half: bool = False
    convolution: bool = False

    @property
    def halves(self) -> int:
        return 1 if self.half else 2 * self.queries


def device_named(name: str) -> Device:
    """The device whose name is in `name`; an H100 where none is known."""
    return next((d for known, d in DEVICES.items() if known in name), DEVICES["H100"])


@cache
def _device(index: int | None) -> Device:
    if not torch.cuda.is_available():
        return DEVICES["H200"]
    return device_named(torch.cuda.get_device_name(index))


def seconds(work: Work, device: Device) -> dict[str, float]:
    """Predicted seconds of each path."""
    kind = "bf16" if work.compute == torch.bfloat16 else work.precision
    peak = {"bf16": device.bf16, "tf32": device.tf32, "tf32x3": device.tf32 / 3}
    weights, halves = work.outputs * work.inputs, work.halves
    queries = 1 if work.half else work.queries
    products = 2.0 * halves * work.rows * weights / peak.get(kind, device.fp32)
    x_bytes = work.x * (1 if work.shared else halves) * work.x_dtype.itemsize
    activations = x_bytes + work.y * halves * work.compute.itemsize
    tile = tile_for(work.rows, work.x_dtype, work.w_dtype, work.compute, work.precision)
    tile_rows, tile_cols = tile.rows, tile.cols
    if work.convolution:
        tile_rows, tile_cols = (64 if work.rows <= 64 else 128), min(64, work.outputs)
    blocks = -(-work.rows // tile_rows)
    programs = queries * blocks * -(-work.outputs // tile_cols)
    busy = min(1.0, programs / device.sms)  # few programs leave multiprocessors idle
    filled = work.rows / (blocks * tile_rows) if blocks else 1.0
    noise = queries * blocks * weights * FUSED_NOISE[work.noise] / device.alu
    fused = max(
        (activations + weights * work.w_dtype.itemsize) / device.memory,
        (noise + products / (FUSED_PART[kind] * filled)) / max(busy, 1e-9),
    )
    written = halves * work.compute.itemsize * weights
    staging = max(
        (weights * work.w_dtype.itemsize + written) / device.memory,
        queries * weights * STAGED_NOISE[work.noise] / device.alu,
    )
    vendor = max((activations + written) / device.memory, products / VENDOR_PART[kind])
    calls = 2
    if work.convolution and halves > 1 and not work.shared:
        vendor += 2.0 * halves * work.y * work.compute.itemsize / device.memory
        calls = 2 + halves
    return {"fused": fused + LAUNCH, "staged": staging + vendor + calls * LAUNCH}


def choose(work: Work, index: int | None = None) -> str:
    """The faster path for this work on CUDA device `index`: "fused" or "staged".

    >>> few = Work(16, 4096, 4096, 1, 16 * 4096, 16 * 4096, False, "normal",
    ...            torch.bfloat16, torch.bfloat16, torch.bfloat16)
    >>> choose(few)
    'fused'
    """
    predicted = seconds(work, _device(index))
    return "fused" if predicted["fused"] <= predicted["staged"] else "staged"
