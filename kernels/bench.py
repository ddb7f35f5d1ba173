"""Time and memory of both losses, forward and backward together, beside others that compute them.

    python -m kernels.bench [--out results]

On a GPU: by device events, against eager PyTorch, torch.compile and, after `pip install .[bench]`,
Liger and CCE; with shares of two rooflines measured in the same run. On a CPU: the plain path
against gather + F.linear + F.cross_entropy. Writes kernels-gpu.json and .png, or -cpu.
"""

import argparse
import json
import statistics
import time
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from kernels import alignment_loss, masked_lm_loss

try:
    from cut_cross_entropy import linear_cross_entropy as cce
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
except ImportError:
    cce = liger = None

# (kernel, tokens or pairs, D, V). The project's size is the first of its kind; 50,021 is a prime.
GPU_SHAPES = [
    *(("masked_lm", 512 * sequences, D, V) for D in (512, 256, 768)
      for V in (80_000, 16_000, 128_000, 50_021) for sequences in (256, 64, 8)),
    *(("alignment", K, D, 80_000) for D in (512, 256, 768) for K in (40_000, 20_000, 4_000)),
]  # fmt: skip
CPU_SHAPES = [("masked_lm", 4_000, 256, 16_000), ("masked_lm", 53_333, 256, 16_000),
              ("masked_lm", 2_000, 64, 4_000), ("alignment", 1_000, 64, 4_000)]  # fmt: skip
MASKED = 0.15  # of the tokens have a label: N = 600, 8,000 and 300 on the CPU


def make(kernel, size, D, V, device, dtype):
    """Fresh random inputs; a dictionary as in the paper, of words that occur in one pair each."""
    torch.manual_seed(0)
    weight = torch.randn(V, D, device=device, dtype=dtype).div_(D**0.5).requires_grad_()
    if kernel == "alignment":
        words = torch.randperm(V // 2, device=device)[:size]
        return weight, torch.stack([words, words + V // 2], 1)
    hidden = torch.randn(size, D, device=device, dtype=dtype, requires_grad=True)
    bias = torch.zeros(V, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (size,), device=device)
    labels[torch.randperm(size, device=device)[round(MASKED * size) :]] = -100
    return hidden, weight, bias, labels


def eager_alignment(weight, pairs):
    return -F.cosine_similarity(weight[pairs[:, 0]], weight[pairs[:, 1]]).mean()


def projection(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def contestants(kernel, cuda):
    """name -> loss. CCE 25.1.1 has no bias and is spared it; its default skips small gradients."""

    def gathered(loss):  # so that none works on the rows without a label
        return lambda h, w, b, y: loss(h[y != -100], w, b, y[y != -100])

    if kernel == "alignment":
        found = {"ours": alignment_loss, "eager": eager_alignment}
        return found | ({"compiled": torch.compile(eager_alignment, dynamic=False)} if cuda else {})
    found = {"ours": masked_lm_loss, "eager": gathered(projection)}
    if cuda:
        found["compiled"] = gathered(torch.compile(projection, dynamic=False))
    if cuda and liger:
        found["liger"] = gathered(lambda h, w, b, y: liger(h, w, y, b))
        found["cce"] = gathered(lambda h, w, b, y: cce(h, w, y))
        found["cce exact"] = gathered(lambda h, w, b, y: cce(h, w, y, filter_eps=None))
    return found


def step(loss, case):
    loss(*case).backward()
    for tensor in case:
        tensor.grad = None


def peak_memory(call, device):
    """Bytes that a call takes at most, beyond what is allocated before it: gradients count only if
    the call before has let its own go."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def take_turns(calls, repeats, device):
    """Milliseconds of each call, name -> [repeats], after three to warm up. They take turns, so
    that a busy machine is busy for all."""
    times = {name: [] for name in calls}
    for _ in range(3 + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: ms[3:] for name, ms in times.items()}


def rooflines():
    """Bytes a second of a large copy, read and written, and operations of a large bf16 product."""
    from triton import testing  # where there is CUDA

    source = torch.randint(256, (1 << 32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = testing.do_bench(lambda: target.copy_(source), rep=500, return_mode="median")
    product = testing.do_bench(lambda: a @ b, rep=500, return_mode="median")
    return {"alignment": 2e3 * source.numel() / copy, "masked_lm": 2e3 * 8192**3 / product}


def measure_gpu(shape):
    """Rows of results: milliseconds at three quantiles, bytes beyond the inputs, roofline share."""
    from triton import testing

    kernel, size, D, V = shape
    case = make(*shape, "cuda", torch.bfloat16 if kernel == "masked_lm" else torch.float32)
    # Three products of N rows, or 2K rows of fp32 read and written.
    work = 6 * round(MASKED * size) * D * V if kernel == "masked_lm" else 4 * size * D * 4
    torch.compiler.reset()  # or it gives up after 8 shapes
    for name, loss in contestants(kernel, True).items():
        call = partial(step, loss, case)
        for _ in range(3):  # compiles, makes indices
            call()
        extra = peak_memory(call, "cuda")
        # Microseconds of work would be timed by their launches: these are replayed from a graph.
        bench = testing.do_bench if kernel == "masked_lm" else testing.do_bench_cudagraph
        ms = bench(call, rep=500, quantiles=[0.2, 0.5, 0.8])
        yield {"name": name, "ms": ms, "extra_bytes": extra, "rate": work / ms[1] * 1e3}


def measure_cpu(shape):
    """Rows of results, as of `measure_gpu`, without a roofline."""
    case = make(*shape, "cpu", torch.float32)
    calls = {k: partial(step, loss, case) for k, loss in contestants(shape[0], False).items()}
    for name, ms in take_turns(calls, 9, "cpu").items():
        low, *_, high = statistics.quantiles(ms, n=5)
        yield {"name": name, "ms": [low, statistics.median(ms), high],
               "extra_bytes": peak_memory(calls[name], "cpu")}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    roofs = rooflines() if cuda else {}
    report = {"device": device, "torch": torch.__version__, "roofs": roofs, "rows": []}
    print(device, *(f"{kernel}: roof {roof:.4g}/s" for kernel, roof in roofs.items()), sep="; ")
    shapes = GPU_SHAPES if cuda else CPU_SHAPES
    axes = Figure(figsize=(8, 1 + 0.6 * len(shapes)), layout="constrained").subplots()
    for at, shape in enumerate(shapes):
        rows = list(measure_gpu(shape) if cuda else measure_cpu(shape))
        for place, row in enumerate(rows):
            row |= {"shape": shape, "of_ours": row["ms"][1] / rows[0]["ms"][1]}
            row |= {"of_roof": row["rate"] / roofs[shape[0]]} if cuda else {}
            print("{} {:,} x {} x {:,}".format(*shape), f"{row['name']:10}",
                  "{:.3f} {:.3f} {:.3f} ms".format(*row["ms"]), f"{row['of_ours']:.2f} of ours",
                  f"{row['extra_bytes'] / 2**20:,.0f} MiB",
                  f"{row['rate']:.3g}/s, {row['of_roof']:.0%} of the roof" if cuda else "",
                  sep="  ", flush=True)  # fmt: skip
            axes.barh(at + 0.13 * place, row["of_ours"], 0.12, color=f"C{place}",
                      label=row["name"] if at == 0 else None)  # fmt: skip
        report["rows"] += rows
    axes.set_yticks(range(len(shapes)), ["{}\n{:,} x {} x {:,}".format(*s) for s in shapes])
    axes.invert_yaxis()
    axes.set_xlabel(f"time, as a multiple of ours ({device})")
    axes.legend()
    path = options.out / ("kernels-gpu" if cuda else "kernels-cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    axes.figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
