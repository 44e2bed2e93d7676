"""Scales of a perturbation are finite numbers: every op says so before it writes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zo_kernels import (
    paired_conv1d,
    paired_conv2d,
    paired_linear,
    perturbed_weights,
    stage_,
    update_,
)

KEY, ONE = torch.tensor([1, 2]), torch.ones(1, dtype=torch.float64)
EPS = torch.tensor(0.1, dtype=torch.float64)
HERE = (KEY, EPS)
OPS: dict[str, tuple[str, Callable[[Any, torch.Tensor], Any]]] = {
    "perturbed_weights": ("scale", lambda s, w: perturbed_weights(w, *HERE, tensor=0, scale=s)),
    "paired_linear": (
        "scale",
        lambda s, w: paired_linear(torch.ones(2, 4), w, None, *HERE, tensor=0, scale=s),
    ),
    "bias of paired_linear": (
        "bias_scale",
        lambda s, w: paired_linear(
            torch.ones(2, 4), w, torch.ones(3), *HERE, tensor=0, bias_tensor=1, bias_scale=s
        ),
    ),
    "paired_conv1d": (
        "scale",
        lambda s, w: paired_conv1d(
            torch.ones(2, 4, 5), w[:, :, None], None, *HERE, tensor=0, scale=s
        ),
    ),
    "paired_conv2d": (
        "scale",
        lambda s, w: paired_conv2d(
            torch.ones(2, 4, 5, 5), w[:, :, None, None], None, *HERE, tensor=0, scale=s
        ),
    ),
    "stage_": (
        r"scales\[0\]",
        lambda s, w: stage_([torch.zeros(2, 3, 4)], [w], *HERE, tensors=[0], scales=[s]),
    ),
    "update_": (
        r"scales\[0\]",
        lambda s, w: update_(
            [w], KEY, ONE, ONE, ONE, torch.zeros(()), tensors=[0], groups=[0], scales=[s]
        ),
    ),
}


@pytest.mark.parametrize("scale", [None, "1", float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_a_scale_that_is_no_finite_number_is_refused(op: str, scale: Any) -> None:
    name, call = OPS[op]
    w = torch.ones(3, 4)
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number, got "):
        call(scale, w)
    assert w.eq(1).all()
    call(0.5, w)
    call(2, w)
