"""The two losses that touch the whole vocabulary; alignmlm.py calls nothing else of this package.

CUDA tensors go to the Triton kernels; float64 and any other to the plain PyTorch beside them.
"""

import torch
from torch import Tensor

from kernels import alignment, masked_softmax


def masked_lm_loss(hidden, weight, bias, labels, ignore_index=-100):
    """Mean cross entropy of softmax(hidden weight^T + bias) over the rows that have a label.

    hidden (B, T, D) or (N, D), weight (V, D) and bias (V,) of one floating type (any, under
    autocast); labels (B, T) or (N,), int64, in [0, V) or ignore_index. Returns an fp32 scalar
    (float64 for float64), 0 if nothing has a label, to be differentiated once. Raises ValueError
    for shapes, types, devices and labels that do not fit, but on a GPU, where to look at labels
    costs a synchronisation, one outside makes the loss NaN. L_MLM of Tang et al. (2022).
    """
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    V, D = _check_weight(weight)
    _check("hidden", hidden, (*hidden.shape[:-1], D), weight.dtype, weight.device)
    _check("bias", bias, (V,), weight.dtype, weight.device)
    _check("labels", labels, hidden.shape[:-1], torch.int64, weight.device)
    inputs = [t.contiguous() for t in (hidden.reshape(-1, D), weight, bias, labels.reshape(-1))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _MaskedLM.apply(*inputs, ignore_index)
    return _masked_lm(*inputs, ignore_index, False)[0]


def alignment_loss(weight, pairs):
    """Minus the mean cosine of weight[i] and weight[j] over the pairs (i, j) of a dictionary.

    weight (V, D) floating; pairs (K, 2) int64 in [0, V), repeated at will; what is made of them is
    kept while that tensor lives. Returns an fp32 scalar (float64 for float64), 0 for K = 0; a row
    of zeros has cosine 0 and gradient 0. Raises ValueError for shapes, types, devices and pairs
    that do not fit; but on a GPU a pair outside makes the loss NaN. L_align of Tang et al. (2022).
    """
    V, _ = _check_weight(weight)
    _check("pairs", pairs, (len(pairs), 2), torch.int64, weight.device)
    if _fused(weight):
        return alignment.Alignment.apply(weight.contiguous(), pairs)
    if not torch.compiler.is_compiling() and ((pairs < 0) | (pairs >= V)).any():
        raise ValueError(f"pairs of shape {tuple(pairs.shape)} has values outside [0, {V})")
    return alignment.alignment_oracle(weight, pairs)


def _fused(weight):
    return weight.is_cuda and masked_softmax.triton is not None and weight.dtype != torch.float64


def _check_weight(weight):
    V, D = weight.shape if weight.dim() == 2 else (0, 0)
    if not V or D not in range(16, 1025, 16) or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} of shape {tuple(weight.shape)}; it must be "
                         "floating, (V, D) with V > 0 and D a multiple of 16 up to 1024")
    return V, D


def _check(name, tensor, shape, dtype, device):
    found = tuple(tensor.shape), tensor.dtype, tensor.device
    if found != (tuple(shape), dtype, device):
        raise ValueError(f"{name} is {found} but must be {(tuple(shape), dtype, device)}")


@torch.library.custom_op("alignmlm::masked_lm", mutates_args=())
def _masked_lm(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int,
               with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients. An operator, so that torch.compile does not look inside."""
    way = masked_softmax.masked_lm_fused if _fused(weight) else masked_softmax.masked_lm_oracle
    with torch.autocast(weight.device.type, enabled=False), torch.cuda.device_of(weight):
        return way(hidden, weight, bias, labels, ignore_index, with_grad)


@_masked_lm.register_fake
def _(hidden, weight, bias, labels, ignore_index, with_grad):
    loss = hidden.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))
    return loss, *(t.new_empty(t.shape if with_grad else 0) for t in (hidden, weight, bias))


class _MaskedLM(torch.autograd.Function):
    """The forward makes the gradients, while it has the exponentials; the backward scales them."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, *grads = _masked_lm(*inputs, True)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # under create_graph
            raise RuntimeError("masked_lm_loss can be differentiated once only")
        return *(grad * upstream for grad in ctx.saved_tensors), None, None
