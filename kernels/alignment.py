"""The alignment loss of ALIGN-MLM: minus the mean cosine over a bilingual dictionary."""

import torch.nn.functional as F


def alignment_oracle(weight, pairs):
    """weight (V, D), pairs (K, 2) -> - mean of cos(weight[i], weight[j]); a zero row has cosine 0."""
    if not len(pairs):
        return weight.sum() * 0.0
    rows = F.normalize(weight[pairs], dim=-1)  # (K, 2, D)
    return -(rows[:, 0] * rows[:, 1]).sum(-1).mean()
