"""The linear head of :mod:`densreg.linear` with its classes split over processes: torch.distributed, gloo or NCCL.

Each of N processes holds some rows of weight and bias, the shard of its rank, and B rows of the batch. No process holds
the weight, or logits, as a whole. With the notation of :mod:`densreg.tiles`:

    forward    all_gather of h and of the targets      every process: the tiles of its classes, for all N B rows
               all_reduce: largest, then sum           rest and own of all rows
               reduce_scatter of P W                   G = dL/dh of its own rows
    backward   all_gather of the upstream: r, g, q, U, d_b = U_b . G_b
               reduce_scatter of c W                   dh of its own rows; dW and db stay where they are

Only arrays of [N B, D] are sent, never the logits or the weight. All of it is inside of two operators, so that the
trunk sees an ordinary layer, its double backward runs as in one process, and torch.compile can compile the whole step
as one graph. The backward itself cannot be differentiated.

**Scaling.** The loss that a process returns belongs to its own rows, scaled so that the mean over the processes is the
loss of the whole batch, as one process would compute it. Let DistributedDataParallel average the trunk's gradients, or
divide their sum by N. The shard's gradients already are those of that mean: keep weight and bias out of
DistributedDataParallel.

**Errors.** At each forward the processes first exchange what they were given, a few numbers in host memory. If these do
not fit together, or one process was given something wrong, each raises an error. On GPUs the group needs gloo for this,
beside NCCL: ``init_process_group("cpu:gloo,cuda:nccl")``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from densreg import _torch, functional, linear, paths, penalty, tiles
from densreg.functional import _Function, _undifferentiated
from densreg.ops import accumulation_dtype
from densreg.paths import Inputs

OPERATORS = ("sharded_density", "sharded_density_backward")

_library = torch.library.Library("densreg", "FRAGMENT")
_library.define(
    "sharded_density(Tensor h, Tensor weight, Tensor? bias, Tensor target, int ignore_index, int? classes,"
    " ScalarType dtype, int? tile, bool need_score, bool need_mean, bool keep, str group)"
    " -> (Tensor rest, Tensor own, Tensor mean, Tensor score, Tensor correct, Tensor features, Tensor at,"
    " Tensor density, Tensor numbers, Tensor kept)"
)
_library.define(
    "sharded_density_backward(Tensor features, Tensor weight, Tensor? bias, Tensor at, Tensor density, Tensor rest,"
    " Tensor r, Tensor g, Tensor? q, Tensor? u, Tensor? dot, Tensor(a!)? kept, ScalarType dtype, int? tile,"
    " bool[] needs, str group) -> (Tensor, Tensor, Tensor)"
)

_ONCE = (
    "the class-parallel head can be differentiated once beyond the score, got create_graph=True, torch.func, forward "
    "mode or is_grads_batched: take densreg.linear_density_loss on one process"
)


# --------------------------------------------------------------------------------------------------------------------
# process groups and collectives


@torch.compiler.assume_constant_result
def _name_of(group: Any) -> str:
    """A group's name, which is what operators take; raises where there is none, or this process is not in it."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("expected a process group, got none: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise RuntimeError("group: expected one that this process belongs to, got another")
    backends = dist.get_backend_config(group)
    if "cpu" not in backends:
        raise RuntimeError(
            "group: expected one that takes tensors in host memory too, as of init_process_group"
            f'("cpu:gloo,cuda:nccl"), got {backends}'
        )
    return group.group_name


def _call(collective: Callable[..., Any], *args: Any, group: Any, **options: Any) -> None:
    try:
        collective(*args, group=group, **options)
    except RuntimeError as error:
        first = str(error).split("\n")[0]
        raise RuntimeError(
            f"the class-parallel head's {collective.__name__} failed in process {dist.get_rank(group)} of "
            f"{dist.get_world_size(group)}; another one has died, or did not come within the group's timeout: {first}"
        ) from error


def _newer(name: str, older: str) -> Callable[..., Any]:
    """A collective on whole tensors, which torch 2.14 has renamed."""
    return getattr(dist, name) if hasattr(dist, name) else getattr(dist, older)


def _gather(t: Tensor, group: Any) -> Tensor:
    """[n, ...] of each process -> [N n, ...], in the order of the ranks."""
    whole = t.new_empty((dist.get_world_size(group) * len(t), *t.shape[1:]))
    if whole.numel():
        _call(_newer("all_gather_single", "all_gather_into_tensor"), whole, t.contiguous(), group=group)
    return whole


def _reduce(t: Tensor, op: Any, group: Any) -> Tensor:
    if t.numel():
        _call(dist.all_reduce, t, op=op, group=group)
    return t


def _scatter_sum(t: Tensor, group: Any) -> Tensor:
    """[N n, ...] -> the sum's own [n, ...]."""
    own = t.new_empty((len(t) // dist.get_world_size(group), *t.shape[1:]))
    if own.numel():
        _call(_newer("reduce_scatter_single", "reduce_scatter_tensor"), own, t, group=group)
    return own


def _exchange(numbers: list[int], group: Any) -> list[list[int]]:
    """These numbers of every process, through host memory."""
    return _gather(torch.tensor([numbers], device="cpu"), group).tolist()


def _exchange_objects(mine: Any, group: Any) -> list[Any]:
    of_all = [None] * dist.get_world_size(group)
    _call(dist.all_gather_object, of_all, mine, group=group)
    return of_all


def _agree(same: dict[str, Any], shard: int, expected: int | None, group: Any) -> tuple[int, int]:
    """(the first class of the shard, all classes); raises in every process where the processes do not fit together.

    Args:
        same: what must be the same in all processes, by its name in an error.
        shard: how many classes there are here.
        expected: how many there should be in all shards, if it is known.
    """
    digest = int.from_bytes(hashlib.sha256(repr(same).encode()).digest()[:7], "little")
    failed, shards, digests = zip(*_exchange([0, shard, digest], group), strict=True)
    if any(failed):
        _raise_of_others("", group)
    if len(set(digests)) > 1:
        given = _exchange_objects({what: str(value) for what, value in same.items()}, group)
        what = next(what for what in same if len({each[what] for each in given}) > 1)
        values = ", ".join(each[what] for each in given)
        raise ValueError(f"{what}: expected the same in all processes, got, in the order of their ranks, {values}")
    total = sum(shards)
    if not total or expected not in (None, total):
        wanted = "at least one class" if expected is None else f"{expected} classes"
        raise ValueError(f"weight: expected {wanted} in all shards, got {' + '.join(map(str, shards))} = {total}")
    return sum(shards[: dist.get_rank(group)]), total


def _raise_of_others(mine: str, group: Any) -> NoReturn:
    """After an exchange in which a process said that it failed: raise RuntimeError with the first one's message."""
    messages = _exchange_objects(mine, group)
    rank = next(i for i, message in enumerate(messages) if message)
    raise RuntimeError(f"process {rank} of {len(messages)} failed: {messages[rank]}")


# --------------------------------------------------------------------------------------------------------------------
# the operators


@linear.no_grad_no_autocast
def _forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    classes: int | None,
    dtype: torch.dtype,
    tile: int | None,
    need_score: bool,
    need_mean: bool,
    keep: bool,
    name: str,
) -> tuple[Tensor, ...]:
    """The operator ``sharded_density``.

    Args:
        h, target: of this process's B rows. Targets are classes of all shards.
        weight, bias: of this process's classes, maybe none.
        classes: how many there are in all shards, to be checked; None for any number.
        need_score, need_mean, keep: as in ``linear_density``.
        name: of the process group.

    Returns:
        ``(rest, own, mean, score, correct)`` of this process's rows, as ``linear_density`` gives them; of all rows the
        features [N B, D], the target's place in this shard (-1: not here), L (float64); two numbers in float64: the
        targets that count, over the number of processes, and all classes; and ``kept`` of this shard.
    """
    group, shard = _torch.group_named(name), len(weight)
    same: dict[str, Any] = {"h: shape": list(h.shape), "h: dtype": h.dtype, "products: dtype": dtype}
    same |= {"weight: dtype": weight.dtype, "bias: dtype": None if bias is None else bias.dtype}
    same |= {"penalty": need_score, "label_smoothing > 0": need_mean, "ignore_index": ignore_index, "classes": classes}
    first, total = _agree(same, shard, classes, group)
    targets = _gather(target, group)
    linear.check_range(targets, total, ignore_index)
    counts = targets != ignore_index
    here = counts & (targets >= first) & (targets < first + shard)
    at = (targets - first).masked_fill(~here, -1)
    features = _gather(h, group)
    tile = tiles.tile_size(features) if tile is None else tile
    kept = weight.new_empty(weight.shape if keep else 0)
    into = kept if keep else None
    m, ref, z, own, score = tiles.forward(features, weight, bias, at, dtype, tile, need_score, into)
    largest, top = _reduce(torch.stack([m.double(), ref.double()]), dist.ReduceOp.MAX, group)
    z = z * (ref.double() - tiles.finite(top)).exp().masked_fill(z == math.inf, 1)
    sums = [z, own]
    if need_mean:
        sums.append(tiles.sum_of_logits(features, weight, bias, accumulation_dtype(dtype)))
    z, own, *of_logits = _reduce(torch.stack(sums), dist.ReduceOp.SUM, group)
    rest = tiles.finite(top) + z.log()
    density = tiles.density_rows(rest, own, ~counts)
    if need_score:
        score = _scatter_sum(tiles.whole_score(score, ref, density, weight, at if shard else None, own), group)
    mine = slice(dist.get_rank(group) * len(h), (dist.get_rank(group) + 1) * len(h))
    mean = of_logits[0][mine] / total if need_mean else rest.new_empty(0)
    correct = ((own > largest) & counts)[mine].clone()
    counted = counts.sum(dtype=torch.float64) / dist.get_world_size(group)
    numbers = torch.stack([counted, counted.new_full((), total)])
    return rest[mine].clone(), own[mine].clone(), mean, score, correct, features, at, density, numbers, kept


@linear.no_grad_no_autocast
def _backward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: Tensor,
    density: Tensor,
    rest: Tensor,
    r: Tensor,
    g: Tensor,
    q: Tensor | None,
    u: Tensor | None,
    dot: Tensor | None,
    kept: Tensor | None,
    dtype: torch.dtype,
    tile: int | None,
    needs: list[bool],
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``sharded_density_backward``: the gradients in this process's h, weight and bias.

    Of h it is that of the sum over the processes of what each differentiates; of weight and bias, of their mean.

    Args:
        features, at, density: the forward's, of all rows.
        rest, r, g, q, u, dot: of this process's rows, as for ``linear_density_backward``; q over the number of classes.
        kept: as there.
    """
    group = _torch.group_named(name)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = slice(rank * len(r), (rank + 1) * len(r))
    factor = tiles.off_target_factor(r, density[mine], rest, dtype)
    given = [t for t in (factor, g, q, dot) if t is not None]
    # Divided by N here, once, and not in [C, D].
    rows = iter(_gather(torch.stack(given, 1) / world, group).unbind(1))
    of_all = [None if t is None else next(rows) for t in (factor, g, q, dot)]
    whole_u = None if u is None else _gather(u / world, group)
    tile = tiles.tile_size(features) if tile is None else tile
    factor, g, q, dot = of_all  # type: ignore[assignment]
    dh, dw, db = tiles.backward(
        features, weight, bias, at, density, factor, g, q, whole_u, dot, dtype, tile, needs, kept
    )
    dw = dw if kept is None else dw.new_empty(0)
    dh = _scatter_sum(dh, group) * world if needs[0] else dh[mine].clone()
    return dh.to(features.dtype), dw, db if bias is None else db.to(bias.dtype)


def _forward_fake(h, weight, bias, target, ignore_index, classes, dtype, tile, need_score, need_mean, keep, group):
    rows = len(h) * dist.get_world_size(_torch.group_named(group))
    row = h.new_empty(len(h), dtype=torch.float64)
    score = h.new_empty(h.shape if need_score else 0, dtype=accumulation_dtype(dtype))
    mean, correct = row.new_empty(len(h) if need_mean else 0), torch.empty_like(row, dtype=torch.bool)
    of_all = h.new_empty(rows, h.shape[1]), target.new_empty(rows), row.new_empty(rows)
    kept = weight.new_empty(weight.shape if keep else 0)
    return row, torch.empty_like(row), mean, score, correct, *of_all, row.new_empty(2), kept


def _backward_fake(features, weight, bias, at, density, rest, r, g, q, u, dot, kept, dtype, tile, needs, group):
    return linear.gradients_fake(features, len(r), weight, bias, dtype, needs, kept)


linear.implement(_library, "sharded_density", _forward, _forward_fake)
linear.implement(_library, "sharded_density_backward", _backward, _backward_fake)


@torch.compiler.allow_in_graph
class _ShardedDensity(_Function):
    """The operators, differentiable once."""

    @staticmethod
    def forward(ctx, h, weight, bias, *args):
        output = torch.ops.densreg.sharded_density(h, weight, bias, *args)
        *_, dtype, tile, ctx.need_score, ctx.need_mean, keep, group = args
        rest, _, mean, score, correct, features, at, density, numbers, kept = output
        ctx.kept = [kept] if keep else []
        ctx.options = (dtype, tile, group)
        ctx.save_for_backward(weight, bias, features, at, density, rest, score, numbers)
        ctx.set_materialize_grads(False)
        absent = [t for t, here in ((score, ctx.need_score), (mean, ctx.need_mean)) if not here]
        ctx.mark_non_differentiable(correct, features, at, density, numbers, kept, *absent)
        return output

    @staticmethod
    def plain(*args):
        raise RuntimeError(_ONCE)

    @staticmethod
    def backward(ctx, r, g, q, u, *_):
        weight, bias, features, at, density, rest, score, numbers = ctx.saved_tensors
        if not _undifferentiated():
            raise RuntimeError(_ONCE)
        # The same in all processes, whatever each of them differentiates.
        r, g = (torch.zeros_like(rest) if v is None else v for v in (r, g))
        u = torch.zeros_like(score) if u is None and ctx.need_score else u
        q = torch.zeros_like(rest) if q is None and ctx.need_mean else q
        dot = None if u is None else (u.double() * score).sum(1)
        q = None if q is None else q / numbers[1]
        needs = list(ctx.needs_input_grad[:3])
        operator = torch.ops.densreg.sharded_density_backward
        kept = ctx.kept.pop() if ctx.kept else None
        dtype, tile, group = ctx.options
        dh, dw, db = operator(
            features, weight, bias, at, density, rest, r, g, q, u, dot, kept, dtype, tile, needs, group
        )
        grads = (dh, dw if kept is None else kept, db)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 9


# --------------------------------------------------------------------------------------------------------------------
# public


def _shard(
    weight: Tensor, bias: Tensor | None, classes: int | None, group: Any
) -> tuple[Tensor, Tensor | None, int | None, str]:
    """(weight, bias, classes, group's name): of DTensors, this process's part, their length, and the mesh's group."""
    if not (paths.is_dtensor(weight) or paths.is_dtensor(bias)):  # type: ignore[arg-type]
        return weight, bias, classes, _name_of(group)
    from torch.distributed.tensor import Shard

    given: dict[str, Any] = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, t in given.items():
        if not paths.is_dtensor(t):
            raise TypeError(f"{name}: expected a DTensor, as the other one of weight and bias, got a plain tensor")
        if t.device_mesh.ndim != 1 or tuple(t.placements) != (Shard(0),):
            raise ValueError(
                f"{name}: expected a DTensor on a mesh of one dimension with placements [Shard(0)], got "
                f"{list(t.placements)} on a mesh of shape {list(t.device_mesh.shape)}"
            )
        if t.device_mesh != given["weight"].device_mesh:
            raise ValueError("bias: expected the mesh of the weight, got another")
    mesh_group = given["weight"].device_mesh.get_group()
    if group is not None and group is not mesh_group:
        raise ValueError("group: expected None or the group of the weight's mesh, got another")
    local = {name: t.to_local(grad_placements=[Shard(0)]) for name, t in given.items()}
    classes = len(weight) if classes is None else classes
    return local["weight"], local.get("bias"), classes, _name_of(mesh_group)


def _checked(name: str, check: Callable[[], Any]) -> Any:
    """What a check of this process's arguments returns; where it raises, the other processes get to know."""
    if torch.compiler.is_compiling():
        return check()
    try:
        return check()
    except (TypeError, ValueError, RuntimeError) as error:
        with contextlib.suppress(RuntimeError):
            group = _torch.group_named(name)
            _exchange([1, 0, 0], group)
            _raise_of_others(f"{type(error).__name__}: {error}", group)
        raise


def _head(h, weight, bias, target, ignore_index, need_score, need_mean, classes, tile, group, keep=False):
    """(rest, own, mean, score, correct, numbers), differentiable once."""
    keep = keep and weight.requires_grad and torch.is_grad_enabled()
    options = (linear.product_dtype(h, weight), tile, need_score, need_mean, keep, group)
    of_all = _ShardedDensity.call(h, weight, bias, target, ignore_index, classes, *options)
    rest, own, mean, score, correct, *_, numbers, _ = of_all
    return rest, own, mean, score, correct, numbers


def linear_density_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    margin: Callable[[Tensor], Tensor] | None = None,
    *,
    classes: int | None = None,
    tile: int | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`densreg.linear_density_cross_entropy` with the classes split over processes.

    Arguments and errors as for :func:`linear_density_loss`. The results can be differentiated once.

    Returns:
        ``(cross_entropy [B], log_density [B], correct [B])`` of this process's rows, float32 (float64 for float64) and
        bool.
    """
    weight, bias, classes, name = _shard(weight, bias, classes, group)

    def check():
        linear.check_head(h, weight, bias, tile, least_classes=0)
        functional.check_target(h, target, label_smoothing, ignore_index)

    _checked(name, check)
    rest, own, mean, _, correct, numbers = _head(
        h, weight, bias, target, ignore_index, False, label_smoothing > 0, classes, tile, name
    )
    ignored, dtype = target == ignore_index, linear.row_dtype(h, weight)
    ce = linear.cross_entropy_rows(rest, own, mean, ignored, numbers[1], label_smoothing, margin)
    return ce.to(dtype), tiles.density_rows(rest, own, ignored).to(dtype), correct


def linear_density_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    x: Inputs,
    coeff: float | Tensor,
    p: float = 2,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    margin: Callable[[Tensor], Tensor] | None = None,
    *,
    classes: int | None = None,
    tile: int | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`densreg.linear_density_loss` with the classes split over processes, each of which has a part of the batch.

        h = trunk(x.requires_grad_())  # [B, D]
        loss, ce, penalty = densreg.distributed.linear_density_loss(
            h, weight_shard, bias_shard, y, x, coeff=0.1
        )

    Every process calls it with the same number of rows, and runs the backward. The mean of what the processes return is
    what one process would return for the whole batch. The trunk's gradients must be averaged over the processes, as
    DistributedDataParallel does; the shards' gradients are right as they are. The loss can be differentiated once: with
    ``create_graph=True`` the backward raises an error.

    Args:
        h: [B, D], this process's features, computed from x; fp16, bf16, fp32 or fp64.
        weight: [C_r, D], the rows of this process; the shards follow each other in the order of the ranks, and may
            differ in size, or be empty. Or a DTensor [C, D] with placements ``[Shard(0)]``, on a one-dimensional mesh;
            its gradient is a DTensor too.
        bias: [C_r], of the same kind, or None. A class at -inf is masked.
        target: [B] int64 classes in [0, C), counted over all shards, or ``ignore_index``.
        x, coeff, p, label_smoothing, ignore_index, margin: as in :func:`densreg.linear_density_loss`. There are no
            class weights.
        classes: C, with which the sum of the shards' sizes is compared; None: that sum, or the length of a DTensor.
        tile: how many classes are processed at a time; None: as many as suit the caches.
        group: the process group; None: all processes, or the group of the DTensor's mesh.

    Returns:
        ``(loss, cross_entropy, penalty)``, scalars; float32 (float64 for float64).

    Raises:
        TypeError, ValueError: what was given and what was expected, in the process whose arguments are wrong.
        ValueError: in every process, if the shards or other arguments of the processes do not fit together, or a
            target is out of range. On CUDA a target out of range is a device assert.
        RuntimeError: there is no process group; another process failed; a collective failed, at the latest after the
            group's timeout.
    """
    weight, bias, classes, name = _shard(weight, bias, classes, group)

    def check():
        penalty.check_coeff(coeff)
        order = functional.check_order(p)
        linear.check_head(h, weight, bias, tile, least_classes=0)
        xs = paths.check_inputs(h, x)
        linear.check_free_of(xs, weight=weight, bias=bias)
        functional.check_target(h, target, label_smoothing, ignore_index)
        return order, xs

    p, xs = _checked(name, check)
    rest, own, mean, score, _, numbers = _head(
        h, weight, bias, target, ignore_index, True, label_smoothing > 0, classes, tile, name, keep=True
    )
    ce = linear.cross_entropy_rows(rest, own, mean, target == ignore_index, numbers[1], label_smoothing, margin)
    cross_entropy = (ce.sum() / numbers[0]).to(linear.row_dtype(h, weight))
    of_x = linear.penalty_of_score(h, xs, score, max(len(weight), 1), p)
    return cross_entropy + coeff * of_x, cross_entropy, of_x
