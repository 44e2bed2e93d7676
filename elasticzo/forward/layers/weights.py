"""How a known layer serves the halves of the pair: fused, or staged and then the library's call.

Fused, one kernel reads the weight once, makes `z` in registers and gives the outputs of all halves.
Staged, the halves of the weight are written first, in chunks of rows where they are large, so that
no more than `CHUNK_BYTES` of them exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo.forward.layers import samples, staged
from elasticzo.forward.layers.registry import serves
from elasticzo.forward.passes import Layer, Pass
from elasticzo.forward.precision import compute_dtype, precision_of, vendor_precision
from elasticzo.head import BY_SAMPLE, Kind
from zo_kernels import paired_conv1d, paired_conv2d, paired_linear
from zo_kernels.paths import Work, choose

FUSED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # what has a fused kernel
FUSED_DTYPES = (torch.float32, torch.bfloat16)
CHUNK_BYTES = 64 << 20


@serves(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
def product(current: Pass, layer: Layer, x: Tensor) -> Tensor:
    """The outputs of all halves that run now, stacked."""
    if current.wanted is None:
        return _product(current, layer, x)
    # What the user named goes before autocast, on every path.
    with torch.autocast(x.device.type, enabled=False):
        return _product(current, layer, x)


def _product(current: Pass, layer: Layer, x: Tensor) -> Tensor:
    m: Any = layer.module
    dtype = compute_dtype(x.device, current.wanted)
    if layer.kind.name in BY_SAMPLE or (layer.kind.name == "rank1" and _thin(current, m, x)):
        return _with_noise(current, layer, x, dtype)
    if layer.fusable and path_of(current, layer, x, dtype) == "fused":
        with current.unwatched():
            return _fused(current, layer, x, dtype)
    linear = isinstance(m, nn.Linear)
    if linear and _chunks(current, layer, dtype) > 1 and not x.requires_grad:
        with vendor_precision(x.device, current.precision):
            return _linear_in_chunks(current, layer, x, dtype)
    parameters = staged.stage_all(current, layer, dtype)
    run: Callable[..., Tensor] = staged.linear if linear else staged.conv
    half = current.original(x)
    if half is not None and staged.shares_input(m):
        run, x = staged.conv_of_shared, half  # the model's input as it came: read once for all
    return _call(current, run, m, x, parameters, current.count, dtype)


def _thin(current: Pass, m: Any, x: Tensor) -> bool:
    """Whether a direction of rank one is cheaper as a thin product beside that of all halves, which
    costs a pass over the outputs, than as halves of the weight."""
    channels = x.shape[-1] if isinstance(m, nn.Linear) else x.shape[1]
    rows = x.numel() // (current.count * max(channels, 1))  # places of all samples of a half
    return bool(m.weight.shape[1:].numel() > rows)


def _call(
    current: Pass,
    run: Callable[..., Tensor],
    m: Any,
    x: Tensor,
    parameters: staged.Staged,
    n: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """One of torch's own calls in the arithmetic that the user named."""
    with vendor_precision(x.device, current.precision):
        if dtype is None or current.wanted is None:
            return run(m, x, parameters, n)
        cast = {k: t if t is None else t.to(dtype) for k, t in parameters.items()}
        return run(m, x.to(dtype), cast, n).to(x.dtype)


def _with_noise(current: Pass, layer: Layer, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The product at `w`, all halves in one call, and what the noise adds to it."""
    m: Any = layer.module
    run = staged.linear if isinstance(m, nn.Linear) else staged.conv
    with current.unwatched():
        own = {local: None if p is None else p.unsqueeze(0) for local, p in m._parameters.items()}
        own.setdefault("bias", None)
        y = _call(current, run, m, x, own, 1, dtype)
        if layer.kind.name == "auto":
            _settle(current, layer, y)
        before = y if current.watch is None else y.clone()
        y = samples.add_noise(current, layer, x, y)
    current.note_noise(layer, before, y)
    return y


def _settle(current: Pass, layer: Layer, y: Tensor) -> None:
    """The kind that looks into fewer dimensions: N P of nodes at P places, or N K of a sample."""
    m: Any = layer.module
    inputs = m.weight[0].numel()
    places = y[0].numel() // m.weight.shape[0]
    kind = "node" if places < inputs else "sample"
    sign = "<" if places < inputs else ">="
    current.settle(layer, Kind(kind, f"{places} places {sign} {inputs} inputs", True))


BY_TOKEN = Kind("node", "a token's row is its output")


@serves(nn.Embedding, kinds={"sample": BY_TOKEN, "auto": BY_TOKEN})
def embedding(current: Pass, layer: Layer, x: Tensor) -> Tensor:
    """Rows of the tables of all halves."""
    m: Any = layer.module
    if layer.kind.name == "node":
        with current.unwatched():
            y = F.embedding(x, m.weight)
            before = y if current.watch is None else y.clone()
            y = samples.add_nodes(current, layer, x, y)
        current.note_noise(layer, before, y)
        return y
    return staged.embedding(m, x, staged.stage_all(current, layer), current.count)


# ---- the choice


def why_not_fused(layer: Layer) -> str | None:
    """What keeps a layer from the fused path whatever its input, or None."""
    m = layer.module
    if type(m) not in FUSED:
        return f"a {type(m).__name__} has no fused kernel"
    if "weight" not in layer.head:
        return "its weight is not perturbed"
    if isinstance(m, (nn.Conv1d, nn.Conv2d)):
        if m.groups != 1:
            return f"it has {m.groups} groups"
        if m.padding_mode != "zeros" or isinstance(m.padding, str):
            return f"its padding is {m.padding!r} ({m.padding_mode})"
    return None


def path_of(current: Pass, layer: Layer, x: Tensor, dtype: torch.dtype | None) -> str:
    """The path of this call: the user's, else the rule's where a kernel runs at all."""
    m: Any = layer.module
    w = m.weight
    computed = dtype or w.dtype
    possible = (
        current.staging.kernels
        and layer.kind.name == "weight"
        and not (torch.is_grad_enabled() and x.requires_grad)
        and _perturbed_whole(current, layer)
        and {x.dtype, w.dtype, computed} <= set(FUSED_DTYPES)
        and (dtype is not None or x.dtype == w.dtype)
        and (x.dim() >= 2 if isinstance(m, nn.Linear) else x.dim() == w.dim())
    )
    if layer.path == "staged" or not possible:
        return "staged"
    if layer.path == "fused":
        return "fused"
    if current.backend != "triton":
        return "staged"
    return choose(work_of(current, m, x, computed), x.device.index)


def _perturbed_whole(current: Pass, layer: Layer) -> bool:
    """Whether a kernel may perturb the weight itself: all of it, as nobody around did before."""
    head = layer.head["weight"]
    swapped = any((id(layer.module), local) in current.swapped for local in layer.head)
    return head.scale != 0.0 and head.still_row is None and not swapped


def work_of(current: Pass, m: Any, x: Tensor, computed: torch.dtype) -> Work:
    """What the rule looks at."""
    w: Tensor = m.weight
    inputs = w.numel() // w.shape[0]
    elements = x.numel() // current.count
    if isinstance(m, nn.Linear):
        rows = elements // max(inputs, 1)
    else:
        sizes = zip(x.shape[2:], m.kernel_size, m.stride, m.padding, m.dilation, strict=True)
        rows = x.shape[0] // current.count
        for n, k, stride, padding, dilation in sizes:
            rows *= (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    return Work(
        rows=rows,
        outputs=w.shape[0],
        inputs=inputs,
        queries=max(current.count // 2, 1),
        x=elements,
        y=rows * w.shape[0],
        shared=current.original(x) is not None,
        noise=current.staging.noise,
        x_dtype=x.dtype,
        w_dtype=w.dtype,
        compute=computed,
        precision=precision_of(x.device, not isinstance(m, nn.Linear), current.precision),
        half=current.half is not None,
        convolution=not isinstance(m, nn.Linear),
    )


# ---- fused


def _fused(current: Pass, layer: Layer, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    m: Any = layer.module
    head, bias = layer.head["weight"], layer.head.get("bias")
    for local, one in layer.head.items():
        current.note_fused(m._parameters[local], one, dtype if local == "weight" else None)
    original = current.original(x)
    settings: dict[str, Any] = {
        "tensor": head.index,
        "bias_tensor": bias.index if bias is not None else 0,
        **current.staging.span,
        "shared": original is not None,
        "noise": current.staging.noise,
        "scale": head.scale,
        "bias_scale": bias.scale if bias is not None else 0.0,
        "precision": precision_of(x.device, not isinstance(m, nn.Linear), current.precision),
        "compute_dtype": dtype or m.weight.dtype,
        "backend": current.backend,
    }
    given = (m.weight, m.bias, current.key, current.staging.eps)
    source = x if original is None else original
    follow = current.follow if current.follow is not None and current.follow.module is m else None
    if follow is not None:
        settings["relu"] = follow.relu
    if isinstance(m, nn.Linear):
        y = paired_linear(source.flatten(0, -2), *given, **settings)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
    else:
        where = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation}
        if isinstance(m, nn.Conv1d):
            settings |= {name: value[0] for name, value in where.items()}
            y = paired_conv1d(source, *given, **settings)
        else:
            settings |= {**where, "pool": follow is not None and follow.pool}
            y = paired_conv2d(source, *given, **settings)
    if follow is not None:
        follow.done = True
    return y.to(x.dtype) if current.wanted is not None else y


# ---- staged in chunks


def _chunks(current: Pass, layer: Layer, dtype: torch.dtype | None) -> int:
    """Into how many parts the staged halves of a linear layer are cut."""
    m: Any = layer.module
    if current.backend != "triton" or "weight" not in layer.head or not current.staging.kernels:
        return 1
    if current.watch is not None or not _perturbed_whole(current, layer):
        return 1
    if layer.kind.name != "weight":
        return 1
    size = current.count * m.weight.numel() * (dtype or m.weight.dtype).itemsize
    return int(-(-size // CHUNK_BYTES))


def _linear_in_chunks(current: Pass, layer: Layer, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A linear layer whose staged halves exist a chunk of output features at a time."""
    m: Any = layer.module
    source = x if current.wanted is None else x.to(dtype)
    y = source.new_empty(*x.shape[:-1], m.out_features)
    rows = -(-m.out_features // _chunks(current, layer, dtype) // 128) * 128
    bias = None
    if m.bias is not None:
        bias = m.bias.expand(current.count, -1)
        if "bias" in layer.head:
            bias = current.stage(m.bias, layer.head["bias"], dtype)
    head = layer.head["weight"]
    rows_of = current.staging.rows
    pending, first = current.staging.take_pending(m.weight), 0
    try:
        while first < m.out_features:
            here = slice(first, first + rows)
            w = rows_of(m.weight[here], head, first, dtype, pending)
            first += rows
            b = None if bias is None else bias[:, here].to(w.dtype)
            y[..., here] = staged.linear(m, source, {"weight": w, "bias": b}, current.count)
            del w  # before the next chunk is made
    except BaseException:
        while pending is not None and first < m.out_features:  # the update reaches the other rows
            rows_of(m.weight[first : first + rows], head, first, dtype, pending)
            first += rows
        raise
    return y.to(x.dtype)
