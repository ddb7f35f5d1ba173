"""The two losses that touch the whole vocabulary, fused: alignmlm.py calls nothing else here."""

from kernels.alignment import alignment_oracle
from kernels.masked_softmax import masked_lm_oracle


def masked_lm_loss(hidden, weight, bias, labels, ignore_index=-100):
    """Mean cross entropy over the rows of hidden (..., D) whose label is not ignored."""
    return masked_lm_oracle(hidden.reshape(-1, hidden.shape[-1]), weight, bias,
                            labels.reshape(-1), ignore_index)


def alignment_loss(weight, pairs):
    """Minus the mean cosine of weight[i] and weight[j] over the (K, 2) pairs (i, j)."""
    return alignment_oracle(weight, pairs)
