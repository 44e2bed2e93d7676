"""Relative error of the projected gradient `g` against float64, for each compute dtype and eps.

`error` is that of the arithmetic: against float64 with the same noise and the same eps.
`error_of_slope` is against the derivative along z, by autograd in float64: a large eps adds the
curvature of the loss to it. Both are root mean squares over directions, over that of what is exact.

On a GPU the kernels run (`computed` is "kernel", both paths). On the CPU the reference does:
"ieee" and "bf16" round there as the kernels round, and "tf32", "tf32x3" cut operands off as tensor
cores do; sums are taken in another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from elasticzo import ElasticZO, pair_losses
from elasticzo.models import VGG11, LeNet5
from experiments.benchmarks.models import Subject, mlp
from experiments.benchmarks.section import Bench, Refused, Row, usable
from zo_kernels import reference

COMPUTE: dict[str, torch.dtype | str] = {
    "ieee": "ieee",
    "tf32x3": "tf32x3",
    "tf32": "tf32",
    "bf16": torch.bfloat16,
}
EPSS = (1e-3, 1e-2, 1e-1)
SEED = 11
IEEE_BOUND = 1e-4  # over eps: the rounding of the losses is divided by 2 eps


def networks(reduced: bool) -> list[Subject]:
    """LeNet-5 as it is, also on the CPU."""
    found = [Subject("lenet5", "LeNet-5", LeNet5, (1, 28, 28), 10)]
    if not reduced:
        found.append(Subject("mlp", "MLP 1024x4", lambda: mlp(1024, 4), (1024,), 1024))
        found.append(Subject("vgg", "VGG-11, width 64", VGG11, (3, 32, 32), 10, True))
    return found


def projected(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    queries: int,
    compute: torch.dtype | str | None,
    backend: str,
    path: str,
) -> Tensor:
    """`g_q` of one batch along `queries` directions, in float64."""
    model = ElasticZO(
        net,
        tail=0,
        eps=eps,
        queries=queries,
        seed=SEED,
        compute_dtype=compute,
        backend=backend,
        path=path,
    ).train()
    with torch.no_grad():
        losses = pair_losses(F.cross_entropy, model(x), y).double()
    return (losses[0::2] - losses[1::2]) / (2 * eps)


def slopes(net: nn.Module, x: Tensor, y: Tensor, queries: int) -> Tensor:
    """The derivative of the loss along each z, in float64."""
    key = torch.tensor([SEED, 0], device=x.device)
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    found = torch.zeros(queries, dtype=torch.float64, device=x.device)
    for tensor, grad in enumerate(grads):
        for query in range(queries):
            z = reference.sample(grad.shape, key, tensor=tensor, query=query)
            found[query] += (grad * z).sum()
    return found


def relative(came: Tensor, exact: Tensor) -> float:
    """Root mean square over directions."""
    return float((came - exact).norm() / exact.norm())


def measure(
    bench: Bench, subject: Subject, batch: int, queries: int, eps: float, slope: Tensor
) -> list[Row]:
    """One eps: all compute dtypes."""
    device = bench.device
    x, y = subject.inputs(batch, device, torch.float32, 0)
    wide = subject.make(device, torch.float64)
    exact = projected(wide, x.double(), y, eps, queries, None, "reference", "staged")
    rows = []
    computed = "kernel" if bench.cuda else "reference"
    for name, compute in COMPUTE.items():
        if torch.version.hip and name == "tf32x3":
            continue
        for path in ("fused", "staged") if bench.cuda else ("fused",):
            if name == "tf32x3" and path == "staged":
                continue  # the vendor has none: it would be "ieee"
            net = subject.make(device, torch.float32)
            backend = bench.backend if bench.cuda else "reference"
            about: Row = {"compute": name, "path": path, "computed": computed}
            try:
                g = projected(net, x, y, eps, queries, compute, backend, path)
            except ValueError as error:
                if "vanishes" not in str(error):
                    raise
                rows.append({**about, "skipped": str(error)})
                continue
            if not bool(torch.isfinite(g).all()):
                raise Refused(f"g is not finite for {name}, eps {eps:g}")
            errors = {"error": relative(g, exact), "error_of_slope": relative(g, slope)}
            rows.append({**about, **errors})
    full = [row["error"] for row in rows if row["compute"] == "ieee" and "error" in row]
    bound = IEEE_BOUND / eps
    if not all(error <= bound for error in full):
        raise Refused(f"g in ieee arithmetic is off by {max(full):.3g}, allowed {bound:.3g}")
    return rows


def run(bench: Bench) -> Row:
    """Every network and eps."""
    batch, queries = (16, 4) if bench.reduced else (256, 8)
    rows = []
    for subject in networks(bench.reduced):
        x, y = subject.inputs(batch, bench.device, torch.float32, 0)
        wide = subject.make(bench.device, torch.float64)
        slope = slopes(wide, x.double(), y, queries)
        for eps in EPSS:
            found: list[Row] = []

            def one(subject: Subject = subject, eps: float = eps, to: list[Row] = found) -> Row:
                to += measure(bench, subject, batch, queries, eps, slope)  # noqa: B023
                return {}

            cell = {"model": subject.name, "eps": eps, "batch": batch, "directions": queries}
            state = bench.case(f"precision {subject.what}, eps {eps:g}", one, clean=True)
            rows += [{**cell, **row} for row in found] or [{**cell, **state}]
    return {"rows": rows, "meaning": " ".join((__doc__ or "").split())}


def table(result: Row) -> Table:
    """Errors of g against float64, a column an eps."""
    found = Table("model", "compute", "path", "computed by", *(f"eps {eps:g}" for eps in EPSS))
    rows = usable(result["rows"], "error")
    keys = ("model", "compute", "path", "computed")
    for cell in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        own = {r["eps"]: r["error"] for r in rows if tuple(r[key] for key in keys) == cell}
        found.add_row(*cell, *(f"{own[eps]:.1e}" if eps in own else "" for eps in EPSS))
    return found
