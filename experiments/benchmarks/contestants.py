"""Who takes part in the step section: plain inference, the ElasticZO step, the MeZO-style loop;
each with what it must give, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from elasticzo import ZOSGD, ElasticZO, capture_step, pair_losses
from elasticzo.forward.precision import precision_of
from experiments.benchmarks.models import MeZOLoop, Subject, products, weight_scale
from experiments.benchmarks.section import BOUNDS, Bench, Refused, Row, require
from experiments.timing import Contestant, Graphed
from zo_kernels import reference

Sets = Sequence[tuple[Tensor, Tensor]]
ROWS = 16  # different ones in a batch that is verified; the others repeat them
COMPARED = 1024  # rows compared at each end of a batch; all are looked at for NaN
IDLE = 1e-12  # learning rate while a step is timed


@dataclass(frozen=True)
class Variant:
    """A form of the step; `tail` 0 is Full ZO, 1 is ZO-Feat-Cls1."""

    tail: int
    noise: str
    defer: bool = False
    eager: bool = False
    mezo: bool = False  # the MeZO-style loop runs beside it

    @property
    def name(self) -> str:
        method = "full-zo" if self.tail == 0 else f"cls{self.tail}"
        return f"{method}-{self.noise}" + ("-deferred" if self.defer else "")


class Plain:
    """Two inference passes: over B rows each, and one over 2B."""

    def __init__(self, subject: Subject, bench: Bench, sets: Sets):
        self.net = subject.make(bench.device, sets[0][0].dtype).eval().requires_grad_(False)
        self.sets = [x for x, _ in sets]
        self.batch = self.sets[0].shape[0]
        self.x = self.sets[0].clone()
        self.x2 = subject.formatted(torch.cat([self.x, self.x]))
        self.pool = torch.cuda.graph_pool_handle() if bench.cuda else None
        self.two = Graphed(self._two, bench.device, self.pool)
        self.double = Graphed(self._double, bench.device, self.pool)

    @torch.no_grad()
    def _two(self) -> tuple[Tensor, Tensor]:
        return self.net(self.x), self.net(self.x)

    @torch.no_grad()
    def _double(self) -> Any:
        return self.net(self.x2)

    def two_passes(self, i: int) -> object:
        self.x.copy_(self.sets[i % len(self.sets)])
        return self.two()

    def one_double(self, i: int) -> object:
        x = self.sets[i % len(self.sets)]
        self.x2[: self.batch].copy_(x)
        self.x2[self.batch :].copy_(x)
        return self.double()

    def verify(self, x: Tensor, rows: int, bound: float) -> None:
        with torch.no_grad():
            exact = copy.deepcopy(self.net).double()(x[:rows].double())
        self.x.copy_(x)
        self.x2.copy_(torch.cat([x, x]))
        for what, run in (("two passes", self.two), ("one double pass", self.double)):
            for output in pytree.tree_leaves(run.output):
                if isinstance(output, Tensor):  # of a graph: the memory that it writes
                    output.fill_(math.nan)
            run()
            outputs = run.output if isinstance(run.output, tuple) else run.output.chunk(2)
            for came in outputs:
                compare(what, came, exact, bound)


class Step:
    """An ElasticZO step, eager or captured, and what it must give."""

    def __init__(self, subject: Subject, bench: Bench, variant: Variant, sets: Sets) -> None:
        self.subject, self.bench, self.variant, self.sets = subject, bench, variant, sets
        device, dtype = bench.device, sets[0][0].dtype
        self.net = subject.make(device, dtype)
        self.eps = weight_scale(self.net)
        self.model = ElasticZO(
            self.net,
            tail=variant.tail,
            eps=self.eps,
            noise=variant.noise,
            backend=bench.backend,
        ).train()
        self.lr = torch.tensor(IDLE, dtype=torch.float64, device=device)
        self.zo = ZOSGD(self.model, lr=self.lr, defer=variant.defer)
        self.tail: torch.optim.Optimizer | None = None
        if variant.tail:
            rate = torch.tensor(IDLE, device=device)
            self.tail = self.model.tail_optimizer(torch.optim.SGD, lr=rate)
        self.logits: Tensor | None = None
        self.replay: Contestant | None = None  # of the captured graph, without its checks

    def eager(self, i: int) -> Tensor:
        return self.step(*self.sets[i % len(self.sets)])

    def step(self, x: Tensor, y: Tensor, keep: bool = False) -> Tensor:
        if self.tail is not None:
            self.tail.zero_grad(set_to_none=True)
        logits = self.model(x)
        if keep:
            self.logits = logits.detach()
        losses = pair_losses(F.cross_entropy, logits, y)
        self.model.backward(losses)
        if self.tail is not None:
            self.tail.step()
        self.zo.step(losses)
        return losses.detach()

    def captured(self) -> Contestant:
        """The step in a graph, verified."""
        step = capture_step(self.zo, F.cross_entropy, *self.sets[0], tail=self.tail)
        if step.graph is not None:
            graph = step.graph
            self.replay = lambda i: graph.replay()

        def poisoned_step(x: Tensor, y: Tensor) -> Tensor:
            if step.captured:
                step.losses.fill_(math.nan)
            return step(x, y)

        self.bench.check(lambda: self.verify(poisoned_step))
        return lambda i: step(*self.sets[i % len(self.sets)])

    # ---- what it must give

    def noise(self) -> dict[str, Tensor]:
        """z of every head parameter, of the reference."""
        device = self.bench.device
        key = torch.tensor([self.model.seed, self.model.step_index], device=device)
        places = {name: i for i, (name, _) in enumerate(self.net.named_parameters())}
        return {
            name: reference.sample(p.shape, key, tensor=places[name], noise=self.variant.noise)
            for name, p in self.model.named_head_parameters()
        }

    @torch.no_grad()
    def expected(self, x: Tensor, z: dict[str, Tensor]) -> Tensor:
        """Logits `[2, rows, classes]` of both halves in float64."""
        wide = copy.deepcopy(self.net).double().train()
        weights = dict(wide.named_parameters())
        halves = []
        for sign in (1.0, -1.0):
            moved = {n: w + sign * self.eps * z[n] if n in z else w for n, w in weights.items()}
            halves.append(functional_call(wide, moved, (x.double(),)))
        return torch.stack(halves)

    def verify(self, step: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        """One step against float64: logits where they can be seen, losses, weights.

        The perturbation is as large as the weights, so that a wrong one shows in any dtype.
        Raises: Refused.
        """
        x, y, rows = verified_batch(self.subject, self.sets)
        z = self.noise()
        exact = self.expected(x[:rows], z)
        bound = network_bound(self.net, x.dtype)
        if not float((exact[0] - exact[1]).norm() / exact[0].norm()) > bound:
            raise Refused("the halves differ too little for a check")
        target = y[:rows].expand(2, -1).flatten()
        each = F.cross_entropy(exact.flatten(0, 1), target, reduction="none")
        exact_losses = each.reshape(2, rows).mean(1)
        slope = float((exact_losses[0] - exact_losses[1]).abs() / (2 * self.eps))
        self.lr.fill_(0.5 * self.eps / max(slope, 1e-9))
        before = {n: p.detach().double() for n, p in self.model.named_head_parameters()}
        self.logits = None
        losses = step(x, y)
        found = {"bound": bound}
        if self.logits is not None:
            found["logits"] = max(
                compare(f"logits of half {h}", self.logits[h], exact[h], bound) for h in (0, 1)
            )
        difference = float((losses.double() - exact_losses).abs().max())
        allowed = 2 * bound * float(exact.abs().max())
        if not difference <= allowed:
            raise Refused(f"losses differ by {difference:.3g} from float64, allowed {allowed:.3g}")
        g = (losses[0].double() - losses[1].double()) / (2 * self.eps)
        self.model.flush()
        kind = "bf16" if x.dtype == torch.bfloat16 else "fp32"
        if self.model.effective_pairing != "stacked":
            raise Refused("the halves do not run stacked")
        found["weights"] = max(
            require(f"{n} after the step", p, before[n] - self.lr * g * z[n], BOUNDS[kind])
            for n, p in self.model.named_head_parameters()
        )
        self.lr.fill_(IDLE)
        return found


def compare(what: str, came: Tensor, exact: Tensor, bound: float) -> float:
    """Rows that repeat the rows of `exact`: those at both ends, and no NaN anywhere."""
    if not bool(torch.isfinite(came).all()):
        raise Refused(f"{what}: not finite")
    times = -(-min(COMPARED, came.shape[0]) // exact.shape[0])
    repeated = exact.repeat(times, *[1] * (exact.dim() - 1))
    ends = came[: len(repeated)], came[-len(repeated) :]
    return max(require(what, end, repeated, bound) for end in ends)


def verified_batch(subject: Subject, sets: Sets) -> tuple[Tensor, Tensor, int]:
    """A batch of few different rows, again and again: its BatchNorm statistics are theirs."""
    x, y = sets[0]
    rows = math.gcd(len(x), ROWS)
    times = len(x) // rows
    repeated = x[:rows].repeat(times, *[1] * (x.dim() - 1))
    return subject.formatted(repeated), y[:rows].repeat(times), rows


def network_bound(net: nn.Module, dtype: torch.dtype) -> float:
    """That of one product for each product of the network: their errors add up."""
    layers = products(net)
    if dtype == torch.bfloat16:
        kind = "bf16"
    else:
        device = next(net.parameters()).device
        kinds = {precision_of(device, not isinstance(m, nn.Linear), None) for m in layers}
        kind = "tf32" if "tf32" in kinds else "ieee"
    return len(layers) * BOUNDS[kind]


def mezo_contestants(
    subject: Subject, bench: Bench, sets: Sets, pool: Any
) -> tuple[dict[str, Contestant], Row]:
    """The MeZO-style loop, eager and captured; a note where it cannot be captured."""
    dtype = sets[0][0].dtype

    def loop(captured: bool) -> MeZOLoop:
        net = subject.make(bench.device, dtype).train()
        return MeZOLoop(net, weight_scale(net), 0.0, captured)

    def returns(mezo: MeZOLoop, step: Callable[[], object]) -> None:
        """Without a learning rate the walks must cancel: they used the same noise."""
        before = [p.double() for p in mezo.params]
        step()
        bound = BOUNDS["bf16" if dtype == torch.bfloat16 else "fp32"]
        for i, (p, old) in enumerate(zip(mezo.params, before, strict=True)):
            scale = old + mezo.eps  # of what was added on the way
            require(f"MeZO-style parameter {i}", p - old + scale, scale, bound)

    eager = loop(False)
    bench.check(lambda: returns(eager, lambda: eager.step(*sets[0])))
    runs: dict[str, Contestant] = {"mezo_eager": lambda i: eager.step(*sets[i % len(sets)])}
    if not bench.cuda:
        return runs, {"mezo_captured": "needs CUDA"}
    try:
        graphed = _captured_mezo(loop(True), bench, sets, pool)
        bench.check(lambda: returns(graphed[1], lambda: graphed[0](0)))
    except (RuntimeError, AttributeError, Refused) as error:
        torch.cuda.synchronize(bench.device)
        return runs, {"mezo_captured": f"could not be captured: {str(error)[:300]}"}
    runs["mezo_captured"] = graphed[0]
    return runs, {}


def _captured_mezo(
    mezo: MeZOLoop, bench: Bench, sets: Sets, pool: Any
) -> tuple[Contestant, MeZOLoop]:
    x, y = (t.clone() for t in sets[0])
    mezo.step(x, y)
    torch.cuda.synchronize(bench.device)
    graph = torch.cuda.CUDAGraph()
    for generator in mezo.generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool):
        mezo.step(x, y)

    def run(i: int) -> None:
        x.copy_(sets[i % len(sets)][0])
        y.copy_(sets[i % len(sets)][1])
        graph.replay()

    return run, mezo
