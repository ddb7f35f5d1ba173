"""The masked-language-model loss over a large vocabulary: three products and no N x V matrix.

Row n of the N that have a label y has the logits z = hidden_n weight^T + bias over V words and
the loss log(sum_v exp z_v) - z_y. A softmax subtracts the row's maximum, which is known only when
the row is, and so takes several passes over it. But all it needs is to stay in range, and fp32 and
bf16 reach from e^-87 to e^88, far beyond the logits of a language model. So the exponentials are
taken as they are, in the epilogue of the product that makes the logits, in bf16. With S_n their sum
without the label's, T_n with it and scale_n = 1 / (N T_n), the gradient of the logits is scale_n
times p, p_v = exp z_v but p_y = -S_n; and as a factor of a row moves out of a product,

    dhidden = scale * (p weight),    dweight = p^T (scale * hidden),    dbias = p^T scale.

Nothing of size N x V is ever normalised, nor is p_y - 1 a difference of nearly equal numbers. Rows
with a maximum beyond +-60 (in a healthy run none) are repaired: the first kernel runs again with
that maximum as their reference, and returns at once elsewhere. The result is exact for any input.

The cost at N = 19,661, D = 512, V = 80,000 in bf16 on an H200, whose large products reach about 790
TFLOP/s and large copies 4.3 TB/s: a product is 2NDV = 1.61e12 operations, 2.04 ms, and a pass of an
N x V matrix through memory 3.15 GB, 0.73 ms. The floor is three products, 6.1 ms. Counting passes
outside of products, and what is alive at once:

    eager       log_softmax 2, its backward 4, dbias 1: 11.2 ms; 3 matrices, 9.4 GB
    compiled    log-sum-exp 1, gradient 2, dbias 1: 9.0 ms; 1 to 2 matrices
    in chunks   (Liger) of 128 rows, dweight through memory 154 times: 11.8 ms beside the passes
    recomputed  (CCE) a fourth product, 8.2 ms, and dweight summed under locks
    this file   none, but fp32 dweight through memory for each of 6 chunks: 6.6 ms; 0.9 GB

Rates are harder to predict. At 600 TFLOP/s for exp_kernel, whose exponentials its product waits
for, 710 for cuBLAS and 540 for weight_grad_kernel it is 8.2 ms, 75 % of the floor's rate. On an
H200: not measured. A number is summed by one program in one order: the same bits on every run.
"""

from __future__ import annotations  # tl, which the annotations name, may be missing

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this platform (macOS): only the oracles are used
    triton = tl = None

jit = triton.jit if triton else (lambda function: function)

CPU_CHUNK = 8 << 20  # bytes of logits at a time: these stay in cache, and malloc reuses the block
GPU_CHUNK = 512 << 20  # bytes of p at a time; half would cost 6 more passes of dweight, 0.5 ms
REACH = 60.0  # of the logits without repair: sums of V exponentials and products with them fit, too
SLIVER = 16  # columns of the narrowest product that tl.dot takes: p^T scale, for dbias


def refuse_second_derivative(name):
    """Called in a backward, where gradients are recorded under create_graph only."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} can be differentiated once only: its gradient has no graph")


def masked_lm_oracle(hidden, weight, bias, labels, ignore_index, with_grad):
    """masked_lm_fused in plain PyTorch, for a CPU, with the usual maximum; half types in fp32."""
    rows = (labels != ignore_index).nonzero().squeeze(1)  # (N,)
    words, N, V = labels[rows], len(rows), len(weight)
    if ((words < 0) | (words >= V)).any():
        raise ValueError(f"labels of shape {tuple(labels.shape)} has values other than "
                         f"{ignore_index} outside [0, {V})")
    wide = torch.promote_types(weight.dtype, torch.float32)
    inputs = hidden, weight, bias
    hidden, weight, bias = (t.to(wide) for t in inputs)
    dhidden, dweight, dbias = (torch.zeros_like(t) if with_grad else t.new_empty(0)
                               for t in (hidden, weight, bias))
    loss = hidden.new_zeros(())
    size = max(1, CPU_CHUNK // (V * wide.itemsize))
    buffer = hidden.new_empty(min(size, N), V)
    for row, word in zip(rows.split(size), words[:, None].split(size), strict=True):
        h = hidden[row]
        logits = torch.mm(h, weight.T, out=buffer[: len(row)]).add_(bias)  # (size, V)
        target, peak = logits.gather(1, word), logits.amax(1, keepdim=True)
        p = logits.sub_(peak).exp_().scatter_(1, word, 0.0)
        others = p.sum(1, keepdim=True)  # S
        total = others + (target - peak).exp()  # T
        loss += (total.log() + peak - target).sum()
        if with_grad:
            p.scatter_(1, word, -others)
            scale = 1 / (N * total)
            dhidden[row] = torch.mm(p, weight).mul_(scale)
            dweight.addmm_(p.T, h * scale)
            dbias.add_(torch.mm(scale.T, p)[0])
    grads = zip((dhidden, dweight, dbias), inputs, strict=True)
    return loss / max(N, 1), *(grad.to(t.dtype) for grad, t in grads)


@jit
def exp_kernel(hidden, weight, bias, labels, rows, reference, p, targets, peaks, sums, N, V,
               D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
               BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, STORE: tl.constexpr,
               REPAIR: tl.constexpr):
    """A tile of p = exp(logits - reference), 0 at the labels; its rows' maxima and sums."""
    # Row blocks run fastest: the programs alive at a time share a few blocks of weight, which is
    # thus read from memory once, and the rows of hidden, which fit in the L2 cache.
    blocks = tl.cdiv(N, BLOCK_N)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    base = tl.load(reference + n, mask=n < N, other=0.0)
    if REPAIR and tl.max((base != 0).to(tl.int32), axis=0) == 0:
        return
    row = tl.load(rows + n, mask=n < N, other=0)  # the labelled rows, where they lie in hidden
    h = hidden + row[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        w = weight.load([tile * BLOCK_V, d])  # by descriptor (TMA on Hopper): 0 beyond row V
        logits = tl.dot(tl.load(h + d), w.T, logits, input_precision=PRECISION)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits += tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32)[None, :]
    tl.store(peaks + tile * N + n, tl.max(logits, axis=1), mask=n < N)
    label = tl.load(labels + row)
    here = (n < N) & (label >= tile * BLOCK_V) & (label < min(V, tile * BLOCK_V + BLOCK_V))
    if tl.max(here.to(tl.int32), axis=0) > 0:  # few tiles have a label of their rows
        own = v[None, :] == label[:, None]
        tl.store(targets + n, tl.sum(tl.where(own, logits, 0.0), axis=1), mask=here)
        logits = tl.where(own, float("-inf"), logits)
    exps = tl.exp(logits - base[:, None])
    tl.store(sums + tile * N + n, tl.sum(exps, axis=1), mask=n < N)
    if STORE:
        p.store([block * BLOCK_N, tile * BLOCK_V], exps.to(p.dtype))


@jit
def row_kernel(hidden, labels, rows, reference, targets, sums, p, scaled, scales, losses, N, tiles,
               V, stride, total_N, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
               SLIVER: tl.constexpr, STORE: tl.constexpr):
    """Row n's loss; for its gradient scale, scale * [hidden, 1] and p at its label."""
    n = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    others = tl.sum(tl.load(sums + t * N + n, mask=t < tiles, other=0.0), axis=0)
    target = tl.load(targets + n) - tl.load(reference + n)
    total = others + tl.exp(target)
    tl.store(losses + n, tl.log(total) - target)
    if STORE:
        row = tl.load(rows + n)
        label = tl.load(labels + row)
        tl.store(p + n * stride + label, -others, mask=(label >= 0) & (label < V))
        scale = 1.0 / (total * total_N)
        tl.store(scales + n, scale)
        d = tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row * D + d, mask=d < D, other=1.0).to(tl.float32)
        tl.store(scaled + n * (D + SLIVER) + d, h * scale, mask=d < D + SLIVER)


@jit
def weight_grad_kernel(p, scaled, sliver, dweight, dbias, N, V, D: tl.constexpr,
                       BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                       PRECISION: tl.constexpr, SLIVER: tl.constexpr):
    """A tile of dweight += p^T (scale * hidden) and, beside the first, dbias += p^T scale."""
    blocks: tl.constexpr = D // BLOCK_D
    d = tl.program_id(0) % blocks * BLOCK_D  # fastest: neighbours share tiles of p
    v = tl.program_id(0) // blocks * BLOCK_V
    grad = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    grad_bias = tl.zeros((BLOCK_V, SLIVER), tl.float32)  # equal columns
    for n in range(0, N, BLOCK_N):
        tile = p.load([n, v]).T
        grad = tl.dot(tile, scaled.load([n, d]), grad, input_precision=PRECISION)
        grad_bias = tl.dot(tile, sliver.load([n, D]), grad_bias, input_precision=PRECISION)
    dweight.store([v, d], dweight.load([v, d]) + grad)
    if d == 0:
        word = v + tl.arange(0, BLOCK_V)
        column = tl.sum(grad_bias, axis=1) / SLIVER
        tl.store(dbias + word, tl.load(dbias + word, mask=word < V) + column, mask=word < V)


def tile_settings(dtype, D, capability):
    """The tuned settings of exp_kernel and weight_grad_kernel: rows x columns tiles of a product.

    128 x 256 is the largest tile whose sums fit in the registers of 8 warps, and so the one that
    reads least; three stages of depth 64 fill 150 of 227 KB of shared memory. Chips before Hopper
    have no TMA and keep addresses in registers: half of it each way. fp32, three products of tf32,
    is there to be exact, and a small tile leaves it room.
    """
    rows, columns, depth, warps, precision = 128, 256, 64, 8, "ieee"
    if dtype == torch.float32:
        rows, columns, depth, warps, precision = 64, 64, 32, 4, "tf32x3"
    elif capability < (9, 0):
        rows, columns = 64, 128
    both = {"num_warps": warps, "num_stages": 3, "PRECISION": precision}
    return ({"BLOCK_N": rows, "BLOCK_V": columns, "BLOCK_D": math.gcd(D, depth), **both},
            {"BLOCK_V": rows, "BLOCK_D": math.gcd(D, columns), "BLOCK_N": depth, **both})


def masked_lm_fused(hidden, weight, bias, labels, ignore_index, with_grad):
    """hidden (rows, D), weight (V, D), bias (V,), labels (rows,) -> loss, dhidden, dweight, dbias.

    All contiguous, labels int64. The loss is fp32, and 0 without a label; the gradients have the
    types of what they belong to, and no elements without with_grad.
    """
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else (9, 0)
    ahead, back = tile_settings(weight.dtype, weight.shape[1], capability)
    rows = (labels != ignore_index).nonzero().squeeze(1)  # (N,): N is all that the host waits for
    N, (V, D) = len(rows), weight.shape
    # The exponentials need the range of fp32: the gradient of fp16 is made in bf16, which has it.
    dtype = torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
    stride = triton.cdiv(V, 16) * 16  # rows of a descriptor start at multiples of 16 bytes, and
    weight = weight.clone() if weight.data_ptr() % 16 else weight  # a view may start elsewhere
    chunks = max(1, triton.cdiv(N * stride * dtype.itemsize, GPU_CHUNK))
    tiles = triton.cdiv(V, ahead["BLOCK_V"])

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=weight.device)

    def tensor_map(tensor, *block):
        return TensorDescriptor.from_tensor(tensor, list(block))

    losses = empty(N)
    buffer = empty(triton.cdiv(N, chunks) if with_grad else 1, stride, dtype=dtype)
    dhidden = torch.zeros_like(hidden) if with_grad else empty(0)
    dweight, dbias = (empty(*t.shape).zero_() if with_grad else empty(0) for t in (weight, bias))
    for row, loss in zip(rows.chunk(chunks), losses.chunk(chunks), strict=True) if N else ():
        n, p = len(row), buffer[: len(row)]
        targets, scales = torch.full((2, n), torch.nan, device=weight.device)
        peaks, sums = empty(2, tiles, n)
        reference = torch.zeros_like(scales)
        for repair in (False, True):
            exp_kernel[(triton.cdiv(n, ahead["BLOCK_N"]) * tiles,)](
                hidden, tensor_map(weight, ahead["BLOCK_V"], ahead["BLOCK_D"]), bias, labels, row,
                reference, tensor_map(p, ahead["BLOCK_N"], ahead["BLOCK_V"]), targets, peaks, sums,
                n, V, D, STORE=with_grad, REPAIR=repair, **ahead)
            reference = F.hardshrink(peaks.amax(0), REACH)  # 0 within reach
        scaled = empty(n, D + SLIVER, dtype=dtype)
        row_kernel[(n,)](hidden, labels, row, reference, targets, sums, p, scaled, scales, loss, n,
                         tiles, V, stride, N, D, BLOCK_D=triton.next_power_of_2(D + SLIVER),
                         BLOCK_T=triton.next_power_of_2(tiles), SLIVER=SLIVER, STORE=with_grad)
        if with_grad:
            product = torch.mm(p[:, :V], weight.to(dtype)) * scales[:, None]
            dhidden.index_copy_(0, row, product.to(hidden.dtype))
            weight_grad_kernel[(triton.cdiv(V, back["BLOCK_V"]) * (D // back["BLOCK_D"]),)](
                tensor_map(p, back["BLOCK_N"], back["BLOCK_V"]),
                tensor_map(scaled, back["BLOCK_N"], back["BLOCK_D"]),
                tensor_map(scaled, back["BLOCK_N"], SLIVER),
                tensor_map(dweight, back["BLOCK_V"], back["BLOCK_D"]), dbias, n, V, D,
                SLIVER=SLIVER, **back)
    del buffer  # before dweight is copied
    return losses.sum() / max(N, 1), dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)
