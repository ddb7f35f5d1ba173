"""The masked-language-model loss over a large vocabulary: three products and no N x V matrix.

Row n of the N with a label y has the logits z = hidden_n weight^T + bias over V words and the loss
log(sum_v exp z_v) - z_y. A softmax subtracts the row's maximum, known only with its last logit, and
so passes over the row again. But all it needs is to stay in range, and bf16 and fp32 reach from
e^-87 to e^88, beyond the logits of a healthy model: exponentials can be taken at once, in the
epilogue of the product that makes the logits, and kept in bf16. With their sum S_n without the
label's, T_n with it, scale_n = 1 / (N T_n), and p_v = exp z_v but p_y = -S_n, the gradient of the
logits is scale_n p; and as a row's factor moves out of a product,

    dhidden = scale * (p weight),    dweight = p^T (scale * hidden),    dbias = p^T scale.

Nothing of size N x V is ever normalised. Rows whose maximum is beyond +-60 are repaired: the first
kernel runs again with it as their reference, and returns at once elsewhere. Any input is exact.

At N = 19,661, D = 512, V = 80,000 in bf16 on an H200 (large products at 790 TFLOP/s, large copies
at 4.3 TB/s) a product is 2NDV = 1.61e12 operations, 2.04 ms, and a pass of an N x V matrix through
memory 3.15 GB, 0.73 ms. The floor is three products, 6.1 ms. With the passes outside of them:

    eager       log_softmax 2, its backward 4, dbias 1: 11.2 ms; 3 matrices, 9.4 GB
    compiled    log-sum-exp 1, gradient 2, dbias 1: 9.0 ms; 1 or 2 matrices
    in chunks   (Liger) of 128 rows, dweight through memory 154 times: 11.8 ms beside the passes
    recomputed  (CCE) a fourth product, 8.2 ms, and dweight summed under locks
    this file   none, but fp32 dweight through memory for each of 6 chunks: 6.6 ms; 0.9 GB

Rates are harder to predict: 600 TFLOP/s for exp_kernel, whose exponentials its product waits for,
710 for cuBLAS and 540 for weight_grad_kernel make 8.2 ms, 75 % of the floor's rate. Not measured.
Every number is summed by one program in one order, and so has the same bits on every run.
"""

from __future__ import annotations  # tl, which the annotations name, may be missing

import math

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this platform (macOS): only the oracles are used
    triton = tl = None

jit = triton.jit if triton else (lambda function: function)

CPU_CHUNK = 64 << 20  # bytes of logits at a time: small batches are one, so threads meet seldom
GPU_CHUNK = 512 << 20  # bytes of p at a time; half would cost 6 more passes of dweight, 0.5 ms
REACH = 60.0  # of the logits without repair: sums of V exponentials and products with them fit, too
SLIVER = 16  # columns of the narrowest product that tl.dot takes: p^T scale, for dbias


def masked_lm_oracle(hidden, weight, bias, labels, ignore_index, with_grad):
    """masked_lm_fused in plain PyTorch, for a CPU, with the usual maximum; half types in fp32."""
    rows = (labels != ignore_index).nonzero().squeeze(1)  # (N,)
    words, N, V = labels[rows, None], len(rows), len(weight)
    if ((words < 0) | (words >= V)).any():
        raise ValueError(f"labels {tuple(labels.shape)} must be in [0, {V}) or {ignore_index}")
    wide, inputs = torch.promote_types(weight.dtype, torch.float32), (hidden, weight, bias)
    hidden, weight, bias = (t.to(wide) for t in inputs)
    grads = [torch.zeros_like(t) if with_grad else t.new_empty(0) for t in (hidden, weight, bias)]
    dhidden, dweight, dbias = grads
    chunks = -(-N * V * wide.itemsize // CPU_CHUNK) or 1
    buffer, loss = hidden.new_empty(-(-N // chunks), V), hidden.new_zeros(())
    for row, word in zip(rows.chunk(chunks), words.chunk(chunks), strict=True):
        h = hidden[row]
        logits = torch.mm(h, weight.T, out=buffer[: len(row)]).add_(bias)  # (size, V)
        target, peak = logits.gather(1, word), logits.amax(1, keepdim=True)
        p = logits.sub_(peak).exp_().scatter_(1, word, 0.0)
        others = p.sum(1, keepdim=True)  # S
        total = others + (target - peak).exp()  # T
        loss += (total.log() + (peak - target)).sum()  # in this order: both may be large
        if with_grad:
            p.scatter_(1, word, -others)
            scale = 1 / (N * total)
            dhidden[row] = torch.mm(p, weight).mul_(scale)
            dweight.addmm_(p.T, h * scale)
            dbias.add_(torch.mm(scale.T, p)[0])
    return loss / max(N, 1), *(grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True))


@jit
def exp_kernel(hidden, weight, bias, labels, rows, reference, p, peaks, sums, N, V,
               D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
               BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, STORE: tl.constexpr,
               REPAIR: tl.constexpr):
    """A tile of p = exp(logits - reference), 0 at the labels; its rows' maxima and sums."""
    blocks = tl.cdiv(N, BLOCK_N)  # fastest: weight is read once, and hidden's rows fit in L2
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
    exps = tl.exp(tl.where(v[None, :] == label[:, None], float("-inf"), logits - base[:, None]))
    tl.store(sums + tile * N + n, tl.sum(exps, axis=1), mask=n < N)
    if STORE:
        p.store([block * BLOCK_N, tile * BLOCK_V], exps.to(p.dtype))


@jit
def row_kernel(hidden, weight, bias, labels, rows, reference, sums, p, scaled, scales, losses, N,
               tiles, V, stride, total_N, D: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_T: tl.constexpr, STORE: tl.constexpr, SLIVER: tl.constexpr = SLIVER):
    """Row n's loss; for its gradient scale, scale * [hidden, 1] and p at its label."""
    n, t, d = tl.program_id(0), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    row = tl.load(rows + n)
    label = tl.load(labels + row)
    known = (label >= 0) & (label < V)  # if not, loss and gradient are NaN
    h = tl.load(hidden + row * D + d, mask=d < D, other=1.0).to(tl.float32)
    w = tl.load(weight + label * D + d, mask=known & (d < D), other=0.0).to(tl.float32)
    target = tl.sum(h * w, axis=0) + tl.load(bias + label, mask=known, other=float("nan"))
    target -= tl.load(reference + n)
    others = tl.sum(tl.load(sums + t * N + n, mask=t < tiles, other=0.0), axis=0)
    total = others + tl.exp(target)
    tl.store(losses + n, tl.log(total) - target)
    if STORE:
        scale = 1.0 / (total * total_N)
        tl.store(scales + n, scale)
        tl.store(scaled + n * (D + SLIVER) + d, h * scale, mask=d < D + SLIVER)
        tl.store(p + n * stride + label, -others, mask=known)


@jit
def weight_grad_kernel(p, scaled, sliver, dweight, dbias, N, V, D: tl.constexpr,
                       BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                       PRECISION: tl.constexpr, SLIVER: tl.constexpr = SLIVER):
    """A tile of dweight += p^T (scale * hidden) and, beside the first, dbias += p^T scale."""
    d = tl.program_id(0) % (D // BLOCK_D) * BLOCK_D  # fastest: neighbours share tiles of p
    v = tl.program_id(0) // (D // BLOCK_D) * BLOCK_V
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


def tile_settings(dtype, capability):
    """Tiles of both products. 128 x 256 sums are what fits in the registers of 8 warps, and three
    stages 64 deep take 150 of 227 KB of shared memory. Before Hopper (no TMA: addresses take
    registers, too) half must do. fp32, as three products of tf32, is there to be exact.
    """
    if dtype == torch.float32:
        return 64, 64, 32, {"num_warps": 4, "num_stages": 3, "PRECISION": "tf32x3"}
    tall, wide = (128, 256) if capability >= (9, 0) else (64, 128)
    return tall, wide, 64, {"num_warps": 8, "num_stages": 3, "PRECISION": "ieee"}


def masked_lm_fused(hidden, weight, bias, labels, ignore_index, with_grad):
    """hidden (rows, D), weight (V, D), bias (V,), labels (rows,), contiguous -> loss, gradients."""
    rows = (labels != ignore_index).nonzero().squeeze(1)  # (N,): N is all that the host waits for
    N, (V, D) = len(rows), weight.shape
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else (9, 0)
    tall, wide, deep, settings = tile_settings(weight.dtype, capability)
    # The exponentials need the range of fp32: the gradient of fp16 is made in bf16, which has it.
    dtype = torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
    fp32 = {"dtype": torch.float32, "device": weight.device}
    stride = triton.cdiv(V, 16) * 16  # rows of a descriptor start at multiples of 16 bytes, and
    weight = weight.clone() if weight.data_ptr() % 16 else weight  # a view may start elsewhere
    tiled = TensorDescriptor.from_tensor
    tiles, deep_D, wide_D = triton.cdiv(V, wide), math.gcd(D, deep), math.gcd(D, wide)
    chunks = max(1, triton.cdiv(N * stride * dtype.itemsize, GPU_CHUNK))
    losses = torch.empty(N, **fp32)
    buffer = losses.new_empty(triton.cdiv(N, chunks) if with_grad else 1, stride, dtype=dtype)
    dhidden = torch.zeros_like(hidden) if with_grad else losses[:0]
    dweight, dbias = (torch.zeros(t.shape if with_grad else 0, **fp32) for t in (weight, bias))
    for row, loss in zip(rows.chunk(chunks), losses.chunk(chunks), strict=True) if N else ():
        n, p = len(row), buffer[: len(row)]
        peaks, sums = torch.empty(2, tiles, n, **fp32)
        reference, scales = torch.zeros(2, n, **fp32)
        for repair in (False, True):
            exp_kernel[(triton.cdiv(n, tall) * tiles,)](
                hidden, tiled(weight, [wide, deep_D]), bias, labels, row, reference,
                tiled(p, [tall, wide]), peaks, sums, n, V, D, BLOCK_N=tall, BLOCK_V=wide,
                BLOCK_D=deep_D, STORE=with_grad, REPAIR=repair, **settings)
            reference = torch.hardshrink(peaks.amax(0), REACH)  # 0 within reach
        scaled = torch.empty(n, D + SLIVER, dtype=dtype, device=weight.device)
        row_kernel[(n,)](
            hidden, weight, bias, labels, row, reference, sums, p, scaled, scales, loss, n, tiles,
            V, stride, N, D, BLOCK_D=triton.next_power_of_2(D + SLIVER),
            BLOCK_T=triton.next_power_of_2(tiles), STORE=with_grad)
        if with_grad:
            product = torch.mm(p[:, :V], weight.to(dtype)) * scales[:, None]
            dhidden.index_copy_(0, row, product.to(hidden.dtype))
            weight_grad_kernel[(triton.cdiv(V, tall) * (D // wide_D),)](
                tiled(p, [deep, tall]), tiled(scaled, [deep, wide_D]),
                tiled(scaled, [deep, SLIVER]), tiled(dweight, [tall, wide_D]), dbias, n, V, D,
                BLOCK_V=tall, BLOCK_D=wide_D, BLOCK_N=deep, **settings)
    del buffer  # before dweight is copied
    return losses.sum() / max(N, 1), dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)
