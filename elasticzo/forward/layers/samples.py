"""Layers that are learnt by noise of each sample: their product at `w`, and what the noise adds.

With `W` a layer's weight, x_i the input of sample i, and e = +-eps s of a half:

    sample  y_i = W x_i + b + e (u_i . x_i) r_i + e t_i      one product of all halves, one thin one
    node    y_i = W x_i + b + e m n_i                        m makes eps a size of weights

`elasticzo.samples` has r, u and t. Noise of nodes belongs to an output's element, call and query;
for the step the layer keeps the mean of its inputs over the points (`Kept`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo.directions import draw
from elasticzo.forward.halves import NotBySample
from elasticzo.forward.passes import Kept, Layer, Pass
from elasticzo.head import HeadParameter

MAX_CALLS = 1 << 8  # of one layer in a forward
CALL_SHIFT = 16  # a query's number stands below


def count_samples(current: Pass, layer: Layer, x: Tensor) -> int:
    """Samples of a half, which must be dimension 0 of what the layer reads."""
    if current.batch is None:
        raise NotBySample(layer, "the model's inputs do not say how many samples there are")
    if x.dim() == 0 or x.shape[0] != current.count * current.batch:
        rows = x.shape[0] // current.count if x.dim() else 1
        raise NotBySample(layer, f"its input has {rows} rows for {current.batch} samples")
    return current.batch


def perturbed(current: Pass, layer: Layer, local: str) -> HeadParameter | None:
    """What belongs to a parameter that noise is to move now; None where it stays, or someone around
    has perturbed it."""
    head = layer.head.get(local)
    if head is None or head.scale == 0.0 or (id(layer.module), local) in current.swapped:
        return None
    return head


def sides(current: Pass) -> Iterator[tuple[int, float] | None]:
    """(query, sign) of each point that runs now, None of `w` itself."""
    here = current.staging.here
    if here.base:
        yield None
    yield from here.signed()


def rank_one(
    current: Pass, head: HeadParameter, p: Tensor, samples: int, kind: str
) -> tuple[Tensor, Tensor | None]:
    """`e r [n, B, N]` and `u [n, B, K...]` of all points that run now, in float32 at least; of one
    query `u` is one for all."""
    of = current.samples if kind == "sample" else current.whole_batch
    eps = current.staging.eps
    made: dict[int, tuple[Tensor, Tensor | None]] = {}
    rs: list[Tensor] = []
    us: list[Tensor | None] = []
    wide = torch.promote_types(p.dtype, torch.float32)
    for side in sides(current):
        query, sign = side or (0, 0.0)
        if query not in made:
            at = (head, p.shape, current.key, query, current.first, samples, current.backend)
            r, u = of.of_samples(*at)
            made[query] = (r.to(wide), None if u is None else u.to(wide))
        r, u = made[query]
        rs.append(r * (sign * head.scale * eps).to(wide))
        us.append(u)
    found = [u for u in us if u is not None]
    if not found:
        return torch.stack(rs), None
    one = len(made) == 1
    return torch.stack(rs), found[0].expand(len(us), *found[0].shape) if one else torch.stack(found)


# ---- products


def add_noise(current: Pass, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """The outputs `y` of a product at `w`, to which the noise of its kind is added in place where
    their memory allows it."""
    if not current.staging.points.halves or (
        layer.kind.name != "node" and not current.staging.perturbs
    ):
        return y
    with torch.autocast(x.device.type, enabled=False):
        if layer.kind.name == "node":
            return add_nodes(current, layer, x, y)
        return add_samples(current, layer, x, y, layer.kind.name)


def add_samples(current: Pass, layer: Layer, x: Tensor, y: Tensor, kind: str) -> Tensor:
    """The outputs `y` at `w`, and what the directions of the samples add to them."""
    m: Any = layer.module
    samples = count_samples(current, layer, x)
    weight, bias = (perturbed(current, layer, local) for local in ("weight", "bias"))
    if weight is not None:
        r, u = rank_one(current, weight, m.weight, samples, kind)
        assert u is not None
        v = _thin(m, current.original(x), x, u.to(x.dtype))
        y = _add_outer(m, y, v, r.flatten(0, 1).to(y.dtype))
    if bias is not None:
        t = rank_one(current, bias, m.bias, samples, kind)[0].flatten(0, 1).to(y.dtype)
        y = y + _over_places(m, t, y)
    return y


def _over_places(m: nn.Module, t: Tensor, y: Tensor) -> Tensor:
    """`[n B, N]` seen beside outputs: channels are last behind a linear layer, else dimension 1."""
    places = y.dim() - 2
    shape = (*[1] * places, t.shape[1]) if isinstance(m, nn.Linear) else (t.shape[1], *[1] * places)
    return t.view(len(t), *shape)


def _thin(m: Any, shared: Tensor | None, x: Tensor, u: Tensor) -> Tensor:
    """`u_i . x_i` at every place: `[n B, places...]`, a convolution's `[n B, groups, places...]`;
    made once where the points have one input and one query."""
    if shared is not None and u.stride(0) == 0:
        v = _thin_of(m, shared, u[0])
        return v.expand(len(u), *v.shape).flatten(0, 1)
    return _thin_of(m, x, u.flatten(0, 1))


def _thin_of(m: Any, x: Tensor, u: Tensor) -> Tensor:
    if isinstance(m, nn.Linear):
        if x.dim() == 2:
            return (x * u).sum(-1)
        return torch.bmm(x.flatten(1, -2), u.unsqueeze(2)).view(x.shape[:-1])
    # Each sample by filters of its own: samples are groups of one convolution.
    x, padding = pad_input(m, x)
    filters = u.unsqueeze(1).expand(-1, m.groups, *u.shape[1:]).flatten(0, 1).unsqueeze(1)
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    v = conv(
        x.reshape(1, -1, *x.shape[2:]),
        filters.flatten(0, 1),
        None,
        m.stride,
        padding,
        m.dilation,
        len(x) * m.groups,
    )
    return v.view(len(x), m.groups, *v.shape[2:])


def pad_input(m: Any, x: Tensor) -> tuple[Tensor, Any]:
    """The input of a convolution and the padding that is left to do: zeros, as numbers."""
    if m.padding_mode != "zeros" or isinstance(m.padding, str):
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        return F.pad(x, m._reversed_padding_repeated_twice, mode=mode), [0] * len(m.kernel_size)
    return x, list(m.padding)


def _add_outer(m: Any, y: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """`y_i + v_i r_i^T`, a rank-one product a sample, in one pass over `y`: in place where the
    places lie one after the other (a reshape that copies leaves `y` as it was)."""
    v = v.to(y.dtype)
    if isinstance(m, nn.Linear):
        if y.dim() == 2:
            return y.addcmul_(v.unsqueeze(1), r)
        flat = y.flatten(1, -2).baddbmm_(v.flatten(1).unsqueeze(2), r.unsqueeze(1))
        return flat.view_as(y)
    groups = m.groups
    rows = y.reshape(len(y) * groups, y.shape[1] // groups, -1)
    v = v.reshape(len(y) * groups, 1, -1)
    return rows.baddbmm_(r.reshape(len(y) * groups, -1, 1), v).view_as(y)


# ---- nodes


def add_nodes(current: Pass, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """The outputs `y` at `w`, and noise on them; the layer keeps its input for the step."""
    if not current.staging.points.halves:
        return y
    samples = count_samples(current, layer, x)
    own = {h: perturbed(current, layer, h) for h in layer.head}
    found = {local: one for local, one in own.items() if one is not None}
    if not found:
        return y
    head = found.get("weight") or found["bias"]
    kept = keep(current, layer, head, found, samples, x, y)
    amount = current.staging.eps * (head.scale * node_unit(layer.module))
    wide = torch.promote_types(y.dtype, torch.float32)
    made: dict[int, Tensor] = {}
    for point, side in enumerate(sides(current)):
        if side is None:
            continue
        query, sign = side
        if query not in made:
            at = (current.samples.noise, kept, current.key, query, current.backend)
            made[query] = node_noise(*at).to(wide).mul_(amount.to(wide)).to(y.dtype)
        y[point * samples : (point + 1) * samples].add_(made[query], alpha=sign)
    return y


def node_unit(m: Any) -> float:
    """m: noise of size eps on weights moves an output by eps |x|, about eps sqrt(K)."""
    if isinstance(m, nn.Embedding):
        return 1.0
    return math.sqrt(m.weight[0].numel())


def node_noise(noise: str, kept: Kept, key: Tensor, query: int, backend: str) -> Tensor:
    """`n_i [B, ...]` of one call: an element for each of the outputs."""
    head = kept.head
    if kept.call >= MAX_CALLS or query >= 1 << CALL_SHIFT:
        raise ValueError(
            f"node directions serve {MAX_CALLS} calls of a layer in a forward and "
            f"{1 << CALL_SHIFT} queries, got call {kept.call} of {kept.layer.name!r} and query "
            f"{query}"
        )
    stream = query + (kept.call << CALL_SHIFT)
    z = draw(noise, kept.shape, head, key, stream, backend, "node", first_row=kept.first)
    still = head.still_row
    if still is not None and isinstance(kept.layer.module, nn.Embedding):
        z = z * (kept.x != still).unsqueeze(-1)  # a padding token learns nothing
    return z


def keep(
    current: Pass,
    layer: Layer,
    head: HeadParameter,
    own: dict[str, HeadParameter],
    samples: int,
    x: Tensor,
    y: Tensor,
) -> Kept:
    """Add the inputs that came now to the mean over the points; tokens are the same at all."""
    call = current.next_call(head)  # layers that share the weight count together
    n, shape = current.count, torch.Size([samples, *y.shape[1:]])
    kept, shared = current.kept.get((head.name, call)), current.original(x)
    one = x.detach() if shared is None else shared.detach()
    if shared is None and n > 1:
        one = one.view(n, samples, *x.shape[1:])
        one = one.mean(0) if x.is_floating_point() else one[0]
    if kept is None:
        if n < current.halves and x.is_floating_point():
            one = one * (n / current.halves)
        kept = Kept(layer, call, current.first, head, own, shape, one)
        current.kept[head.name, call] = kept
    elif x.is_floating_point():
        kept.x = kept.x + one * (n / current.halves)
    kept.version = 0 if kept.x.is_inference() else kept.x._version
    return kept


# ---- normalisation


def affine(current: Pass, layer: Layer, y: Tensor, dim: int) -> Tensor:
    """Normalised values times the weight and plus the bias of each sample; `dim`: their first
    dimension in `y`."""
    samples = count_samples(current, layer, y)
    found: list[Tensor | None] = []
    for local in ("weight", "bias"):
        p = layer.module._parameters.get(local)
        if p is None:
            found.append(None)
            continue
        head, value = perturbed(current, layer, local), p.detach().unsqueeze(0)
        if head is not None:
            value = value + rank_one(current, head, p, samples, "sample")[0].flatten(0, 1)
        after = y.dim() - dim - p.dim()
        found.append(
            value.reshape(len(value), *[1] * (dim - 1), *p.shape, *[1] * after).to(y.dtype)
        )
    weight, bias = found
    if weight is not None:
        y = y * weight if bias is None else torch.addcmul(bias, y, weight)
    return y
