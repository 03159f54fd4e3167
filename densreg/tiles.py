"""The arithmetic of a linear classifier without its logits: logsumexp, softmax and their gradients in tiles of classes.

:mod:`densreg.linear` has all classes on one process, :mod:`densreg.distributed` a shard of them on each: "the classes
here" are those of the weight that a function is given.

Notation: ``L = logsumexp(s)``, ``P = softmax(s)``, y the target, ``rest = log sum_{c != y} exp s_c``, ``own = s_y``.

    forward    rest, own, and the cotangent of the score's backward, G = dL/dh = P W     2 products of 2 B C D
    backward   upstream r of rest, g of own, U [B, D] of G;  T = U W^T,  d_b = <P, T>_b = U_b . G_b
               c = P (T - d + r exp(L - rest)) off the target,  g + P_y (T_y - d) at it
               dh = c W,  dW = c^T h + P^T U,  db = sum_b c               4 of them; 5 where s is computed again

Of rest and own the cross-entropy is ``softplus(rest - own)``, which keeps its digits where a sample is sure, and any
function of the target's logit (a margin) is plain torch on [B] numbers. Rows are float64 in any precision: they cost
nothing, and L would otherwise round at large logits. Half precision: products on a GPU take half operands and sum in
float32; a CPU takes them in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from densreg.ops import accumulation_dtype

_TILE_BYTES = {"cpu": 6 << 20}  # the [2B, tile] buffer: it should stay in the cache
_TILE_BYTES_ELSEWHERE = 64 << 20


def tile_size(h: Tensor) -> int:
    """Classes in a tile, which follow from the shape, dtype and type of device alone.

    At most 8192: over more of them the products' sums in float32 lose digits, where there are few rows and features.
    """
    budget = _TILE_BYTES.get(h.device.type, _TILE_BYTES_ELSEWHERE)
    classes = budget // (2 * max(len(h), 1) * accumulation_dtype(h.dtype).itemsize)
    return min(max(256, classes // 256 * 256), 8192)


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``; of half operands summed and returned in float32."""
    if a.dtype in (torch.float16, torch.bfloat16):
        # mm(out_dtype=) is there on CUDA alone.
        c = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
        return c if out is None else out.copy_(c)
    return torch.mm(a, b, out=out)


def _in_tile(y: Tensor, k: int, n: int) -> tuple[Tensor, Tensor]:
    """Whether the target is one of the classes k .. k + n - 1, [B, 1]; and its place there."""
    return ((y >= k) & (y < k + n)).unsqueeze(1), (y - k).clamp(0, n - 1).unsqueeze(1)


def kept_tiles(kept: Tensor | None, rows: int, dtype: torch.dtype, tile: int) -> Iterator[Tensor]:
    """Places for the logits [B, n] of the first tiles, as many as fit into the memory of the weight's gradient.

    The last one ends where the memory ends, so that the gradient of a tile overwrites only logits that have been read.
    """
    if kept is None or not rows:
        return iter(())
    wide = max(1, dtype.itemsize // kept.itemsize)
    flat = kept.view(-1)[: kept.numel() // wide * wide].view(dtype)
    fit = len(flat) // rows
    fit = len(kept) if fit >= len(kept) else fit // tile * tile
    return (s.view(rows, -1) for s in flat[len(flat) - rows * fit :].split(rows * tile) if fit)


def finite(ref: Tensor) -> Tensor:
    """[B], with 0 for -inf, the reference of a row without a finite logit: -inf - (-inf) would be NaN."""
    return ref.masked_fill(ref == -math.inf, 0)


def forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    dtype: torch.dtype,
    tile: int,
    need_score: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Over the classes here without the target: what logsumexp and its gradient are made of.

    Args:
        kept: where to leave logits for the backward, of the shape of the weight; see :func:`kept_tiles`.

    Returns:
        ``(m, ref, z, own, score)``: the largest logit [B], ``ref`` [B] near it (-inf where there is no class),
        ``z = sum exp(s - ref)`` [B] in float64, the target's logit [B] (0 where it is not here), and
        ``sum exp(s - ref) W`` [B, D].
    """
    acc, rows, classes = accumulation_dtype(dtype), len(h), len(weight)
    h = h.to(dtype)
    m = h.new_full((rows, 1), -math.inf, dtype=acc)
    ref, own = m, torch.zeros_like(m)
    z = torch.zeros_like(m, dtype=torch.float64)
    score = h.new_zeros(h.shape if need_score else (0,), dtype=acc)
    buffer = h.new_empty(rows * min(tile, classes), dtype=acc)
    headroom = 12 * math.log(2) if dtype == torch.float16 else 0.0  # exp up to 2^12: more of it is above fp16's tiny
    places = kept_tiles(kept, rows, acc, tile)
    for k in range(0, classes, tile):
        w = weight[k : k + tile].to(dtype)
        e = buffer[: rows * len(w)].view(rows, len(w))
        s = _mm(h, w.t(), next(places, e))
        if bias is not None:
            s.add_(bias[k : k + tile])
        if y is not None:
            inside, at = _in_tile(y, k, len(w))
            s_y = s.gather(1, at)
            own = torch.where(inside, s_y, own)
            s.scatter_(1, at, s_y.masked_fill(inside, -math.inf))
        m = torch.maximum(m, s.amax(1, keepdim=True))
        before, ref = ref, m.masked_fill(m == math.inf, 0) - headroom
        shift = finite(ref)
        torch.sub(s, shift, out=e).exp_()
        if y is not None and s is not e:
            s.scatter_(1, at, s_y)
        decay = (before.double() - shift).exp_()
        z = z * decay + e.sum(1, keepdim=True)
        if need_score:
            # Added apart: into what is there already the product would add one class after the other.
            score.mul_(decay.to(acc)).add_(_mm(e.to(dtype), w))
    return m.squeeze(1), ref.squeeze(1), z.squeeze(1), own.squeeze(1).double(), score


# --------------------------------------------------------------------------------------------------------------------
# of whole rows: what the tiles give, and what the backward takes


def logsumexp(a: Tensor, b: Tensor) -> Tensor:
    """[B], of two. Not logaddexp: its second derivative is NaN where they differ by more than exp can hold."""
    return torch.logsumexp(torch.stack([a, b]), 0)


def density_rows(rest: Tensor, own: Tensor, ignored: Tensor | None) -> Tensor:
    """The log density L [B], float64: where a target is ignored, or there is none, all is in ``rest``."""
    return rest if ignored is None else torch.where(ignored, rest, logsumexp(rest, own))


def sum_of_logits(h: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B], float64, from the sum of the weight's rows, which is taken in ``dtype``."""
    total = h.double() @ weight.sum(0, dtype=dtype).double()
    return total if bias is None else total + bias.sum(dtype=torch.float64)


def whole_score(score: Tensor, ref: Tensor, density: Tensor, weight: Tensor, y: Tensor | None, own: Tensor) -> Tensor:
    """P W over the classes here, from what :func:`forward` gives; in place.

    Args:
        density: L [B] over all classes.
        y: the target's place in the weight [B], -1 where it is not here; None without targets.
        own: the target's logit [B].
    """
    others = (ref - density).exp()  # 0 where all other classes are at -inf, whatever the target's logit is
    score *= others.masked_fill(ref == -math.inf, 0).to(score.dtype).unsqueeze(1)
    if y is not None:
        w_y = weight[y.clamp(min=0)].to(score.dtype)
        score.addcmul_(w_y, ((own - density).exp() * (y >= 0)).to(score.dtype).unsqueeze(1))
    return score


def off_target_factor(r: Tensor, density: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor:
    """``r exp(L - rest)`` [B]: what P is multiplied by off the target."""
    # Where the exponential would overflow, r is 0 to every rounding. So is P, where the product is above float32.
    factor = r * (density - rest).clamp(max=700).exp()
    return factor if dtype == torch.float64 else factor.clamp(-1e38, 1e38)


# --------------------------------------------------------------------------------------------------------------------
# the backward


def backward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    density: Tensor,
    factor: Tensor,
    g: Tensor,
    q: Tensor | None,
    u: Tensor | None,
    dot: Tensor | None,
    dtype: torch.dtype,
    tile: int,
    needs: list[bool],
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in h, in the accumulation dtype, and in the weight and bias of the classes here, in theirs.

    Args:
        density: L [B] over all classes, float64.
        factor: ``r exp(L - rest)``, [B]: what P is multiplied by off the target.
        g: [B], added at the target.
        q: [B], added to every class, or None.
        u: U [B, D], or None, and dot = U . G [B].
        kept: what :func:`forward` left logits in, or None; the gradient in the weight takes its place.
    """
    acc, rows, classes = accumulation_dtype(dtype), len(h), len(weight)
    scale, unit = 1.0, None
    if dtype == torch.float16:
        # P of many classes is subnormal in fp16, so P and c are scaled; and c must not overflow under a loss scale, so
        # what comes from upstream, in which everything is linear, is divided by its size.
        scale = 2.0 ** max(1, math.ceil(math.log2(max(classes, 1)) / 2))
        upstream = [t.abs().amax().double() for t in (factor, g, q, u) if t is not None and t.numel()]
        peak = torch.stack([*upstream, density.new_zeros(())]).amax()
        unit = torch.where(peak == 0, 1.0, peak.log2().floor().exp2() * 8)
        factor, g = factor / unit, g / unit
        q, u, dot = (None if t is None else t / unit for t in (q, u, dot))
    # P scale = exp(s - high) * correction: L, rounded, and what that costs, which goes into U, T, d and the factor
    high = (density - math.log(scale)).to(acc)
    correction = (high - density).exp() * scale
    both = swapped = h = h.to(dtype)
    if u is not None:
        u = (u * correction.unsqueeze(1)).to(dtype)
        stacked = torch.cat([h, u, h])
        both, swapped = stacked[: 2 * rows], stacked[rows:]  # [h; U] and [U; h]
    d = torch.zeros_like(factor) if dot is None else dot
    off, at_y = ((t * correction).to(acc).unsqueeze(1) for t in (factor - d, -d))
    own_grad = (g * scale).to(acc).unsqueeze(1)
    everywhere = None if q is None else (q * scale).to(acc).unsqueeze(1)
    high = high.unsqueeze(1)

    dh = h.new_zeros(h.shape, dtype=acc)
    dw = weight.new_empty(weight.shape if needs[1] else (0,)) if kept is None else kept
    db = h.new_empty(classes if needs[2] else 0, dtype=acc)
    buffer = h.new_empty(len(both) * min(tile, classes), dtype=acc)
    places = kept_tiles(kept, rows, acc, tile)
    for k in range(0, classes, tile):
        w = weight[k : k + tile].to(dtype)
        n = len(w)
        st = buffer[: len(both) * n].view(len(both), n)
        p, c = st[:rows], st[len(st) - rows :]  # c takes the place of T, or without U that of P
        s = next(places, None)
        if s is None:
            _mm(both, w.t(), st)  # [s; T] = [h; U] W^T
            s = p if bias is None else p.add_(bias[k : k + n])
        elif u is not None:
            _mm(u, w.t(), c)
        torch.sub(s, high, out=p).exp_()
        if y is not None:
            inside, at = _in_tile(y, k, n)
            c_y = own_grad if u is None else own_grad + p.gather(1, at) * (c.gather(1, at) + at_y)
        if u is None:
            c.mul_(off)
        else:
            c.add_(off).mul_(p)
        if y is not None:
            c.scatter_(1, at, torch.where(inside, c_y, c.gather(1, at)))
        if everywhere is not None:
            c.add_(everywhere)
        if needs[2]:
            torch.sum(c, 0, out=db[k : k + n])
        if needs[0]:
            dh.add_(_mm(c.to(dtype), w))
        if len(dw):  # [P; c]^T [U; h]
            if dtype == acc == dw.dtype:
                torch.mm(st.t(), swapped, out=dw[k : k + n])
            else:
                product = _mm(st.t().to(dtype), swapped)
                dw[k : k + n] = product if unit is None else product * (unit / scale)
    return (dh, dw, db) if unit is None else (dh * (unit / scale), dw, db * (unit / scale))
