"""The masked-language-model loss over a large vocabulary, without its N x V matrix of logits."""

import torch
import torch.nn.functional as F


def masked_lm_oracle(hidden, weight, bias, labels, ignore_index=-100):
    """The definition: hidden (N, D), weight (V, D), bias (V,), labels (N,) -> scalar loss."""
    selected = labels != ignore_index
    logits = F.linear(hidden[selected], weight, bias)
    return F.cross_entropy(logits, labels[selected], reduction="sum") / selected.sum().clamp(min=1)
