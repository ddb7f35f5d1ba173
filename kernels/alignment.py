"""The alignment loss of a whole dictionary. Read this kernel first: it is the easy one.

With u_i = E_i / |E_i|, a pair (i, j) has the loss -u_i . u_j / K and the gradients

    dE_i = (cosine u_i - u_j) / (K |E_i|),    dE_j = (cosine u_j - u_i) / (K |E_j|).

Plain PyTorch makes a (K, D) matrix for every factor of these, and so passes over memory many times.
Here each of K programs reads the two rows of its pair, 2 D values, and writes both gradients.

In Triton `kernel[(K,)](...)` starts K programs, which all run one function; `program_id` is the
number of each. A tensor comes as a pointer to its first entry. A load reads the vector at a pointer
plus offsets; where its mask is False it touches nothing and gives `other`. What is `constexpr` is
known when the function is compiled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # There is no Triton for macOS, which falls back to plain PyTorch.
    triton = tl = constexpr = TensorDescriptor = None
jit = triton.jit if triton else (lambda function: function)

def alignment_plain(weight, pairs):
    """The loss in plain PyTorch; rows of half types are widened to fp32 first."""
    rows = F.embedding(pairs.T, weight)  # (2, K, D)
    return -F.cosine_similarity(*rows.to(torch.promote_types(rows.dtype, torch.float32))).mean()

@jit
def alignment_kernel(weight, pairs, losses, gradient, K, V, D: constexpr, BLOCK_D: constexpr,
                     WITH_GRAD: constexpr):  # fmt: skip
    """One pair's loss, of losses (K,), and its two rows of gradient (V, D)."""
    k = tl.program_id(0)
    i = tl.load(pairs + 2 * k)
    j = tl.load(pairs + 2 * k + 1)
    # A pair outside of the matrix must not touch memory that is not ours: its loss is NaN.
    known = (i >= 0) & (i < V) & (j >= 0) & (j < V)
    d = tl.arange(0, BLOCK_D)  # D, rounded up to a power of two as Triton wants it
    inside = (d < D) & known
    row_i = tl.load(weight + i * D + d, mask=inside, other=0.0).to(tl.float32)  # (D,)
    row_j = tl.load(weight + j * D + d, mask=inside, other=0.0).to(tl.float32)
    # As in F.cosine_similarity, a norm counts as at least 1e-8.
    inverse_i = tl.rsqrt(tl.maximum(tl.sum(row_i * row_i, axis=0), 1e-16))
    inverse_j = tl.rsqrt(tl.maximum(tl.sum(row_j * row_j, axis=0), 1e-16))
    unit_i = row_i * inverse_i
    unit_j = row_j * inverse_j
    cosine = tl.sum(unit_i * unit_j, axis=0)
    tl.store(losses + k, tl.where(known, -cosine, float("nan")))
    if WITH_GRAD:
        # No other program writes these rows.
        tl.store(gradient + i * D + d, (cosine * unit_i - unit_j) * (inverse_i / K), mask=inside)
        tl.store(gradient + j * D + d, (cosine * unit_j - unit_i) * (inverse_j / K), mask=inside)

# An operator of its own, so that torch.compile puts the launch in its graph and looks no further.
@torch.library.custom_op("alignmlm::alignment", mutates_args=())
def alignment(weight: Tensor, pairs: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """The loss, fp32, and its gradient (V, D) in the type of weight, or (0,) if not wanted."""
    (V, D), K = weight.shape, len(pairs)
    losses = weight.new_empty(K, dtype=torch.float32)
    gradient = weight.new_zeros((V, D) if with_grad else 0)  # Rows in no pair keep the zeros.
    # A warp is 32 threads: with one for 512 entries of a row, each thread has 16 of them.
    block = triton.next_power_of_2(D)
    alignment_kernel[(K,)](weight, pairs, losses, gradient, K, V, D, BLOCK_D=block,
                           WITH_GRAD=with_grad, num_warps=max(1, block // 512))  # fmt: skip
    return losses.mean(), gradient

@alignment.register_fake  # For torch.compile: the results' shapes and types alone.
def _(weight, pairs, with_grad):
    loss = weight.new_empty((), dtype=torch.float32)
    return loss, weight.new_empty(weight.shape if with_grad else 0)

class GradientsInForward(torch.autograd.Function):
    """A loss whose operator makes its gradients too; the backward only scales them."""
    @staticmethod
    def forward(ctx, operator, *inputs):
        loss, *gradients = operator(*inputs, with_grad=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        scaled = [gradient * upstream for gradient in ctx.saved_tensors]
        return None, *scaled, None  # The operator and the last input, indices, have none.

def call_operator(operator, *inputs):
    """The loss of an operator of its inputs, which makes gradients only if one is wanted."""
    inputs = [tensor.contiguous() for tensor in inputs]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return GradientsInForward.apply(operator, *inputs)
    return operator(*inputs, with_grad=False)[0]
