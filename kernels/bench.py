"""Time, memory and error of the losses and of a training step, beside others that compute the same.

    python -m kernels.bench --shapes mlm:832x64x4000 align:1000x64x4000 --peers ours eager

A shape of mlm is N x D x V: rows, all with a label, width, vocabulary; of align K x D x V, K pairs;
step is a training step of this project and of transformers. GPUs compute in bf16, but the alignment
in fp32; CPUs in fp32. Contestants take turns, so that a busy machine is busy for all. Extra memory
is the most that forward and backward allocate. The error is the largest relative one of the loss
and the gradients against float64; for the floors, which are bare products or copies, it says 0.
"""

import argparse
import importlib
import tempfile
import time
from functools import partial
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import AdamW

import alignmlm
from alignmlm import alignment_equation
from kernels import alignment_loss, masked_lm_loss

CUDA = torch.cuda.is_available()
# The project's own sizes are 832 rows (preset tiny) and 9,856 (preset paper).
SIZES = ("mlm:832x64x4000 mlm:600x256x16000 mlm:2000x512x32000 mlm:8000x256x16000 "
         "align:1000x64x4000 step")  # fmt: skip
if CUDA:
    SIZES = "mlm:9856x512x80000 mlm:19661x512x80000 mlm:614x512x16000 align:40000x512x80000 step"

def eager(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)

def chunked(rows=None):  # PyTorch's own, which makes the logits of so many rows at a time
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return lambda h, w, b, y: F.linear_cross_entropy(h, w, y, linear_bias=b, options=options)

def liger(**options):  # This is LinkedIn's Liger Kernel.
    module = importlib.import_module("liger_kernel.transformers.functional")
    return lambda h, w, b, y: module.liger_fused_linear_cross_entropy(h, w, y, b, **options)

def without_bias(module, name, **options):
    # The bias is zero here, and so these compute the same loss with a little less to do.
    loss = getattr(importlib.import_module(module), name)
    return lambda h, w, b, y: loss(h, w, y, **options)

# name: what loads a peer, a function of hidden, weight, bias and labels, or fails if it is missing.
PEERS = {
    "ours": lambda: masked_lm_loss,
    "eager": lambda: eager,  # what everyone has: all logits at once
    "compiled": partial(torch.compile, eager, dynamic=False),
    "compiled, chunker": partial(
        torch.compile, eager, dynamic=False, options={"auto_chunker.enable": True}),
    "F.lce auto": chunked,  # It chooses the rows itself.
    "F.lce 4096": partial(chunked, 4096),
    "liger": liger,
    # Its chunks have N D / V rows, times a constant.
    "liger fp32 x64": partial(liger, accum_dtype=torch.float32, chunk_mem_const=64),
    # By default Apple's cut cross entropy leaves out small gradients.
    "cce exact": partial(
        without_bias, "cut_cross_entropy", "linear_cross_entropy", filter_eps=None),
    "quack": partial(without_bias, "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}  # fmt: skip

# Forward and backward are timed together, as a training step has both.
def differentiate(loss, tensors, targets):
    """The loss and the gradients of tensors, None for one that is not used. targets: the labels,
    or the pairs of the alignment."""
    value = loss(*tensors, targets)
    return value.detach(), *torch.autograd.grad(value, tensors, allow_unused=True)

def three_products(hidden, weight, logits):
    # The floor: whatever makes the gradients has these to do.
    torch.mm(hidden, weight.T, out=logits)
    logits @ weight, logits.T @ hidden
    return ()

def masked_lm_contest(N, D, V):
    """Contestants, name -> call, and the loss and gradients in float64."""
    # The logits of random rows have a deviation of about 1.
    dtype = torch.bfloat16 if CUDA else torch.float32
    hidden, weight = torch.randn(N, D), torch.randn(V, D) / D**0.5
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight, torch.zeros(V))]
    labels = torch.randint(V, (N,))
    calls = {}
    for name, load_peer in PEERS.items():
        try:
            calls[name] = partial(differentiate, load_peer(), tensors, labels)
        # Some peers are not installed, and some cannot be imported without a GPU.
        except Exception as error:
            print(f"| | {name} | skipped: {str(error)[:80]} | | | | |")
    hidden, weight, _ = (tensor.detach() for tensor in tensors)
    # The last argument is memory for the logits, which should not be allocated in every turn.
    calls["three products"] = partial(three_products, hidden, weight, hidden @ weight.T)
    return calls, differentiate(eager, [tensor.double() for tensor in tensors], labels)

def alignment_contest(K, D, V):
    # Each row is in one pair at most, as in the dictionary.
    weight, pairs = torch.randn(V, D).requires_grad_(), torch.randperm(V)[: 2 * K].view(K, 2)
    peers = {"ours": alignment_loss, "eager": alignment_equation}
    peers["compiled"] = torch.compile(alignment_equation, dynamic=False)
    calls = {name: partial(differentiate, loss, [weight], pairs) for name, loss in peers.items()}
    # The floor: the rows of the pairs must be read, and as many be written. A floor has no results
    # to compare, and so this returns an empty slice.
    rows, target = weight.detach()[: 2 * K], torch.empty(2 * K, D)
    calls["a copy of the rows"] = lambda: target.copy_(rows)[:0]
    return calls, differentiate(alignment_equation, [weight.double()], pairs)

def step_contest():
    """L_MLM by AdamW on random tokens, from the same weights; the error is that of the loss."""
    from transformers import RobertaForMaskedLM  # needed by this contest alone
    name, rows, V = ("paper", 32, 80_000) if CUDA else ("small", 16, 16_000)
    s = alignmlm.preset(name, objective="mlm", batch=rows, vocab_size=V, mask_share=0.15,
                        dropout=0.0)  # fmt: skip
    rng = np.random.default_rng(0)
    tokens = rng.integers(alignmlm.SPECIALS, s.vocab_size, (s.batch, s.positions))
    zeros = np.zeros_like(tokens)
    places = zeros + np.arange(s.positions)
    batch = alignmlm.Batch(*alignmlm.mask_tokens(tokens, s, rng), zeros, places)
    batch = batch.to(torch.get_default_device())
    # transformers ignores what has the label -100, but only after its vocabulary projection.
    targets = torch.full_like(batch.tokens, -100).scatter_(1, batch.masked, batch.labels)
    ours = alignmlm.MaskedLM(s)
    with tempfile.TemporaryDirectory() as folder:
        alignmlm.to_hf(ours, folder)
        theirs = RobertaForMaskedLM.from_pretrained(folder).to(batch.tokens.device)

    def step(optimizer, loss):
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            value = loss()[0]  # The first result of either model is its loss.
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [value.detach()]

    truth = ours.double()(batch)[0].detach()
    ours.float()  # The weights came from float32, and so they are as they were.
    calls = {"ours": partial(step, AdamW(ours.parameters()), lambda: ours(batch))}
    adamw = AdamW(theirs.parameters())
    calls["transformers"] = partial(step, adamw, lambda: theirs(batch.tokens, labels=targets))
    return calls, [truth]

def peak_memory(call):
    """MiB that a call takes at most, beyond what is allocated before it."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # A CPU has no such counter, and so its allocations are added up.
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    # Every allocation and every release is an event, the latter with a negative number of bytes.
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0)) / 2**20

def measure(shape, chosen, repeats):
    """Print the rows of the table for one shape, a contestant each."""
    kind, *sizes = shape.replace("x", ":").split(":")
    contests = {"mlm": masked_lm_contest, "align": alignment_contest, "step": step_contest}
    calls, truth = contests[kind](*map(int, sizes))
    rows = {}  # name: memory, error, and the milliseconds of each turn
    for name in chosen or calls:
        try:
            # The first call compiles, and its results are checked.
            errors = [0.0]
            for value, exact in zip(calls[name](), truth, strict=False):
                if value is not None:  # Some peers here leave out the bias.
                    errors.append(float((value.double() - exact).norm() / exact.norm()))
            rows[name] = peak_memory(calls[name]), max(errors), []
        except Exception as failure:  # It may not be made for this device or this shape.
            print(f"| {shape} | {name} | failed: {str(failure)[:80]} | | | | |")
    # In turns: one call of each, and again.
    for _ in range(repeats):
        for name, (_, _, turns) in rows.items():
            start = time.perf_counter()
            calls[name]()
            if CUDA:  # The call has only queued its kernels.
                torch.cuda.synchronize()
            turns.append(1e3 * (time.perf_counter() - start))
    # The median is less moved by other work than the mean.
    for name, (mib, error, turns) in rows.items():
        ms = " | ".join(f"{f(turns):,.2f}" for f in (min, np.median, max))
        print(f"| {shape} | {name} | {ms} | {mib:,.0f} | {error:.0e} |", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--shapes", nargs="+", default=SIZES.split(), help="mlm:NxDxV align:KxDxV step")
    option("--peers", nargs="+", help="contestants by their names in the table (all)")
    option("--repeats", type=int, default=9, help="turns of each contestant")
    options = parser.parse_args()
    torch.set_default_device("cuda" if CUDA else "cpu")
    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    print(device, torch.__version__, "\n")
    print("| shape | contestant | fastest ms | median | slowest | extra MiB | error |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for shape in options.shapes:
        measure(shape, options.peers, options.repeats)

if __name__ == "__main__":
    main()
