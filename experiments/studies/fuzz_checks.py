"""What holds of every network, whatever its layers and settings; see `check_case`."""

from __future__ import annotations

import copy
import linecache
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elasticzo
import zo_kernels
from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, pair_losses, replay
from experiments.studies.fuzz_networks import Case
from zo_kernels import sample

RTOL, ATOL = 1e-9, 1e-10  # float64 in another order of sums
PACKAGES = tuple(str(Path(p.__file__ or "").parent) for p in (elasticzo, zo_kernels))
EPS64 = 2.0**-52
STEPS = 2
REFERENCE_EVERY = 8  # its noise is slow


Run = tuple[ElasticZO, ZOSGD, Any]  # and the tail's optimiser, where there is a tail


class Broken(AssertionError):
    """An invariant does not hold."""


def check_case(case: Case) -> str:
    """Hold one network to all invariants.

    Returns: "held", or "refused: ..." with the sentence of the wrapper that does not take it.
    Raises: Broken that names the invariant.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = torch.get_rng_state()
        try:
            model = wrap(case)
            losses = forwards(model, case)
        except (ValueError, TypeError, RuntimeError) as error:
            if is_refusal(error):
                return f"refused: {error}"
            raise Broken(f"the first forward of {case}: {type(error).__name__}: {error}") from error
        with named("forwards move nothing", case):
            assert torch.equal(torch.get_rng_state(), generator), "the generator moved"
            forwards_move_nothing(case, model)
        for check in (pairings, by_hand, derivative):
            with named(check.__name__, case):
                check(case, model, losses)
        with named("resumed and replayed", case):
            resumed_and_replayed(case)
    return "held"


@contextmanager
def named(invariant: str, case: Case) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Broken(f"{invariant} of {case}: {type(error).__name__}: {error}") from error


def is_refusal(error: Exception) -> bool:
    """Whether the wrapper raised it, in a sentence, and not something below it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    file = place.tb_frame.f_code.co_filename
    line = linecache.getline(file, place.tb_lineno).strip()
    return file.startswith(PACKAGES) and line.startswith("raise ")


def close(a: Tensor, b: Tensor, name: str = "losses") -> None:
    torch.testing.assert_close(a, b, rtol=RTOL, atol=ATOL, msg=lambda text: f"{name}: {text}")


def wrap(case: Case, net: nn.Module | None = None, **settings: Any) -> ElasticZO:
    given = case.settings | {"pairing": "stacked"} | settings
    return ElasticZO(copy.deepcopy(case.net if net is None else net), **given).train()


def forwards(model: ElasticZO, case: Case) -> Tensor:
    """Losses of one step, the mean over its micro-batches: `[2Q]` or `[2Q, B]`."""
    found = [
        pair_losses(F.mse_loss, model(x), y, reduction=model.reduction)
        for x, y in micro_batches(case)
    ]
    return torch.cat(found, 1) if model.reduction else torch.stack(found).mean(0)


def micro_batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """The batch, again with other targets: each micro-batch is one for BatchNorm."""
    return [(case.x, case.y + i) for i in range(case.micro_batches)]


def forwards_move_nothing(case: Case, model: ElasticZO) -> None:
    """Weights and gradients stay; buffers, too, where the model is evaluated, and it is itself."""
    state = copy.deepcopy(model.eval().state_dict())
    plain = copy.deepcopy(model.module)
    assert torch.equal(model(case.x), plain(case.x)), "evaluated, it is another model"
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for (name, p), before in zip(
        model.module.named_parameters(), case.net.parameters(), strict=True
    ):
        assert torch.equal(p, before) and p.grad is None, name
    model.train()


def pairings(case: Case, model: ElasticZO, losses: Tensor) -> None:
    """Stacked is one after the other, and of one network in eight the reference backend."""
    others: list[dict[str, Any]] = [{"pairing": "sequential"}]
    if case.seed % REFERENCE_EVERY == 0:
        others.append({"backend": "reference"})
    for settings in others:
        other = wrap(case, **settings)
        close(forwards(other, case), losses, str(settings))
        for (name, a), b in zip(model.module.named_buffers(), other.module.buffers(), strict=True):
            close(a, b, name)


def dense(case: Case) -> bool:
    """Whether all of the head has the directions of the paper."""
    return "directions" not in case.settings


def noise_of(model: ElasticZO, query: int) -> dict[str, Tensor]:
    """`s z` of every weight of the head, made by itself."""
    key = torch.tensor([model.seed, 0])
    found = {}
    for name, p in model.named_head_parameters():
        one = model.head.parameters[name]
        given: dict[str, Any] = {"tensor": one.index, "query": query, "noise": model.noise}
        z = sample(p.shape, key, backend=model.backend, **given).double() * one.scale
        if one.still_row is not None:
            z[one.still_row] = 0
        found[name] = z
    return found


def plain_loss(case: Case, model: ElasticZO, moved: dict[str, Tensor], by: float) -> ElasticZO:
    """A model whose weights lie `by` times `moved` away, all tail: one unperturbed pass."""
    net = copy.deepcopy(case.net)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name in moved:
                p.add_(moved[name], alpha=by)
    return ElasticZO(net, tail="all", seed=model.seed).train()


def by_hand(case: Case, model: ElasticZO, losses: Tensor) -> None:
    """The losses are those of the network with its weights moved."""
    if not dense(case):
        return
    expected = []
    for query in range(model.queries):
        z = noise_of(model, query)
        for sign in (1, -1):
            there = plain_loss(case, model, z, sign * model.eps)
            expected.append(forwards(there, case).detach()[0])
    close(losses.detach(), torch.stack(expected))


def derivative(case: Case, model: ElasticZO, losses: Tensor) -> None:
    """g is the derivative along `s z`.

    Budget: a central difference errs by `eps^2 L''' / 6`, of which the difference to g at twice the
    eps is three times as much; and by the rounding of two losses, 2^10 roundings of 2^-52 each (of
    a network's sums), over 2 eps.
    """
    if not dense(case) or not case.smooth:
        return
    wide = wrap(case, eps=2 * model.eps)
    pairs = losses.detach().view(-1, 2)
    far = forwards(wide, case).detach().view(-1, 2)
    g = (pairs[:, 0] - pairs[:, 1]) / (2 * model.eps)
    g_far = (far[:, 0] - far[:, 1]) / (2 * wide.eps)
    exact = plain_loss(case, model, {}, 0.0)
    forwards(exact, case).mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in exact.module.named_parameters()}
    for query in range(model.queries):
        along = noise_of(model, query).items()
        parts = [(u * z).sum() for name, z in along if (u := gradients[name]) is not None]
        expected = sum(parts, torch.zeros((), dtype=torch.float64))
        rounding = 2**10 * EPS64 * (1 + pairs[query].abs().sum()) / (2 * model.eps)
        budget = (g_far[query] - g[query]).abs() + rounding
        error = (g[query] - expected).abs()
        assert error <= budget, f"g {g[query]:.9g}, exact {expected:.9g}, budget {budget:.3g}"


def resumed_and_replayed(case: Case) -> None:
    """A run from a state is the run that went on; its head comes again from first weights and log.

    A log has no inputs, which directions other than the paper's need.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        run = begin(case, case.net)
        model, zo, _ = run
        log = TrajectoryLog(path, zo) if dense(case) else None
        trained(run, case, STEPS)
        saved = [copy.deepcopy(of.state_dict()) for of in run if of is not None]
        other = begin(case, moved_away(case.net))
        for of, state in zip([one for one in other if one is not None], saved, strict=True):
            load: Callable[[Any], Any] = of.load_state_dict
            load(state)
        for one in (run, other):
            trained(one, case, 1)
        states = other[0].state_dict()
        for name, t in model.state_dict().items():
            assert torch.equal(t, states[name]), f"resumed, {name} is another"
        if log is not None:
            log.drain()
            again = wrap(case)
            replay(path, again)
            heads = zip(model.named_head_parameters(), again.head_parameters(), strict=True)
            for (name, a), b in heads:
                assert torch.equal(a, b), f"replayed, {name} is another"


def begin(case: Case, net: nn.Module) -> Run:
    model = wrap(case, net)
    if case.settings.get("directions") == "auto":
        model.settle(case.x)
    tail = any(True for _ in model.tail_parameters())
    bp = model.tail_optimizer(torch.optim.SGD, lr=0.01, momentum=0.9) if tail else None
    return model, ZOSGD(model, lr=1e-3, momentum=0.5), bp


def moved_away(net: nn.Module) -> nn.Module:
    found = copy.deepcopy(net)
    with torch.no_grad():
        for p in found.parameters():
            p.mul_(1.5)
    return found


def trained(run: Run, case: Case, steps: int) -> None:
    model, zo, tail = run
    for _ in range(steps):
        losses = forwards(model, case)
        if tail is not None:
            tail.zero_grad()
            model.backward(losses)
            tail.step()
        zo.step(losses)
