"""`pair_losses(..., reduction="none")`: a loss a sample, whose mean is the loss of the half."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import pair_losses
from elasticzo.reductions import mean_divisor

H, B, C, T = 2, 5, 4, 3  # no two equal: a sum over the wrong one shows
FP64 = torch.float64


def draw(*shape: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def classes(*shape: int, ignored: int | None = None) -> Tensor:
    y = torch.randint(C, shape)
    if ignored is not None:
        y[0], y.view(-1)[-1] = ignored, ignored
        y[1] = (ignored + 1) % C
    return y


def signs(*shape: int) -> Tensor:
    return draw(*shape).sign()


WEIGHT = torch.tensor([0.3, 2.0, 0.7, 1.1], dtype=FP64)
LOGITS, TOKENS, IMAGES = (H, B, C), (H, B, C, T), (H, B, C, 2, 3)
Make = Callable[[], tuple[Tensor, tuple[Any, ...], dict[str, Any]]]


def of(shape: tuple[int, ...], target: Callable[[], Tensor], **settings: Any) -> Make:
    return lambda: (draw(*shape), (target(),), settings)


CASES: dict[str, tuple[Any, Make]] = {
    "cross entropy": (F.cross_entropy, of(LOGITS, lambda: classes(B))),
    "weights": (F.cross_entropy, of(LOGITS, lambda: classes(B), weight=WEIGHT)),
    "ignored": (F.cross_entropy, of(LOGITS, lambda: classes(B, ignored=-100))),
    "ignored class": (
        F.cross_entropy,
        of(LOGITS, lambda: classes(B, ignored=2), weight=WEIGHT, ignore_index=2),
    ),
    "smoothing": (F.cross_entropy, of(LOGITS, lambda: classes(B), label_smoothing=0.3)),
    "smoothing, weights, ignored": (
        F.cross_entropy,
        of(
            LOGITS,
            lambda: classes(B, ignored=3),
            weight=WEIGHT,
            ignore_index=3,
            label_smoothing=0.3,
        ),
    ),
    "tokens": (
        F.cross_entropy,
        of(TOKENS, lambda: classes(B, T, ignored=-100), label_smoothing=0.1),
    ),
    "weighted tokens": (
        F.cross_entropy,
        of(TOKENS, lambda: classes(B, T, ignored=-100), weight=WEIGHT, label_smoothing=0.1),
    ),
    "images": (
        F.cross_entropy,
        of(IMAGES, lambda: classes(B, 2, 3, ignored=0), weight=WEIGHT, ignore_index=0),
    ),
    "probabilities": (
        F.cross_entropy,
        of(LOGITS, lambda: draw(B, C).softmax(1), weight=WEIGHT, label_smoothing=0.2),
    ),
    "probabilities of tokens": (
        F.cross_entropy,
        of(TOKENS, lambda: draw(B, C, T).softmax(1), weight=WEIGHT),
    ),
    "nll": (F.nll_loss, of(LOGITS, lambda: classes(B))),
    "nll, bytes": (F.nll_loss, of(LOGITS, lambda: classes(B).byte(), weight=WEIGHT)),
    "nll of images": (
        F.nll_loss,
        of(IMAGES, lambda: classes(B, 2, 3, ignored=1), weight=WEIGHT, ignore_index=1),
    ),
    "mse": (F.mse_loss, of(TOKENS, lambda: draw(B, C, T))),
    "weighted mse": (F.mse_loss, of(LOGITS, lambda: draw(B, C), weight=draw(B, C).abs())),
    "l1": (F.l1_loss, of(LOGITS, lambda: draw(B, C))),
    "weighted l1": (F.l1_loss, of(LOGITS, lambda: draw(B, C), weight=draw(B, C).abs())),
    "smooth l1": (F.smooth_l1_loss, of(LOGITS, lambda: draw(B, C), beta=0.5)),
    "huber": (F.huber_loss, of(LOGITS, lambda: draw(B, C))),
    "weighted huber": (F.huber_loss, of(LOGITS, lambda: draw(B, C), weight=draw(B, C).abs())),
    "bce with logits": (
        F.binary_cross_entropy_with_logits,
        of(
            LOGITS,
            lambda: torch.rand(B, C, dtype=FP64),
            weight=draw(B, C).abs(),
            pos_weight=WEIGHT,
        ),
    ),
    "bce": (
        lambda x, *args, **settings: F.binary_cross_entropy(x.sigmoid(), *args, **settings),
        of(LOGITS, lambda: torch.rand(B, C, dtype=FP64), weight=WEIGHT),
    ),
    "kl": (F.kl_div, of(LOGITS, lambda: draw(B, C).softmax(1))),
    "kl of logs": (F.kl_div, of(LOGITS, lambda: draw(B, C).log_softmax(1), log_target=True)),
    "poisson": (F.poisson_nll_loss, of(LOGITS, lambda: draw(B, C).abs(), full=True)),
    "soft margin": (F.soft_margin_loss, of(LOGITS, lambda: signs(B, C))),
    "hinge embedding": (F.hinge_embedding_loss, of(LOGITS, lambda: signs(B, C))),
    "multi margin": (F.multi_margin_loss, of(LOGITS, lambda: classes(B), weight=WEIGHT)),
    "multilabel margin": (F.multilabel_margin_loss, of(LOGITS, lambda: classes(B, C))),
    "multilabel soft margin": (
        F.multilabel_soft_margin_loss,
        of(LOGITS, lambda: classes(B, C) // 2, weight=WEIGHT),
    ),
    "gaussian": (
        F.gaussian_nll_loss,
        lambda: (draw(H, B, C), (draw(B, C), draw(B, 1).square() + 0.1), {}),
    ),
    "weight by place": (
        F.cross_entropy,
        lambda: (draw(H, B, C), (classes(B), WEIGHT), {}),
    ),
    "target by name": (
        F.cross_entropy,
        lambda: (draw(H, B, C), (), {"target": classes(B), "weight": WEIGHT}),
    ),
    "partial": (partial(F.cross_entropy, weight=WEIGHT), of(TOKENS, lambda: classes(B, T))),
    "partial sum": (partial(F.mse_loss, reduction="sum"), of(LOGITS, lambda: draw(B, C))),
    "module": (nn.CrossEntropyLoss(), of(LOGITS, lambda: classes(B))),
    "module with all": (
        nn.CrossEntropyLoss(WEIGHT, ignore_index=2, label_smoothing=0.2),
        of(TOKENS, lambda: classes(B, T, ignored=2)),
    ),
    "nll module": (
        nn.NLLLoss(WEIGHT, ignore_index=2),
        of(TOKENS, lambda: classes(B, T, ignored=2)),
    ),
    "mse module": (nn.MSELoss(), of(TOKENS, lambda: draw(B, C, T))),
    "sum module": (nn.MSELoss(reduction="sum"), of(TOKENS, lambda: draw(B, C, T))),
    "sum of classes": (
        nn.CrossEntropyLoss(WEIGHT, reduction="sum"),
        of(TOKENS, lambda: classes(B, T, ignored=-100)),
    ),
    "batchmean": (
        nn.KLDivLoss(reduction="batchmean"),
        of(TOKENS, lambda: draw(B, C, T).softmax(1)),
    ),
    "bce module": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        of(LOGITS, lambda: torch.rand(B, C, dtype=FP64)),
    ),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_samples_is_the_loss(case: str) -> None:
    """And so is its gradient; no sample's loss depends on another's output."""
    loss, make = CASES[case]
    outputs, targets, settings = make()
    outputs.requires_grad_()
    losses = pair_losses(loss, outputs, *targets, reduction="none", **settings)
    wanted = pair_losses(loss, outputs, *targets, **settings)
    assert losses.shape == (H, B) and losses.dtype == FP64
    torch.testing.assert_close(losses.mean(1), wanted, rtol=1e-12, atol=1e-14)
    found, exact = (
        torch.autograd.grad(x, outputs, torch.tensor([1.0, -2.0], dtype=FP64), retain_graph=True)[0]
        for x in (losses.mean(1), wanted)
    )
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    (of_sample,) = torch.autograd.grad(losses[1, 3], outputs)
    of_sample[1, 3] = 0
    assert not of_sample.any()


LINEAR = getattr(F, "linear_cross_entropy", None)


@pytest.mark.skipif(LINEAR is None, reason="of torch 2.13")
def test_linear_cross_entropy() -> None:
    x, y, weight = draw(H, B, 6), classes(B, ignored=2), draw(C, 6)
    for ignored in (None, 2):
        settings = {"target": y, "weight": WEIGHT, "ignore_index": ignored}
        losses = pair_losses(LINEAR, x, weight, reduction="none", **settings)
        torch.testing.assert_close(losses.mean(1), pair_losses(LINEAR, x, weight, **settings))
        module = nn.LinearCrossEntropyLoss(
            6, C, weight=WEIGHT, ignore_index=ignored, dtype=FP64, label_smoothing=0.1
        )
        losses = pair_losses(module, x, y, reduction="none")
        torch.testing.assert_close(losses.mean(1), pair_losses(module, x, y))


def test_a_sample_has_the_sum_of_its_own_elements() -> None:
    """Tokens that count in fewer samples than others: `B / D` times the sum, by hand."""
    x, y = draw(*TOKENS), classes(B, T, ignored=-100)
    losses = pair_losses(F.cross_entropy, x, y, weight=WEIGHT, reduction="none")
    log_p = x.log_softmax(2)
    total = sum(float(WEIGHT[t]) for row in y.tolist() for t in row if t != -100)
    for h in range(H):
        for i in range(B):
            terms = [
                -WEIGHT[t] * log_p[h, i, t, j] for j, t in enumerate(y[i].tolist()) if t != -100
            ]
            wanted = B / total * torch.stack(terms).sum() if terms else torch.zeros((), dtype=FP64)
            torch.testing.assert_close(losses[h, i], wanted)
    assert not losses[:, 0].any()


def test_nothing_counts_and_nobody_is_there() -> None:
    x, y = draw(*TOKENS), torch.full((B, T), -100)
    for weight in (None, WEIGHT):
        losses = pair_losses(F.cross_entropy, x, y, weight=weight, reduction="none")
        assert losses.shape == (H, B) and losses.isnan().all()
    for loss, target in ((F.cross_entropy, y[:0]), (F.mse_loss, x[0, :0])):
        assert pair_losses(loss, x[:, :0], target, reduction="none").shape == (H, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_wide(dtype: torch.dtype) -> None:
    """70,000 elements of 4 a sample are more than float16 holds, and than bfloat16 can count."""
    x, y = torch.full((H, 2, 70_000), 2.0, dtype=dtype), torch.zeros(2, 70_000, dtype=dtype)
    losses = pair_losses(F.mse_loss, x, y, reduction="none")
    assert losses.dtype == dtype and torch.equal(losses, torch.full_like(losses, 4.0))
    wrong = pair_losses(lambda a, b: (a != b).bool(), x, y, reduction="none")
    assert torch.equal(wrong, torch.ones(H, 2))


def test_the_divisor_of_what_is_unknown() -> None:
    assert mean_divisor(F.cross_entropy, B, (), {}) is None
    assert mean_divisor(torch.add, B, (1,), {}) is None
    assert mean_divisor(nn.CrossEntropyLoss(), B, (), {}) is None
