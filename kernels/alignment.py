"""The alignment loss over a whole dictionary, its gradient made in the one pass that reads it.

With u_i = E_i / |E_i| (0 for a zero row), the loss is -1/K times the sum of u_i . u_j over the K
pairs, and its gradient -(s_i - u_i (u_i . s_i)) / (K |E_i|), s_i the sum of u_j over i's partners.

That is memory traffic: 2K rows read and 2K written are 4KD values, in fp32 at K = 40,000, D = 512
328 MB, 0.076 ms at the 4.3 TB/s of a large copy on an H200. Eager moves about 30KD (gathers,
squares, quotients, forward and back) and sorts the indices every time. Here a program reads the two
rows of a pair and writes both gradients. A row of several pairs is written once, by the first of
them, which adds the other partners in a fixed order: no atomics, the same bits on every run.

The gradient needs the upstream gradient g, which only the backward knows; to read the rows again
there makes 6KD. But g is alpha at every step. So the forward makes the gradient for the last g, and
the backward compares, on the device, and returns or makes it again: its bits depend on E, the pairs
and g alone. Expected: 0.085 ms, 90 % of a copy, and 0.015 for three small kernels. Not measured.
"""

from __future__ import annotations  # tl, which the annotations name, may be missing

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.masked_softmax import jit, tl, triton

_indices = WeakTensorKeyDictionary()  # pairs -> (version, V) and, until these change, index_of


def alignment_oracle(weight, pairs):
    """The same in plain PyTorch, for a CPU and for float64; half types are computed in fp32."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    i, j = torch.embedding(weight, pairs).unbind(1)  # (K, D) each
    square = torch.stack([i.square().sum(1), j.square().sum(1)])
    inverse = square.where(square > 1e-30, torch.inf).rsqrt()  # 0 for a row of zeros
    return -((i * j).sum(1) * inverse[0] * inverse[1]).sum() / max(len(pairs), 1)


@jit
def unit_rows(weight, i, V, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """u_i and 1 / |E_i| of rows i: 0 if |E_i| is not above 1e-15, NaN outside of the matrix."""
    d = tl.arange(0, BLOCK_D)[None, :]
    known = (i >= 0) & (i < V)
    row = tl.load(weight + tl.where(known, i, 0)[:, None] * D + d, mask=d < D, other=0.0)
    row = row.to(tl.float32)
    square = tl.sum(row * row, axis=1)
    inverse = tl.where(known, tl.where(square > 1e-30, tl.rsqrt(square), 0.0), float("nan"))
    return row * inverse[:, None], inverse


@jit
def alignment_kernel(weight, pairs, partners, runs, upstream, made_for, losses, gradient, K, V,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, AGAIN: tl.constexpr):
    """The two entries of a pair: twice its loss, and their rows' gradients if first of a run."""
    k, g = tl.program_id(0), tl.load(upstream)
    if AGAIN and g == tl.load(made_for):
        return
    if not AGAIN:
        tl.store(made_for, g, mask=k == 0)
    entry = 2 * k + tl.arange(0, 2)
    i = tl.load(pairs + entry)
    unit, inverse = unit_rows(weight, i, V, D, BLOCK_D)
    total, _ = unit_rows(weight, tl.load(pairs + (entry ^ 1)), V, D, BLOCK_D)  # from L1
    tl.store(losses + entry, -tl.sum(unit * total, axis=1))
    first, last = tl.load(runs + 2 * entry), tl.load(runs + 2 * entry + 1)
    for t in range(1, tl.max(last - first, axis=0)):
        more = first + t < last
        j = tl.load(partners + first + t, mask=more, other=0)
        total += tl.where(more[:, None], unit_rows(weight, j, V, D, BLOCK_D)[0], 0.0)
    value = (total - unit * tl.sum(unit * total, axis=1)[:, None]) * inverse[:, None] * (-g / K)
    own = (first < last) & (i >= 0) & (i < V)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(gradient + i[:, None] * D + d, value, mask=own[:, None] & (d < D))


def index_of(pairs, V):
    """entries (2K,); partners (2K,), row by row; runs (2K, 2), from where to where there, for the
    first entry of a row (others have none); absent, the rows in no pair; guess, the last g.
    """
    if pairs not in _indices or _indices[pairs][0] != (pairs._version, V):
        entries = pairs.reshape(-1).clone()  # a view would keep pairs alive
        everything = torch.arange(V, device=pairs.device)
        order = entries.argsort(stable=True)
        row, partners = entries[order], pairs.flip(1).reshape(-1)[order]
        start, end = torch.searchsorted(row, entries), torch.searchsorted(row, entries, right=True)
        first = order[start] == torch.arange(len(entries), device=pairs.device)
        runs = torch.stack([start, end.where(first, start)], 1)
        absent = everything[~torch.isin(everything, entries)]
        guess = torch.ones((), device=pairs.device)
        _indices[pairs] = (pairs._version, V), entries, partners, runs, absent, guess
    return _indices[pairs][1:]


@torch.library.custom_op("alignmlm::alignment", mutates_args=("gradient", "made_for"))
def _alignment(weight: Tensor, pairs: Tensor, gradient: Tensor, made_for: Tensor,
               upstream: Tensor | None) -> Tensor:
    """The loss; its gradient for upstream or, without it, for a guess, and made_for, the guess."""
    (V, D), K, block = weight.shape, len(pairs), triton.next_power_of_2(weight.shape[1])
    entries, partners, runs, absent, guess = index_of(pairs, V)
    again, losses = upstream is not None, guess.new_empty(2 * K)
    if not again:
        gradient.index_fill_(0, absent, 0.0)
    with torch.cuda.device_of(weight):
        alignment_kernel[(K,)](
            weight, entries, partners, runs, upstream if again else guess, made_for, losses,
            gradient, K, V, D, BLOCK_D=block, AGAIN=again, num_warps=max(1, block // 512))
    if again:
        guess.copy_(upstream)
    return losses.mean() if K and not again else losses.new_zeros(())


@_alignment.register_fake
def _(weight, pairs, gradient, made_for, upstream):
    return weight.new_empty((), dtype=torch.float32)


class Alignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, pairs):
        gradient, made_for = torch.empty_like(weight), weight.new_empty((), dtype=torch.float32)
        ctx.save_for_backward(weight, pairs, gradient, made_for)
        return _alignment(weight, pairs, gradient, made_for, None)

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # under create_graph
            raise RuntimeError("alignment_loss can be differentiated once only")
        weight, pairs, gradient, made_for = ctx.saved_tensors
        _alignment(weight, pairs, gradient, made_for, upstream)
        return gradient, None
