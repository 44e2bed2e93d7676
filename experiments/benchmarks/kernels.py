"""Each kernel against its floor, from peaks that were measured on the device first.

The floor of a call is the largest of: its bytes over the rate of a device-to-device copy (bytes
read and written), its operations over the rate of a large matrix product of the same kind, and its
elements of noise times the instructions of one (static count) over the rate at which the device
issues them (data sheet). `fraction` is the floor over the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from elasticzo.forward.precision import vendor_precision
from experiments.benchmarks.cases import Case
from experiments.benchmarks.kernel_cases import all_cases
from experiments.benchmarks.section import Bench, Refused, Row, require, usable
from experiments.timing import Contestant, Graphed, cache_bytes, sets_for
from zo_kernels.paths import device_named

COPIED = 1 << 30
PRODUCT = 8192
PRODUCTS = {"bf16": "tf32", "tf32": "tf32", "fp32": "ieee"}  # and the vendor's precision


def peaks(bench: Bench) -> Row:
    """Bytes and operations a second that this device reaches, and what they were measured on."""
    device = bench.device
    size, width = (1 << 16, 64) if bench.reduced else (COPIED, PRODUCT)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = bench.times({"copy": lambda i: target.copy_(source)})
    if not torch.equal(source, target):
        raise Refused("the copy differs from its source")
    rates = {"memory": 2 * size / found.median("copy")}
    for name, precision in PRODUCTS.items():
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        out = torch.full_like(a, torch.nan)

        def multiply(i: int, a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            torch.mm(a, b, out=out)

        with vendor_precision(device, precision):
            multiply(0)
            exact = a[:64].double() @ b.double()
            require(f"the {name} product", out[:64], exact, 1e-2)
            found = bench.times({name: multiply})
        rates[name] = 2 * width**3 / found.median(name)
    model = device_named(torch.cuda.get_device_name(device) if bench.cuda else "H200")
    return {**rates, "issue": model.alu, "copied_bytes": size, "product": [width] * 3}


def floor_of(case: Case, rates: Row) -> Row:
    """Seconds that each unit needs at the least, and which needs most."""
    parts = {
        "memory": case.bytes / rates["memory"],
        "products": case.flops / rates[case.kind],
        "noise": case.elements * case.instructions / rates["issue"],
    }
    bound = max(parts, key=lambda unit: parts[unit])
    return {
        "floor_us": 1e6 * parts[bound],
        "bound": bound,
        **{f"{unit}_us": 1e6 * seconds for unit, seconds in parts.items()},
    }


def time_case(bench: Bench, case: Case, rates: Row | None) -> Row:
    """Verify one set of inputs, then time a graph that walks through several."""
    torch.manual_seed(0)
    first = case.make()
    error = bench.check(lambda: case.verify(first))
    count = sets_for(case.bytes, bench.device) if bench.part is None else 1
    sets = [first, *(case.make() for _ in range(count - 1))]

    def all_sets(run: Callable[[Any], Any]) -> Callable[[], object]:
        return lambda: [run(one) for one in sets][-1]

    kernel = Graphed(all_sets(case.run), bench.device)
    runs: dict[str, Contestant] = {"kernel": kernel, "kernel_again": kernel}
    if case.vendor is not None:
        with vendor_precision(bench.device, case.precision):
            vendor = Graphed(all_sets(case.vendor), bench.device)
        runs["vendor"] = vendor
    times = bench.times(runs, seconds=0.25)
    assert rates is not None
    row = times.row("kernel")
    for key in ("us", "us_20", "us_80"):
        row[key] /= count
    seconds = row["us"] * 1e-6
    floor = floor_of(case, rates)
    found: Row = {
        "error": error,
        "time": row,
        "spread": times.ratio("kernel_again", "kernel"),
        "bytes": case.bytes,
        "operations": case.flops,
        "noise_elements": case.elements,
        "gb_s": case.bytes / seconds / 1e9,
        "tflop_s": case.flops / seconds / 1e12,
        **floor,
        "fraction": floor["floor_us"] / row["us"],
        "sets": count,
        "in_cache": count * case.bytes < 2 * cache_bytes(bench.device),
    }
    if case.vendor is not None:
        found["vendor"] = case.vendor_what
        found["vendor_over_kernel"] = times.ratio("vendor", "kernel")
    return found


def run(bench: Bench) -> Row:
    """The peaks, then all cases."""
    rates: Row | None = None
    if bench.part is None:
        rates = bench.case("peaks", lambda: peaks(bench))
        if "memory" not in rates:  # nothing to compare with
            return {"peaks": rates, "rows": [], "meaning": " ".join((__doc__ or "").split())}
    rows = []
    for case in all_cases(bench):
        label = f"{case.kernel} {case.name}"
        row = bench.case(label, lambda case=case: time_case(bench, case, rates))  # type: ignore[misc]
        rows.append({"kernel": case.kernel, "case": case.name, **row})
    return {"peaks": rates, "rows": rows, "meaning": " ".join((__doc__ or "").split())}


def table(result: Row) -> Table:
    """For each kernel the parts of the floor that its calls reach."""
    found = Table("kernel", "calls", "% of floor: median", "least", "which call", "bound", "us")
    rows = usable(result["rows"], "fraction")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = sorted((r for r in rows if r["kernel"] == kernel), key=lambda r: float(r["fraction"]))
        least, middle = own[0], own[len(own) // 2]
        parts = [f"{100 * row['fraction']:.3g}" for row in (middle, least)]
        time = f"{least['time']['us']:.4g}"
        found.add_row(kernel, str(len(own)), *parts, least["case"], least["bound"], time)
    return found
