"""A training step beside that of transformers' RobertaForMaskedLM, in one process.

    python tests/bench_step.py --preset small --batch 16 --dropout 0.1

Same weights, batch, optimizer and clipping. Theirs computes its own loss, over the logits of every
token, as it is used. Extra memory is what a step takes at most beyond weights and optimizer.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import RobertaForMaskedLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from alignmlm import (
    SPECIALS,
    Batch,
    MaskedLM,
    Settings,
    make_dictionary,
    mask_tokens,
    preset,
    to_hf,
)
from train import add_options, given_settings, make_optimizer


def peak_memory(step, device: str) -> int:
    """Bytes that one call of `step` takes at most, beyond what is allocated before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def benchmark(s: Settings, device: str, compiled: bool) -> None:
    """A training step beside that of transformers' RobertaForMaskedLM: same weights, same batch."""
    ours = MaskedLM(s).to(device).train()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(ours, folder)
        theirs = RobertaForMaskedLM.from_pretrained(folder).to(device).train()
    rng = np.random.default_rng(0)
    tokens = rng.integers(SPECIALS, s.vocab_size, (s.batch, s.positions))
    same = np.zeros_like(tokens), np.zeros_like(tokens) + np.arange(s.positions)
    batch = Batch(*mask_tokens(tokens, s, rng), *same).to(device)
    labels = torch.full_like(batch.tokens, -100).scatter_(1, batch.masked, batch.labels)
    everything = torch.ones_like(batch.tokens)  # attention_mask, as its collator makes it
    dictionary = torch.from_numpy(make_dictionary(s)).to(device)

    def stepper(model, loss_of):
        optimizer = make_optimizer(model, s)

        def step():
            with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
                loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            optimizer.step()
            optimizer.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()

        return step

    our_net, their_net = (torch.compile(m) if compiled else m for m in (ours, theirs))
    steps = {
        "alignmlm": stepper(ours, lambda: our_net(batch, dictionary)[0]),
        "transformers": stepper(theirs, lambda: their_net(
            input_ids=batch.tokens, attention_mask=everything, labels=labels).loss),
    }  # fmt: skip
    seconds = {name: [] for name in steps}
    for repeat in range(13):  # in turn, so that both meet the same machine; three to warm up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name] += [time.perf_counter() - started] if repeat >= 3 else []
    print("| step | median ms | fastest | slowest | tokens/s | extra memory, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    memory = {name: peak_memory(step, device) / 2**20 for name, step in steps.items()}
    for name, t in seconds.items():
        median, *ends = (1e3 * f(t) for f in (np.median, min, max))
        print(f"| {name} | {median:.1f} | {ends[0]:.1f} | {ends[1]:.1f} "
              f"| {1e3 * tokens.size / median:,.0f} | {memory[name]:.0f} |")  # fmt: skip
    speed = np.median(seconds["transformers"]) / np.median(seconds["alignmlm"])
    share = memory["alignmlm"] / memory["transformers"]
    print(f"\n{speed:.2f} times as fast, {share:.2f} of its extra memory")
    print(f"({device}, {torch.get_num_threads()} threads, torch {torch.__version__})")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    args = parser.parse_args()
    benchmark(preset(args.preset, **given_settings(args)), args.device, args.compile)
