"""The alignment loss over a whole dictionary, its gradient made in the one pass that reads it.

With u_i = E_i / |E_i| (0 for a zero row), the loss is -1/K times the sum of u_i . u_j over the K
pairs, and with s_i the sum of u_j over the partners j of i

    dloss/dE_i = -(s_i - u_i (u_i . s_i)) / (K |E_i|).

This is memory traffic: 2K rows to read and 2K to write are 4KD values, for K = 40,000, D = 512 in
fp32 328 MB, 0.076 ms at the 4.3 TB/s of a large copy on an H200. Eager moves about 30KD (gathers,
squares, quotients, forward and back) and sorts the pairs every time. Here a program takes a pair,
reads both rows and writes both gradients. A row of several pairs is written once, by the first of
them, which adds the other partners in their order: no atomics, the same bits on every run.

The gradient wants the upstream gradient g, known only in the backward; to read the rows there once
more would cost 6KD. But g is alpha at every step. So the forward makes the gradient for the g seen
last, and the backward, on the device, compares: it returns at once, or makes the gradient anew. Its
bits depend on E, the pairs and g, not on the guess. Expected: 0.085 ms, 90 % of a copy, and 0.012
for comparing and adding up; 78 % together. On an H200: not measured.
"""

from __future__ import annotations  # tl, which the annotations name, may be missing

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.masked_softmax import jit, refuse_second_derivative, tl, triton

_indices = WeakTensorKeyDictionary()  # pairs -> (version, V) and the index made of them


def alignment_oracle(weight, pairs):
    """The same in plain PyTorch, for a CPU and for float64; half types are computed in fp32."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    i, j = F.embedding(pairs, weight).unbind(1)  # (K, D) each
    square = torch.stack([i.square().sum(1), j.square().sum(1)])
    inverse = square.where(square > 1e-30, torch.inf).rsqrt()  # 0 for a row of zeros
    return -((i * j).sum(1) * inverse[0] * inverse[1]).sum() / max(len(pairs), 1)


@jit
def unit_row(weight, i, V, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """u_i and 1 / |E_i|: zeros for a row of zeros, NaN for one outside the matrix."""
    d = tl.arange(0, BLOCK_D)
    known = (i >= 0) & (i < V)
    row = tl.load(weight + tl.where(known, i, 0) * D + d, mask=d < D, other=0.0).to(tl.float32)
    square = tl.sum(row * row, axis=0)
    inverse = tl.where(square > 1e-30, tl.rsqrt(square), 0.0)  # fp32's rsqrt of less may overflow
    inverse = tl.where(known, inverse, float("nan"))
    return row * inverse, inverse


@jit
def store_gradient(gradient, weight, i, unit, inverse, partner, partners, run, factor, V,
                   D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of row i, if its run of partners, of which one is at hand, is not empty."""
    first, last = tl.load(run), tl.load(run + 1)
    total = partner
    for k in range(first + 1, last):
        total += unit_row(weight, tl.load(partners + k), V, D, BLOCK_D)[0]
    value = (total - unit * tl.sum(unit * total, axis=0)) * (inverse * factor)
    d = tl.arange(0, BLOCK_D)
    tl.store(gradient + i * D + d, value, mask=(d < D) & (first < last) & (i >= 0) & (i < V))


@jit
def alignment_kernel(weight, pairs, runs, partners, upstream, made_for, losses, gradient, K, V,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, STORE: tl.constexpr,
                     AGAIN: tl.constexpr):
    """Pair k's part of the loss and the gradients of the rows whose first pair it is."""
    k = tl.program_id(0).to(tl.int64)
    g = tl.load(upstream)
    if AGAIN and g == tl.load(made_for):
        return
    i, j = tl.load(pairs + 2 * k), tl.load(pairs + 2 * k + 1)
    u_i, inverse_i = unit_row(weight, i, V, D, BLOCK_D)
    u_j, inverse_j = unit_row(weight, j, V, D, BLOCK_D)
    tl.store(losses + k, -tl.sum(u_i * u_j, axis=0))
    if STORE:
        store_gradient(gradient, weight, i, u_i, inverse_i, u_j, partners, runs + 4 * k, -g / K, V,
                       D, BLOCK_D)
        store_gradient(gradient, weight, j, u_j, inverse_j, u_i, partners, runs + 4 * k + 2, -g / K,
                       V, D, BLOCK_D)


def dictionary_index(pairs, V):
    """What the kernel needs to know of the pairs, made once and kept while they live unchanged:

    partners (2K,), in runs of the same row; runs (K, 2, 2), from where to where that of i and of j
    lies there, empty but for the row's first entry; absent, the rows in no pair; the last g.
    """
    state, index = (pairs._version, V), _indices.get(pairs)
    if index is None or index[0] != state:
        entries, everything = pairs.reshape(-1), torch.arange(V, device=pairs.device)
        order = entries.argsort(stable=True)
        partners, row = pairs.flip(1).reshape(-1)[order], entries[order]
        start, end = torch.searchsorted(row, entries), torch.searchsorted(row, entries, right=True)
        first = order[start] == torch.arange(len(entries), device=pairs.device)
        runs = torch.stack([start, end.where(first, start)], 1)
        absent = everything[~torch.isin(everything, entries)]
        guess = torch.ones((), device=pairs.device)
        index = _indices[pairs] = state, pairs.contiguous(), partners, runs, absent, guess
    return index[1:]


@torch.library.custom_op("alignmlm::alignment", mutates_args=("gradient", "made_for"))
def _alignment(weight: Tensor, pairs: Tensor, gradient: Tensor, made_for: Tensor,
               upstream: Tensor | None) -> Tensor:
    """The loss, and its gradient (if not empty) for upstream, or for a guess and what it was."""
    (V, D), K, block = weight.shape, len(pairs), triton.next_power_of_2(weight.shape[1])
    contiguous_pairs, partners, runs, absent, guess = dictionary_index(pairs, V)
    again, losses = upstream is not None, guess.new_empty(K)
    if not again:
        made_for.copy_(guess)
    if len(gradient) and not again:
        gradient.index_fill_(0, absent, 0.0)
    alignment_kernel[(K,)](
        weight, contiguous_pairs, runs, partners, upstream if again else guess, made_for, losses,
        gradient, K, V, D, BLOCK_D=block, num_warps=max(1, block // 512),  # 16 columns a thread
        STORE=len(gradient) > 0, AGAIN=again)
    if again:
        guess.copy_(upstream)
    return losses.sum() / max(K, 1)


@_alignment.register_fake
def _(weight, pairs, gradient, made_for, upstream):
    return weight.new_empty((), dtype=torch.float32)


class _Alignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, pairs):
        gradient, made_for = torch.empty_like(weight), weight.new_empty((), dtype=torch.float32)
        loss = _alignment(weight, pairs, gradient, made_for, None)
        ctx.save_for_backward(weight, pairs, gradient, made_for)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_second_derivative("alignment_loss")
        weight, pairs, gradient, made_for = ctx.saved_tensors
        _alignment(weight, pairs, gradient, made_for, upstream)
        return gradient, None


def alignment_fused(weight, pairs):
    """weight (V, D), contiguous, and pairs (K, 2) int64 -> the loss, an fp32 scalar."""
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Alignment.apply(weight, pairs)
    return _alignment(weight, pairs, weight[:0], weight.new_empty((), dtype=torch.float32), None)
