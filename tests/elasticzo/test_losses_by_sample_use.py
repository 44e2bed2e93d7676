"""`pair_losses(..., reduction="none")` with losses of one's own, on the kernel, in wrong use."""

from __future__ import annotations

import functools
import types
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elasticzo.losses
from elasticzo import pair_losses
from elasticzo.losses import check_losses
from tests.elasticzo.test_losses_by_sample import (
    LOGITS,
    TOKENS,
    WEIGHT,
    B,
    C,
    H,
    T,
    classes,
    draw,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")


def masked(x: Tensor, y: Tensor, mask: Tensor, reduction: str = "mean") -> Tensor:
    """A loss of one's own: `[B, T]` by element."""
    each = F.cross_entropy(x, y, reduction="none") * mask
    return each if reduction == "none" else each.mean()


def test_losses_of_ones_own() -> None:
    x, y, mask = draw(*TOKENS), classes(B, T), torch.arange(B * T).view(B, T) % 3 > 0
    by_hand = torch.stack([masked(part, y, mask, "none").mean(1) for part in x])
    takes_any = lambda *args, **settings: masked(*args, **settings)  # noqa: E731
    takes_none = lambda *args: masked(*args, reduction="none")  # noqa: E731
    a_loss_a_sample = lambda *args: masked(*args, reduction="none").mean(1)  # noqa: E731

    class Module(nn.Module):
        def forward(self, *args: Tensor, reduction: str = "mean") -> Tensor:
            return masked(*args, reduction=reduction)

    for loss in (masked, takes_any, takes_none, a_loss_a_sample, Module(), partial(masked)):
        losses = pair_losses(loss, x, y, mask, reduction="none")
        torch.testing.assert_close(losses, by_hand)
    # Divided by the mask's sum it is no mean over elements: that is the user's to say.
    normalised = lambda *args: masked(*args, reduction="none") * mask.numel() / mask.sum()  # noqa: E731
    losses = pair_losses(normalised, x, y, mask, reduction="none")
    whole = torch.stack([masked(part, y, mask, "none").sum() / mask.sum() for part in x])
    torch.testing.assert_close(losses.mean(1), whole)


def test_a_tree_of_outputs() -> None:
    out = {"logits": draw(H, B, C), "scale": draw(H).exp(), "name": "x"}
    y = classes(B)

    def loss(o: dict[str, Any], y: Tensor, reduction: str = "mean") -> Tensor:
        return o["scale"] * F.cross_entropy(o["logits"], y, reduction=reduction)

    losses = pair_losses(loss, out, y, reduction="none")
    assert losses.shape == (H, B)
    torch.testing.assert_close(losses.mean(1), pair_losses(loss, out, y))


def test_decorated_losses_are_known() -> None:
    """As torch.compile decorates, with functools.wraps."""

    @functools.wraps(F.cross_entropy)
    def twice(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * F.cross_entropy(*args, **kwargs)

    x, y = draw(*LOGITS), classes(B, ignored=-100)
    losses = pair_losses(twice, x, y, weight=WEIGHT, reduction="none")
    torch.testing.assert_close(losses.mean(1), pair_losses(twice, x, y, weight=WEIGHT))


class Focal(nn.CrossEntropyLoss):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * super().forward(x, y)


def test_modules_with_hooks_and_forwards_of_their_own() -> None:
    """What was put on a module holds; the module stays as it was."""
    x, y = draw(*LOGITS), classes(B, ignored=-100)
    plain = nn.CrossEntropyLoss(WEIGHT)
    wanted = pair_losses(plain, x, y, reduction="none")

    hooked = nn.CrossEntropyLoss(WEIGHT)
    hooked.register_forward_hook(lambda m, args, out: 2 * out)
    torch.testing.assert_close(pair_losses(hooked, x, y, reduction="none"), 2 * wanted)

    bound = nn.CrossEntropyLoss(WEIGHT)
    bound.forward = types.MethodType(lambda m, x, y: 3 * type(m).forward(m, x, y), bound)  # type: ignore[method-assign]
    torch.testing.assert_close(pair_losses(bound, x, y, reduction="none"), 3 * wanted)

    free = nn.CrossEntropyLoss()
    free.forward = lambda x, y: F.cross_entropy(x, y, reduction="none")  # type: ignore[method-assign]
    losses = pair_losses(free, x, y, reduction="none")
    torch.testing.assert_close(losses.mean(1), pair_losses(nn.CrossEntropyLoss(), x, y))

    losses = pair_losses(Focal(WEIGHT), x, y, reduction="none")
    torch.testing.assert_close(losses, 0.5 * wanted)
    for module in (plain, hooked, bound):
        assert module.reduction == "mean" and pair_losses(module, x, y).shape == (H,)


class Flattens(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.flatten()


def test_other_reductions_are_the_losses_own() -> None:
    x, y = draw(*LOGITS), draw(B, C)
    for reduction in ("sum", "mean"):
        wanted = torch.stack([F.mse_loss(part, y, reduction=reduction) for part in x])
        for loss in (F.mse_loss, nn.MSELoss()):
            assert torch.equal(pair_losses(loss, x, y, reduction=reduction), wanted)
    batchmean = pair_losses(F.kl_div, x, y.softmax(1), reduction="batchmean")
    total = pair_losses(F.kl_div, x, y.softmax(1), reduction="sum")
    torch.testing.assert_close(batchmean, total / B)
    own = lambda a, b: (a - b).square().mean()  # noqa: E731
    assert torch.equal(pair_losses(own, x, y, reduction="mean"), pair_losses(own, x, y))
    with pytest.raises(TypeError, match="reduction"):
        pair_losses(own, x, y, reduction="sum")


@pytest.mark.parametrize(
    ("loss", "shape", "name"),
    [
        (lambda x, y: F.cross_entropy(x, y), "[]", "<lambda>"),
        (lambda x, y: 1.0, "[]", "<lambda>"),
        (partial(lambda x, y, s: F.cross_entropy(x, y), s=1), "[]", "<lambda>"),
        (lambda x, y: x[1:, 0], "[4]", "<lambda>"),
        (lambda x, y: x.mT, "[4, 5]", "<lambda>"),
        (Flattens(), "[20]", "Flattens"),
    ],
)
def test_what_is_not_by_sample(loss: Any, shape: str, name: str) -> None:
    with pytest.raises(ValueError) as caught:
        pair_losses(loss, draw(*LOGITS), classes(B), reduction="none")
    assert str(caught.value) == (
        f"{name} must give losses of shape [5, ...], of each of 5 samples, got shape {shape}: let "
        'it take reduction="none", or not reduce; only the directions "weight" and "rank1" can '
        "learn from one number a batch"
    )


def test_the_ctc_loss_is_refused() -> None:
    lengths = torch.full((B,), B), torch.full((B,), 2)
    for loss in (F.ctc_loss, nn.CTCLoss()):
        with pytest.raises(ValueError, match="CTC loss divides by the length of each target"):
            pair_losses(loss, draw(H, B, B, C), classes(B, 2), *lengths, reduction="none")


def test_a_scalar_is_asked_for_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"scalar for each half, got shape \[5\]: .*\"none\""):
        pair_losses(nn.CrossEntropyLoss(reduction="none"), draw(*LOGITS), classes(B))


def test_check_losses() -> None:
    check_losses(torch.zeros(2, 5), 2, 5)
    check_losses(torch.zeros(2), 2)
    for losses, found in ((torch.zeros(2), r"\[2\]"), (torch.zeros(2, 4), r"\[2, 4\]")):
        wanted = r"losses must have shape \[2, 5\], one a sample in each half, got "
        hint = r': use pair_losses\(\.\.\., reduction="none"\)$'
        with pytest.raises(ValueError, match=f"^{wanted}{found}{hint}"):
            check_losses(losses, 2, 5)
    with pytest.raises(ValueError, match=r"shape \[2\], one a half, got \[2, 5\]$"):
        check_losses(torch.zeros(2, 5), 2)
    with pytest.raises(TypeError, match=r"a Tensor of shape \[2, 5\], got float"):
        check_losses(1.0, 2, 5)
    with pytest.raises(TypeError, match="floating"):
        check_losses(torch.zeros(2, 5, dtype=torch.int64), 2, 5)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel's calls: forced, in the interpreter; their reductions."""
    pytest.importorskip("triton")
    calls: list[str] = []
    kernel = elasticzo.losses.paired_cross_entropy

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(settings["reduction"])
        return kernel(*args, **settings)

    monkeypatch.setattr(elasticzo.losses, "_loss_backend", lambda device: "triton")
    monkeypatch.setattr(elasticzo.losses, "paired_cross_entropy", counted)
    return calls


@interpreted
@pytest.mark.parametrize("ignored", [-100, 2])
def test_the_kernel_gives_the_same(kernels: list[str], ignored: int) -> None:
    """Losses, gradients, and the gradient of a gradient, which is torch's."""
    x, y = draw(*LOGITS, dtype=torch.float32).requires_grad_(), classes(B, ignored=ignored)
    given: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": 0.1}
    plain = lambda a, b, **settings: F.cross_entropy(a, b, **settings)  # noqa: E731
    scale = B / (y != ignored).sum()
    wanted = scale * torch.stack([plain(part, y, reduction="none", **given) for part in x])
    modules = [nn.CrossEntropyLoss(reduction=r, **given) for r in ("mean", "none")]
    for loss, settings in ((F.cross_entropy, given), *((module, {}) for module in modules)):
        losses = pair_losses(loss, x, y, reduction="none", **settings)
        torch.testing.assert_close(losses, wanted)
        grad = draw(H, B, dtype=torch.float32)
        found, exact = (
            torch.autograd.grad(z, x, grad, retain_graph=True) for z in (losses, wanted)
        )
        torch.testing.assert_close(found, exact)
        (first,) = torch.autograd.grad(losses.square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(wanted.square().sum(), x, create_graph=True)
        seconds = (
            torch.autograd.grad(z.square().sum(), x, retain_graph=True) for z in (first, again)
        )
        torch.testing.assert_close(*seconds)
    assert kernels == ["none"] * 3
    means = pair_losses(F.cross_entropy, x, y, **given)
    torch.testing.assert_close(losses.mean(1), means)
    assert kernels.pop() == "mean"


@interpreted
def test_where_the_kernel_steps_back(kernels: list[str]) -> None:
    x, y = draw(*LOGITS, dtype=torch.float32), classes(B)
    hooked = nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda m, args, out: 2 * out)
    losses = pair_losses(hooked, x, y, reduction="none")
    torch.testing.assert_close(losses.mean(1), 2 * torch.stack([F.cross_entropy(a, y) for a in x]))
    summed = nn.CrossEntropyLoss(reduction="sum")
    losses = pair_losses(summed, x, y, reduction="none")
    torch.testing.assert_close(losses.mean(1), pair_losses(summed, x, y))
    pair_losses(F.cross_entropy, x, y, weight=WEIGHT.float(), reduction="none")
    pair_losses(F.cross_entropy, x, x[0].softmax(1), reduction="none")
    assert not kernels


@interpreted
def test_a_target_outside_the_classes_is_nan_in_its_row(kernels: list[str]) -> None:
    x, y = draw(*LOGITS, dtype=torch.float32), classes(B)
    y[2] = C
    losses = pair_losses(F.cross_entropy, x, y, reduction="none")
    assert losses.isnan().sum(0).tolist() == [0, 0, H, 0, 0] and kernels == ["none"]


def test_nothing_waits_for_the_device() -> None:
    """On the meta device nothing can be read."""
    x, y = torch.zeros(*TOKENS, device="meta"), torch.zeros(B, T, dtype=torch.int64, device="meta")
    weight = torch.ones(C, device="meta")
    losses = pair_losses(F.cross_entropy, x, y, weight=weight, reduction="none")
    assert losses.shape == (H, B)
    losses = pair_losses(F.mse_loss, x, x[0], weight=x[0], reduction="none")
    assert losses.shape == (H, B)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weight", [None, WEIGHT.float()], ids=["kernel", "torch"])
def test_a_gpu_gives_the_same_and_waits_for_nothing(weight: Tensor | None) -> None:
    x, y = draw(*LOGITS, dtype=torch.float32), classes(B, ignored=-100)
    wanted = pair_losses(F.cross_entropy, x, y, weight=weight, reduction="none")
    x, y = x.cuda().requires_grad_(), y.cuda()
    weight = None if weight is None else weight.cuda()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = pair_losses(F.cross_entropy, x, y, weight=weight, reduction="none")
            losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(losses.cpu(), wanted)
