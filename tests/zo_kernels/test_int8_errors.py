"""What the integer ops say of arguments they cannot take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.zo_kernels._int8_weights import int32, key_on
from tests.zo_kernels.test_int8_use import logits_on
from zo_kernels import (
    int8_perturbed_weights,
    int8_range,
    int8_requantize,
    int8_update_,
    integer_cross_entropy,
    integer_projected_sign,
    integer_softmax_error,
)

KEY = key_on("cpu")
ACC, BYTES = torch.zeros(4, 7, dtype=torch.int32), torch.zeros(4, 7, dtype=torch.int8)
ZERO, TWO = int32(0, "cpu"), int32([0, 0], "cpu")
LOGITS, EXPONENT, TARGET = logits_on("cpu")
SIGNS = int32([1, -1], "cpu")


def update(**kwargs: Any) -> None:
    args: dict[str, Any] = {"params": [BYTES.clone()], "key": KEY, "g": SIGNS, "tensors": [0]}
    int8_update_(**args | kwargs)


def requantize(**kwargs: Any) -> None:
    int8_requantize(**{"acc": ACC, "bits": None, "exponent": ZERO} | kwargs)


def loss(**kwargs: Any) -> None:
    integer_cross_entropy(**{"logits": LOGITS, "exponent": EXPONENT, "target": TARGET} | kwargs)


def error(**kwargs: Any) -> None:
    args = {"logits": LOGITS, "exponent": EXPONENT, "target": TARGET, "key": KEY}
    integer_softmax_error(**args | kwargs)


def perturb(**kwargs: Any) -> None:
    int8_perturbed_weights(**{"w": BYTES, "key": KEY, "tensor": 0} | kwargs)


BIG = torch.empty((2, 2**24 + 1, 1), dtype=torch.int8, device="meta")
NEAR: dict[str, tuple[Callable[..., None], dict[str, Any], type[Exception], str]] = {
    "acc-dtype": (
        requantize,
        {"acc": BYTES},
        TypeError,
        "acc must be torch.int32, got torch.int8",
    ),
    "halves": (requantize, {"halves": 0}, ValueError, "halves must be at least 1, got 0"),
    "halves-divide": (
        requantize,
        {"halves": 3},
        ValueError,
        "acc must have a dimension 0 that divides by 3 halves, got shape [4, 7]",
    ),
    "exponent-dtype": (
        requantize,
        {"exponent": ZERO.long()},
        TypeError,
        "exponent must be torch.int32, got torch.int64",
    ),
    "exponent-count": (
        requantize,
        {"exponent": TWO},
        ValueError,
        "exponent must have 1 element, got shape [2]",
    ),
    "bits-count": (
        requantize,
        {"bits": TWO, "halves": 4},
        ValueError,
        "bits must have 1 or 4 elements, got shape [2]",
    ),
    "weight-exponent": (
        requantize,
        {"weight_exponent": TWO},
        ValueError,
        "weight_exponent must have 1 element, got shape [2]",
    ),
    "rounding": (
        requantize,
        {"rounding": "up"},
        ValueError,
        "rounding must be one of ('nearest', 'pseudo', 'stochastic'), got 'up'",
    ),
    "no-key": (
        requantize,
        {"rounding": "stochastic"},
        ValueError,
        "rounding 'stochastic' needs a key, got None",
    ),
    "key": (requantize, {"key": KEY[:1]}, ValueError, "key must have shape [2], got [1]"),
    "query": (
        requantize,
        {"query": 2**24},
        ValueError,
        "query must be in [0, 2^24), got 16777216",
    ),
    "groups": (
        requantize,
        {
            "acc": torch.empty((2**32 + 1, 1), dtype=torch.int32, device="meta"),
            "exponent": ZERO.to("meta"),
            "rounding": "stochastic",
            "key": KEY.to("meta"),
        },
        ValueError,
        "a tensor may have at most 2^32 groups of noise, got 4294967297 for shape [4294967297, 1]",
    ),
    "w-dtype": (perturb, {"w": ACC}, TypeError, "w must be torch.int8, got torch.int32"),
    "range": (
        perturb,
        {"start": 2},
        ValueError,
        "halves need 0 <= start < stop, got start=2, stop=2",
    ),
    "p-zero": (perturb, {"p_zero": 1.0}, ValueError, "p_zero must be in [0, 1), got 1.0"),
    "r-max": (perturb, {"r_max": 128}, ValueError, "r_max must be in [1, 127], got 128"),
    "update-r-max": (update, {"r_max": 0}, ValueError, "r_max must be in [1, 127], got 0"),
    "update-count": (
        update,
        {"tensors": [0, 1]},
        ValueError,
        "params and tensors must have one length, got 1, 2",
    ),
    "g-dtype": (
        update,
        {"g": SIGNS.long()},
        TypeError,
        "g must be torch.int32, got torch.int64",
    ),
    "g-none": (
        update,
        {"g": SIGNS[:0]},
        ValueError,
        "g must have at least one query, got none",
    ),
    "b-zo": (update, {"b_zo": 32}, ValueError, "b_zo must be in [0, 31], got 32"),
    "update-rounding": (
        update,
        {"rounding": "up"},
        ValueError,
        "rounding must be one of ('nearest', 'pseudo', 'stochastic'), got 'up'",
    ),
    "update-expanded": (
        update,
        {"params": [BYTES[:1].expand(4, 7)]},
        ValueError,
        "params[0] is changed in place and must not be expanded, got shape [4, 7] "
        "with strides [0, 1]",
    ),
    "update-tensor": (
        update,
        {"tensors": [-1]},
        ValueError,
        "tensor index must be in [0, 2^32), got -1",
    ),
    "logits-dtype": (
        loss,
        {"logits": LOGITS.int()},
        TypeError,
        "logits must be torch.int8, got torch.int32",
    ),
    "logits-dims": (
        loss,
        {"logits": LOGITS[0]},
        ValueError,
        "logits must have shape [H, B, C], C > 0, got [5, 10]",
    ),
    "logits-classes": (
        loss,
        {"logits": LOGITS[:, :, :0]},
        ValueError,
        "logits must have shape [H, B, C], C > 0, got [2, 5, 0]",
    ),
    "loss-exponent": (
        loss,
        {"exponent": ZERO},
        ValueError,
        "exponent must have shape [2], got []",
    ),
    "target": (
        loss,
        {"target": TARGET[:4]},
        ValueError,
        "target must have shape [5], got [4]",
    ),
    "target-dtype": (
        loss,
        {"target": TARGET.int()},
        TypeError,
        "target must be torch.int64, got torch.int32",
    ),
    "fraction-bits": (
        loss,
        {"fraction_bits": 17},
        ValueError,
        "fraction_bits must be in [0, 16], got 17",
    ),
    "batch": (
        loss,
        {
            "logits": BIG,
            "exponent": TWO.to("meta"),
            "target": torch.empty(2**24 + 1, dtype=torch.int64, device="meta"),
        },
        ValueError,
        "the batch may have at most 2^24 samples, got 16777217",
    ),
    "error-key": (
        error,
        {"key": None},
        ValueError,
        "rounding 'stochastic' needs a key, got None",
    ),
    "pairs": (
        integer_projected_sign,  # type: ignore[dict-item]
        {"losses": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "losses must come in pairs, got 3",
    ),
    "losses-dtype": (
        integer_projected_sign,  # type: ignore[dict-item]
        {"losses": torch.zeros(4)},
        TypeError,
        "losses must be torch.int64, got torch.float32",
    ),
    "range-halves": (
        int8_range,  # type: ignore[dict-item]
        {"acc": ACC[0, 0], "halves": 1},
        ValueError,
        "acc must have a dimension 0 that divides by 1 halves, got shape []",
    ),
}


@pytest.mark.parametrize(("call", "change", "raised", "message"), NEAR.values(), ids=NEAR)
def test_message(
    call: Callable[..., None], change: dict[str, Any], raised: type[Exception], message: str
) -> None:
    with pytest.raises(raised, match=f"^{re.escape(message)}$"):
        call(**change)
