"""The noise definition: known answers, equal bits on every backend, independence of the launch."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tests._budget import NORMAL_ERROR
from tests.zo_kernels._noise_model import model, philox, sparse_value
from zo_kernels import sample
from zo_kernels.reference.noise import philox as philox_torch
from zo_kernels.reference.noise import sparse_int8 as sparse_int8_torch
from zo_kernels.registry import has_triton
from zo_kernels.triton.philox import words
from zo_kernels.triton.shim import jit, tl

pytestmark = pytest.mark.usefixtures("poison")

# Random123's kat_vectors for philox4x32-10: counter, key, words.
ONES = 0xFFFFFFFF
KNOWN = {
    "zeros": ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
SHAPES = [(), (1,), (5,), (130,), (3, 7), (2, 129), (6, 3, 5, 5), (4, 3, 2)]
INTEGERS = ["bits", "rademacher", "sparse_int8"]
COUNTERS = {
    "zero": (0, 0, 0, 0),
    "step1": (2**32 + 5, 1, 3, 2),
    "high-step": (2**63 - 1, 2**31 + 3, 2**31, 2**23),
    "last": (2**63 - 1, 2**32 - 1, 2**32 - 1, 2**24 - 1),
}


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "0d"


def key_of(seed: int, step: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


@jit(do_not_specialize=["group", "tensor", "third"])
def _words_kernel(out_ptr, key_ptr, group, tensor, third, WIDE: tl.constexpr):
    o = tl.arange(0, 4)
    o_group = o.to(tl.int64 if WIDE else tl.int32) + group
    w0, w1, w2, w3 = words(key_ptr, o_group, tensor, third)
    tl.store(out_ptr + 4 * o, w0.to(tl.int64))
    tl.store(out_ptr + 4 * o + 1, w1.to(tl.int64))
    tl.store(out_ptr + 4 * o + 2, w2.to(tl.int64))
    tl.store(out_ptr + 4 * o + 3, w3.to(tl.int64))


def as_int32(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def triton_words(seed: int, counter: tuple[int, ...], device: torch.device, wide: bool) -> Any:
    """Words of four groups from counter[0] on."""
    group, tensor, step, third = counter
    out = torch.zeros(4, 4, dtype=torch.int64, device=device)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    key = key_of(signed, step, device)
    group = group if wide else as_int32(group)
    _words_kernel[(1,)](out, key, group, tensor, third, WIDE=wide)
    return out.cpu()


@pytest.mark.parametrize(("counter", "seed", "answer"), KNOWN.values(), ids=KNOWN)
class TestKnownAnswers:
    def test_numpy_model(self, counter: Any, seed: int, answer: Any) -> None:
        got = philox(seed, np.array([counter[0]]), *counter[1:])
        assert tuple(int(w[0]) for w in got) == answer

    def test_reference(self, counter: Any, seed: int, answer: Any) -> None:
        got = philox_torch(seed, torch.tensor([counter[0]]), *counter[1:])
        assert tuple(int(w) for w in got) == answer

    def test_numba(self, counter: Any, seed: int, answer: Any) -> None:
        pytest.importorskip("numba")
        from zo_kernels.cpu.kernels import BITS, fill_int

        z = np.zeros(4, np.int64)
        rest = [np.uint32(c) for c in (*counter[1:], seed & ONES, seed >> 32)]
        fill_int(z, BITS, counter[0], 1, 0, 1, *rest)
        assert tuple(z.tolist()) == answer

    @pytest.mark.skipif(not has_triton(), reason="needs triton")
    def test_triton(self, counter: Any, seed: int, answer: Any, device: torch.device) -> None:
        assert tuple(triton_words(seed, counter, device, wide=False)[0].tolist()) == answer


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("counter", [(7, 1, 2, 3), (2**31 - 2, 2**32 - 1, 2**32 - 1, 2**26 - 1)])
def test_int64_groups_give_the_32_bit_generator(counter: Any, device: torch.device) -> None:
    """An int64 counter would silently select Philox4x64 in `tl.philox`."""
    narrow, wide = (triton_words(2**62 + 11, counter, device, wide=w) for w in (False, True))
    expected = np.stack(philox(2**62 + 11, np.arange(4) + counter[0], *counter[1:]), -1)
    assert torch.equal(narrow, wide)
    assert np.array_equal(wide.numpy(), expected.astype(np.int64))


@pytest.mark.parametrize("counters", COUNTERS.values(), ids=COUNTERS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_equal_the_model(
    kind: str, shape: Any, counters: Any, backend: str, device: torch.device
) -> None:
    seed, step, tensor, query = counters
    args: Any = {"tensor": tensor, "query": query, "noise": kind}
    if kind == "sparse_int8":
        args |= {"p_zero": 0.3, "r_max": 15}
    z = sample(shape, key_of(seed, step, device), **args, backend=backend)
    assert z.is_contiguous() and z.shape == shape
    assert torch.equal(z.cpu().double(), model(shape, seed, step, **args).double())


@pytest.mark.parametrize("purpose", ["noise", "rounding", "dropout", "data", "sample_left", "node"])
def test_purposes_equal_the_model(purpose: str, backend: str, device: torch.device) -> None:
    args: Any = {"tensor": 3, "query": 2**24 - 1, "noise": "bits", "purpose": purpose}
    z = sample((3, 7), key_of(9, 4, device), **args, backend=backend)
    assert torch.equal(z.cpu(), model((3, 7), 9, 4, **args))


SPARSE = [(0.0, 1), (0.0, 127), (0.5, 3), (0.33, 15), (0.9999, 127), (0.999999, 2)]


@pytest.mark.parametrize(("p_zero", "r_max"), SPARSE)
def test_sparse_map_on_every_16_bit_number(p_zero: float, r_max: int) -> None:
    h = torch.arange(1 << 16)
    expected = torch.tensor([sparse_value(int(x), p_zero, r_max) for x in h])
    assert torch.equal(sparse_int8_torch(h, p_zero, r_max), expected)
    assert expected.abs().max() <= r_max


@pytest.mark.parametrize(("p_zero", "r_max"), SPARSE)
def test_sparse_equals_the_model(
    p_zero: float, r_max: int, backend: str, device: torch.device
) -> None:
    args: Any = {"tensor": 1, "noise": "sparse_int8", "p_zero": p_zero, "r_max": r_max}
    z = sample((40, 129), key_of(17, 3, device), **args, backend=backend)
    assert z.dtype == torch.int8
    assert torch.equal(z.cpu().long(), model((40, 129), 17, 3, **args))


@pytest.mark.parametrize("counters", COUNTERS.values(), ids=COUNTERS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_normals_are_near_the_model(
    shape: Any, counters: Any, backend: str, device: torch.device
) -> None:
    seed, step, tensor, query = counters
    z = sample(shape, key_of(seed, step, device), tensor=tensor, query=query, backend=backend)
    exact = model(shape, seed, step, tensor=tensor, query=query)
    assert z.dtype == torch.float32
    assert (z.cpu().double() - exact).abs().max() <= NORMAL_ERROR


@pytest.mark.parametrize("kind", ["normal", *INTEGERS])
def test_a_slice_of_rows_is_that_of_the_whole(
    kind: str, backend: str, device: torch.device
) -> None:
    key = key_of(5, 6, device)
    whole = sample((9, 3, 50), key, tensor=2, noise=kind, backend=backend)
    for first in (0, 1, 7):
        part = sample((2, 3, 50), key, tensor=2, noise=kind, first_row=first, backend=backend)
        assert torch.equal(part, whole[first : first + 2])
    with pytest.raises(ValueError, match="first_row"):
        sample((2, 3), key, tensor=0, first_row=-1, backend=backend)
    with pytest.raises(ValueError, match="groups"):
        sample((2, 3), key, tensor=0, noise=kind, first_row=2**32 - 1, backend=backend)


@pytest.mark.parametrize("kind", ["normal", *INTEGERS])
@pytest.mark.parametrize("shape", [(7, 3, 5, 5), (0,), (0, 3), (3, 0), (2, 0, 3, 3)], ids=shape_id)
def test_a_row_is_the_same_whatever_follows_it(
    shape: Any, kind: str, backend: str, device: torch.device
) -> None:
    """Also for empty tensors: nothing is launched, the shape is right."""
    key = key_of(5, 6, device)
    z = sample(shape, key, tensor=2, noise=kind, backend=backend)
    assert z.shape == shape
    if len(shape) > 1 and shape[0] > 0:
        longer = sample((shape[0] + 9, *shape[1:]), key, tensor=2, noise=kind, backend=backend)
        assert torch.equal(longer[: shape[0]], z)


@pytest.mark.parametrize("kind", ["normal", *INTEGERS])
def test_convolution_columns_have_channels_innermost(
    kind: str, backend: str, device: torch.device
) -> None:
    co, ci, kh, kw = 3, 5, 2, 4
    key = key_of(5, 6, device)
    z = sample((co, ci, kh, kw), key, tensor=2, noise=kind, backend=backend)
    flat = sample((co, ci * kh * kw), key, tensor=2, noise=kind, backend=backend)
    for row, i, y, x in product(range(co), range(ci), range(kh), range(kw)):
        assert z[row, i, y, x] == flat[row, (y * kw + x) * ci + i]


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("kind", ["normal", *INTEGERS])
def test_block_size_does_not_show(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("zo_kernels.triton.noise")
    results = []
    for block in (256, 512, 1024, 2048):
        monkeypatch.setattr(module, "BLOCK", block)
        results.append(
            sample((5, 333), key_of(5, 6, device), tensor=2, noise=kind, backend="triton")
        )
    assert all(torch.equal(results[0], z) for z in results[1:])


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("kind", ["normal", *INTEGERS])
def test_int64_offsets_give_the_same_noise(kind: str, device: torch.device) -> None:
    module: Any = import_module("zo_kernels.triton.noise")
    per, per_row = module.PER_CALL[kind], module.groups_per_row(333, kind)
    results = []
    for wide in (False, True):
        z = torch.zeros(5 * per_row * per, dtype=module.SAMPLE_DTYPES[kind], device=device)
        module._sample_kernel[(-(-z.numel() // 1024),)](
            z,
            key_of(5, 6, device),
            *(2, 0, 100, 3, 0, z.numel()),
            NOISE=module.KIND[kind],
            PER=per,
            INT64=wide,
            BLOCK=1024,
        )
        results.append(z)
    assert torch.equal(*results)
    assert results[0].count_nonzero() > 0


def test_order_of_calls_does_not_show(backend: str, device: torch.device) -> None:
    def draw(tensor: int) -> torch.Tensor:
        return sample((3, 50), key_of(5, 6, device), tensor=tensor, backend=backend)

    first = [draw(t) for t in range(4)]
    torch.manual_seed(123)  # torch's generator takes no part
    again = [draw(t) for t in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
