"""The two losses over the word-embedding matrix, and where their Triton kernels run.

As equations they stand in alignmlm.py. Here the same numbers are computed in less memory: by Triton
kernels where `fused` says so, and elsewhere by masked_lm_plain and alignment_plain, in PyTorch.
alignment.py is the easy kernel, to be read first; masked_softmax.py is the other.
"""

import torch

from kernels import alignment, masked_softmax

def fused(weight):
    """Whether the Triton kernels run for weight (V, D), one rule for both of them. Elsewhere, as on
    CPUs and AMD's GPUs (hip), plain PyTorch does."""
    if not weight.is_cuda or torch.version.hip or alignment.triton is None:
        return False
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    # The tiles of masked_lm have at least 16 columns; a program of the alignment holds whole rows.
    if weight.shape[1] % 16 or weight.shape[1] > 1024:
        return False
    # Triton launches on the current device.
    if weight.device.index != torch.cuda.current_device():
        return False
    # From Hopper on, a copy engine (TMA) fetches the tiles of masked_lm. Three tiles of each matrix
    # are in shared memory at once; a GeForce RTX 50 has too little of it.
    device = torch.cuda.get_device_properties(weight.device)
    enough = device.shared_memory_per_block_optin >= masked_softmax.SHARED_MEMORY
    return device.major >= 9 and enough

def masked_lm_loss(hidden, weight, bias, labels):
    """Mean cross entropy of softmax(hidden weight^T + bias): L_MLM of BERT and RoBERTa.

    hidden (N, D), weight (V, D) and bias (V,) of one floating type, or of any under autocast;
    labels (N,), int64 in [0, V): the masked tokens alone, which the caller has gathered. Returns
    an fp32 scalar (float64 for float64), to be differentiated once. Raises ValueError for shapes,
    types and devices that do not fit.
    """
    # Autocast does not know operators of our own.
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    V, D = _check_matrix("weight", weight)
    N, _ = _check_matrix("hidden", hidden)
    _check("hidden", hidden, (N, D), weight.dtype, weight.device)
    _check("bias", bias, (V,), weight.dtype, weight.device)
    _check("labels", labels, (N,), torch.int64, weight.device)
    # Checking the labels' range here would wait for the GPU. weight[labels] fails for V and above.
    if fused(weight):
        return alignment.call_operator(masked_softmax.masked_lm, hidden, weight, bias, labels)
    return masked_softmax.masked_lm_plain(hidden, weight, bias, labels)

def alignment_loss(weight, pairs):
    """Minus the mean cosine of rows i and j of weight over the pairs (i, j): L_align of ALIGN-MLM.

    weight (V, D) floating; pairs (K, 2), int64 in [0, V). The dictionary must be ONE-TO-ONE: each
    row of weight stands in at most one pair. Returns an fp32 scalar (float64 for float64), to be
    differentiated once. Raises ValueError for shapes, types and devices that do not fit.
    """
    _check_matrix("weight", weight)
    _check("pairs", pairs, (len(pairs), 2), torch.int64, weight.device)
    # The kernel writes each row's gradient once: hence one-to-one. A pair outside of the matrix
    # makes its loss NaN.
    if fused(weight):
        return alignment.call_operator(alignment.alignment, weight, pairs)
    return alignment.alignment_plain(weight, pairs)

# A kernel that is given the wrong shape or type would read memory that is not its own.
def _check_matrix(name, tensor):
    if tensor.dim() != 2 or not tensor.is_floating_point():
        found = (tuple(tensor.shape), tensor.dtype)
        raise ValueError(f"{name} is {found}; it must be a matrix of a floating type")
    return tensor.shape

def _check(name, tensor, shape, dtype, device):
    found = (tuple(tensor.shape), tensor.dtype, tensor.device)
    wanted = (shape, dtype, device)
    if found != wanted or tensor.numel() == 0:
        raise ValueError(f"{name} is {found}; it must be {wanted} and not empty")
