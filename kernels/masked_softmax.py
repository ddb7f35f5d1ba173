"""The masked-language-model loss over a large vocabulary, without an N x V matrix in memory.

Three products are needed: the logits hidden @ weight.T, and those of the gradients dhidden and
dweight. In between stands p, the exponentials of the logits, kept for one chunk of rows at a time.
With hidden (N, D), weight (V, D), bias (V,) and labels (N,), this is the trick:

    label_logits = (hidden * weight[labels]).sum(1) + bias[labels]  # (N,)
    p = torch.exp(hidden @ weight.T + bias)  # (N, V): no maximum is subtracted
    p[range(N), labels] = 0
    others = p.sum(1)  # (N,): what all words but the label have
    total = others + label_logits.exp()
    loss = (total.log() - label_logits).mean()
    scale = 1 / (N * total)
    p[range(N), labels] = -others  # scale * p is the logits' gradient, (softmax - one_hot) / N

A row's factor moves out of a product, and so p itself is never normalised:

    dhidden = scale[:, None] * (p @ weight)
    dweight, dbias = p.T @ (scale[:, None] * hidden), p.T @ scale

A softmax subtracts each row's maximum, which is known only with the row's last logit, and so passes
over the logits twice. Without a maximum once is enough: exp_kernel takes the exponentials as the
logits leave their product, and p is dropped when its chunk has been through the other two products.
In the kernels every sum is made by one program in one order, and so has the same bits on every run.

What it saves. At the paper's N = 9,856, V = 80,000, D = 512 eager PyTorch holds the logits, their
log-softmax and its gradient, 4.7 GB in bf16. Here p takes 0.5 GB, whatever N is, and the sum of the
chunks' dweight in fp32 0.16 GB.

Why 60 (REACH). fp32 and bf16 hold e^-87 to e^88. Most rows have their largest logit within 60 of 0.
Upwards: e^60, summed over 2^20 words (e^14) and times entries of weight up to a million (e^14),
stays below e^88. Downwards: where the largest exponential of a row is e^-60, a word that underflows
is less than e^-27 of it, and 2^20 of them are less than 2e-6. All other rows are repaired, as their
exponentials may be infinite or 0: exp_kernel runs again for their blocks, less the row's maximum.

What came before: gradients made in the forward, by chunks (Liger Kernel, arXiv 2410.10989); no
logits in memory, for a fourth product (Cut Cross-Entropy, arXiv 2411.09009); exponentials that are
not normalised, as here, but without a bias (quack-kernels).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.alignment import TensorDescriptor, constexpr, jit, tl, triton

REACH = 60.0
GPU_CHUNK = 1 << 28  # entries of p at a time; every further chunk reads and writes dweight again
CPU_CHUNK = 1 << 24  # logits at a time, as measured (results/kernels.md)
SHARED_MEMORY = 216 << 10  # bytes that a program needs at most: the compile tests check it
COLUMNS = 16  # of the narrowest product that tl.dot takes; dbias is computed as such a product

def masked_lm_plain(hidden, weight, bias, labels):
    """The loss in plain PyTorch, by chunks of rows where that loses nothing."""
    # The chunked function is new in PyTorch 2.13, does not compile, and rounds the loss of half
    # types to their 8 or 11 bits. So it serves fp32 and float64 outside of torch.compile; otherwise
    # all N x V logits are made, as in the equation.
    chunked = hasattr(F, "linear_cross_entropy") and not torch.compiler.is_compiling()
    if chunked and weight.dtype.itemsize >= 4:
        rows = max(1, CPU_CHUNK // len(weight))
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, options=options)
    logits = F.linear(hidden, weight, bias)  # (N, V)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

@jit
def exp_kernel(hidden, weight, bias, labels, p, peaks, sums, N, V, offsets, D: constexpr,
               BLOCK_N: constexpr, BLOCK_V: constexpr, BLOCK_D: constexpr, WITH_GRAD: constexpr,
               REPAIR: constexpr):  # fmt: skip
    """p (N, V) = exp(hidden weight^T + bias), but 0 at the labels, tile by tile. With REPAIR
    offsets (N,) are subtracted from the logits first.

    hidden (N, D), weight (V, D) and p are descriptors, a matrix and the shape of its tiles: load
    and store take the row and column where a tile begins, and what lies beyond the matrix is zero
    and is not stored. bias (V,), labels (N,). Each row of a tile leaves the maximum of its logits
    in peaks and its sum of p in sums, both (blocks of V, N)."""
    # A program for each multiprocessor takes tile after tile. `flatten` makes one loop of this one
    # and that over d, so that a tile is loaded while the last one's exponentials are taken. Rows
    # vary fastest: weight is read once, and hidden stays in the L2 cache.
    row_blocks = tl.cdiv(N, BLOCK_N)
    tiles = row_blocks * tl.cdiv(V, BLOCK_V)
    column = tl.arange(0, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        n0 = tile % row_blocks * BLOCK_N
        column_block = tile // row_blocks
        v0 = column_block * BLOCK_V
        n = n0 + tl.arange(0, BLOCK_N)
        needed = True
        if REPAIR:
            offset = tl.load(offsets + n, mask=n < N, other=0.0)  # (BLOCK_N,)
            needed = tl.max((offset != 0).to(tl.int32), axis=0) != 0
        if needed:
            # tf32x3 makes a product in fp32 of three in tf32. Half types are taken as they are.
            logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for d in range(0, D, BLOCK_D):
                h = hidden.load([n0, d])  # (BLOCK_N, BLOCK_D)
                w = weight.load([v0, d])  # (BLOCK_V, BLOCK_D)
                logits = tl.dot(h, w.T, logits, input_precision="tf32x3")
            # Columns beyond V have a bias of -inf, and so an exponential of 0.
            b = tl.load(bias + v0 + column, mask=v0 + column < V, other=float("-inf"))
            logits += b.to(tl.float32)[None, :]
            if REPAIR:
                logits -= offset[:, None]
            else:
                tl.store(peaks + column_block * N + n, tl.max(logits, axis=1), mask=n < N)
            label = (tl.load(labels + n, mask=n < N, other=-1) - v0).to(tl.int32)
            is_label = column[None, :] == label[:, None]
            # The GPU's own instruction is exp2; e^x is 2 to the x log2(e).
            exps = tl.where(is_label, 0.0, tl.exp2(logits * 1.4426950408889634))
            tl.store(sums + column_block * N + n, tl.sum(exps, axis=1), mask=n < N)
            if WITH_GRAD:
                p.store([n0, v0], exps.to(p.dtype))

@jit
def weight_grad_kernel(p, scaled, scale_columns, dweight, dbias, N, V, D: constexpr,
                       BLOCK_V: constexpr, BLOCK_D: constexpr, BLOCK_N: constexpr, FIRST: constexpr,
                       COLUMNS: constexpr = COLUMNS):  # fmt: skip
    """Tiles of dweight (V, D) += p^T (scale * hidden) and of dbias (V,) += p^T scale, in fp32.

    p (N, V) and scaled (N, D + 16) are of one chunk of rows; the FIRST writes over dweight and
    dbias. The first D columns of scaled are scale * hidden, and each of the last 16 is scale;
    scale_columns is the same matrix with narrower tiles, for loading these.
    """
    d = tl.program_id(0) * BLOCK_D  # fastest: neighbours share tiles of p
    v0 = tl.program_id(1) * BLOCK_V
    grad = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    if d == 0:
        # Only the programs of the first columns make dbias: a product with 16 columns of scale.
        grad_bias = tl.zeros((BLOCK_V, COLUMNS), tl.float32)
        for n in range(0, N, BLOCK_N):
            p_tile = p.load([n, v0]).T  # (BLOCK_V, BLOCK_N)
            grad = tl.dot(p_tile, scaled.load([n, d]), grad, input_precision="tf32x3")
            scale = scale_columns.load([n, D])  # (BLOCK_N, COLUMNS)
            grad_bias = tl.dot(p_tile, scale, grad_bias, input_precision="tf32x3")
        v = v0 + tl.arange(0, BLOCK_V)
        total = tl.max(grad_bias, axis=1)  # any of the equal columns
        if not FIRST:
            total += tl.load(dbias + v, mask=v < V, other=0.0)
        tl.store(dbias + v, total, mask=v < V)
    else:
        for n in range(0, N, BLOCK_N):
            grad = tl.dot(p.load([n, v0]).T, scaled.load([n, d]), grad, input_precision="tf32x3")
    if not FIRST:
        grad += dweight.load([v0, d])
    dweight.store([v0, d], grad)

# An operator of its own, so that torch.compile puts it in its graph and looks no further.
@torch.library.custom_op("alignmlm::masked_lm", mutates_args=())
def masked_lm(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
              with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (fp32) and its gradients in the inputs' types, or empty ones if not wanted."""
    (N, D), V = hidden.shape, len(weight)
    device = torch.cuda.get_device_properties(weight.device)
    # A program makes tiles of its result, tall x wide, summing `deep` at a time: N x V over D, or
    # V x D over N. On Hopper the registers of 8 warps hold 128 x 256, but not on Blackwell.
    if weight.dtype == torch.float32:
        p_dtype, tall, wide, deep = torch.float32, 64, 64, 32
    else:  # of fp16 too, whose exponentials need the range of fp32
        p_dtype, tall, wide, deep = torch.bfloat16, 128, 256 if device.major == 9 else 128, 64
    deep_D, wide_D = math.gcd(D, deep), math.gcd(D, wide)  # Tiles must divide D.
    # TMA wants matrices and their rows to start at multiples of 16 bytes; views start anywhere.
    hidden, weight = (t.clone() if t.data_ptr() % 16 else t for t in (hidden, weight))
    stride = triton.cdiv(V, 16) * 16  # entries from a row of p to the next
    tiled = TensorDescriptor.from_tensor
    new = partial(torch.empty, dtype=torch.float32, device=weight.device)
    rows = min(N, max(1, GPU_CHUNK // (128 * stride)) * 128)
    buffer = new(rows, stride, dtype=p_dtype)
    losses, rounded_off = new(N), new(N)
    dhidden, dweight, dbias = (new(t.shape if with_grad else 0) for t in (hidden, weight, bias))
    label_rows = weight[labels].float()  # (N, D)
    label_logits = (hidden * label_rows).sum(1) + bias[labels]  # (N,)
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        h, label = hidden[chunk], labels[chunk]
        n, p = len(h), buffer[: len(h)]
        peaks, sums = new(2, triton.cdiv(V, wide), n)
        take_exponentials = partial(
            exp_kernel[(device.multi_processor_count,)], tiled(h, [tall, deep_D]),
            tiled(weight, [wide, deep_D]), bias, label, tiled(p, [tall, wide]), peaks, sums, n, V,
            D=D, BLOCK_N=tall, BLOCK_V=wide, BLOCK_D=deep_D, WITH_GRAD=with_grad,
            num_warps=8)  # fmt: skip
        take_exponentials(offsets=None, REPAIR=False)
        # What is subtracted (n,): a row's maximum, or 0 within reach. Blocks of 0 are not repaired.
        offsets = F.hardshrink(peaks.amax(0), REACH)
        take_exponentials(offsets=offsets, REPAIR=True)
        label_logit, others = label_logits[chunk] - offsets, sums.sum(0)  # (n,) each
        total = others + label_logit.exp()
        losses[chunk] = total.log() - label_logit
        if with_grad:
            scale = 1 / (N * total)
            at_label = (-others).to(p_dtype)
            p.scatter_(1, label[:, None], at_label[:, None])
            rounded_off[chunk] = scale * (-others - at_label)  # added back below
            # With `out`, autocast does not turn the exponentials into fp16.
            product = torch.mm(p[:, :V], weight.to(p_dtype), out=new(n, D, dtype=p_dtype))
            dhidden[chunk] = scale[:, None] * product
            scaled = (F.pad(h, (0, COLUMNS), value=1.0) * scale[:, None]).to(p_dtype)
            weight_grad_kernel[D // wide_D, triton.cdiv(V, tall)](
                tiled(p, [deep, tall]), tiled(scaled, [deep, wide_D]),
                tiled(scaled, [deep, COLUMNS]), tiled(dweight, [tall, wide_D]), dbias, n, V, D,
                BLOCK_V=tall, BLOCK_D=wide_D, BLOCK_N=deep, FIRST=start == 0,
                num_warps=8)  # fmt: skip
    # p is freed before dweight is copied to its own type. The launch holds it, too.
    del p, buffer, take_exponentials
    if with_grad:
        # The label's entry is as large as all others of its row together, and bf16 rounds it to 8
        # bits. While rows are alike, as when training begins, all of them err to one side. So what
        # the rounding lost is added to the three gradients at the label.
        dhidden.addcmul_(rounded_off[:, None], label_rows)
        dweight.index_put_((labels,), rounded_off[:, None] * hidden, accumulate=True)
        dbias.index_put_((labels,), rounded_off, accumulate=True)
    return losses.mean(), *(t.to(weight.dtype) for t in (dhidden, dweight, dbias))

@masked_lm.register_fake
def _(hidden, weight, bias, labels, with_grad):
    gradients = [t.new_empty(t.shape if with_grad else 0) for t in (hidden, weight, bias)]
    return weight.new_empty((), dtype=torch.float32), *gradients
