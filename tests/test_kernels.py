"""The losses of kernels/, twice: on the plain path, and on the kernels in Triton's interpreter.

The interpreter must be chosen before Triton is imported. So the last test runs this file again in a
process with TRITON_INTERPRET=1, where every tensor but a float64 one goes to the kernels.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import alignment, alignment_loss, masked_lm_loss, masked_softmax

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
DTYPES = list(TOLERANCE)[INTERPRETED:]  # the kernels have no float64
property_test = settings(
    deadline=None, derandomize=True, max_examples=25 if INTERPRETED else 100,
    suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="of the kernels only")
on_plain_path = pytest.mark.skipif(INTERPRETED, reason="of the plain path only")
FOUR = "loss", "dhidden", "dweight", "dbias"

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle):
        """bf16 is kept as its 16 bits, which the interpreter's own dot takes for integers."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float32)
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, c, *_):
        return TensorHandle(numbers(a) @ numbers(b) + c.data, c.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(kernels, "_fused", lambda weight: weight.dtype != torch.float64)


def leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def backward(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def assert_close(found, expected, dtype, names):
    for a, b, name in zip(found, expected, names, strict=True):
        assert not a.isnan().any(), name
        if b.isinf().any():
            assert torch.equal(a.double(), b), name
            continue
        # A loss is compared with a nat at least: its rounding is that of the logits it comes from.
        floor = 1.0 if b.dim() == 0 else 1e-20
        error = (a.double() - b).norm() / b.norm().clamp(min=floor)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


# ------------------------------------------------------------------ the masked-language-model loss


def masked_lm(hidden, weight, bias, labels):
    inputs = leaves(hidden, weight, bias)
    return backward(masked_lm_loss(*inputs, labels), *inputs)


def reference_masked_lm(hidden, weight, bias, labels):
    """In float64, and by other means: loss, dhidden, dweight, dbias."""
    h, w, b = leaves(hidden, weight, bias, dtype=torch.float64)
    selected = labels != -100
    logits = F.linear(h[selected], w, b)
    loss = F.cross_entropy(logits, labels[selected], reduction="sum") / max(int(selected.sum()), 1)
    return backward(loss, h, w, b)


def draw_masked_lm(seed, shape, D, V, masked, scale, dtype):
    """Whole numbers, whose products are exact in any order; so errors are those of the softmax."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*size):
        return torch.randint(-2, 3, size, generator=generator).double()

    hidden, weight, bias = whole(*shape, D), whole(V, D) * scale, whole(V) * scale
    labels = torch.randint(0, V, shape, generator=generator)
    chance = {"none": 0.0, "some": 0.3, "all": 1.0}[masked]
    labels[torch.rand(shape, generator=generator) >= chance] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def masked_lm_case(dtype=torch.float32):
    return draw_masked_lm(5, (4, 30), 32, 100, "some", 0.25, dtype)


@property_test
@given(seed=st.integers(0, 2**32), shape=st.sampled_from([(1,), (7,), (3, 5), (2, 70), (140,)]),
       D=st.sampled_from([16, 32, 48, 80, 320]), V=st.integers(1, 600),
       dtype=st.sampled_from(DTYPES), masked=st.sampled_from(["none", "some", "all"]),
       scale=st.sampled_from([0.0, 0.0625, 0.5, 4.0, 128.0]), forbidden=st.booleans(),
       rows=st.sampled_from([40, 1000]))  # fmt: skip
@example(0, (140,), 48, 513, torch.float32, "all", 0.0625, False, 1000)
@example(1, (140,), 48, 513, torch.bfloat16, "all", 128.0, True, 40)
def test_masked_lm_is_the_mean_cross_entropy(monkeypatch, seed, shape, D, V, dtype, masked, scale,
                                             forbidden, rows):  # fmt: skip
    hidden, weight, bias, labels = draw_masked_lm(seed, shape, D, V, masked, scale, dtype)
    if forbidden:  # every third word that is no label
        bias[(torch.arange(V) % 3 == 0) & ~torch.isin(torch.arange(V), labels)] = -torch.inf
    for chunk in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(masked_softmax, chunk, rows * V * 4)
    found = masked_lm(hidden, weight, bias, labels)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for grad, owner in zip(found[1:], (hidden, weight, bias), strict=True):
        assert (grad.dtype, grad.shape) == (owner.dtype, owner.shape)
    assert_close(found, reference_masked_lm(hidden, weight, bias, labels), dtype, FOUR)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_lm_of_random_reals(dtype):
    torch.manual_seed(0)
    case = torch.randn(150, 64), torch.randn(300, 64) / 4, torch.randn(300)
    labels = torch.where(torch.rand(150) < 0.5, torch.randint(0, 300, (150,)), -100)
    case = *(t.to(dtype) for t in case), labels
    assert_close(masked_lm(*case), reference_masked_lm(*case), dtype, FOUR)


def test_a_confident_prediction_keeps_its_small_gradient():
    """p - 1, as a difference, would be 0 here: the other words have e^-20 together."""
    hidden, weight, bias = torch.zeros(1, 16), torch.zeros(8, 16), torch.zeros(8)
    weight[3, 0], hidden[0, 0] = 1.0, 22.0
    case = hidden, weight, bias, torch.tensor([3])
    assert_close(masked_lm(*case)[1:], reference_masked_lm(*case)[1:], torch.float32, FOUR[1:])


@pytest.mark.parametrize("level", [-1e5, -70.0, 70.0, 1e5])
def test_a_common_shift_of_the_logits_changes_nothing(level):
    hidden, weight, bias, labels = draw_masked_lm(0, (9,), 16, 40, "all", 0.5, torch.float32)
    expected = reference_masked_lm(hidden, weight, bias, labels)
    assert_close(masked_lm(hidden, weight, bias + level, labels), expected, torch.float32, FOUR)


def test_a_label_that_cannot_be_costs_infinity_and_gives_no_nan():
    hidden, weight, bias, labels = draw_masked_lm(0, (9,), 16, 40, "all", 0.5, torch.float32)
    bias[labels[4]] = -torch.inf
    found = masked_lm(hidden, weight, bias, labels)
    assert found[0] == torch.inf
    assert_close(found, reference_masked_lm(hidden, weight, bias, labels), torch.float32, FOUR)


def test_masked_lm_does_not_mind_strides():
    hidden, weight, bias, labels = masked_lm_case()
    strided = (hidden.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T,
               bias.repeat_interleave(2)[::2], labels.T.contiguous().T)  # fmt: skip
    assert not any(t.is_contiguous() for t in strided)
    inputs = [t.requires_grad_() for t in strided[:3]]
    found = backward(masked_lm_loss(*inputs, strided[3]), *inputs)
    odd = torch.zeros(weight.numel() + 1)[1:].view_as(weight).copy_(weight)
    assert odd.data_ptr() % 16
    odd = masked_softmax.masked_lm_fused if INTERPRETED else masked_softmax.masked_lm_oracle, odd
    case = hidden.flatten(0, 1), odd[1], bias, labels.flatten()
    for other in (found, odd[0](*case, -100, True)):
        for a, b in zip(other, masked_lm(hidden, weight, bias, labels), strict=True):
            assert torch.equal(a.view_as(b), b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_lm_has_the_same_bits_every_run(dtype):
    runs = [masked_lm(*masked_lm_case(dtype)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_masked_lm_without_grad_makes_no_gradient(monkeypatch):
    seen, operator = [], kernels._masked_lm
    monkeypatch.setattr(kernels, "_masked_lm", lambda *a: seen.append(operator(*a)) or seen[-1])
    case = masked_lm_case()
    expected = masked_lm(*case)[0]
    with torch.no_grad():
        assert torch.equal(masked_lm_loss(*leaves(*case[:3]), case[3]), expected)
    assert torch.equal(masked_lm_loss(*case), expected)
    sizes = [[grad.numel() > 0 for grad in grads] for _, *grads in seen]
    assert sizes == [[True] * 3, [False] * 3, [False] * 3]


def test_masked_lm_scales_with_the_upstream_gradient_and_accumulates():
    *case, labels = masked_lm_case()
    inputs = leaves(*case)
    for factor in (2.0, 0.5):
        (factor * masked_lm_loss(*inputs, labels)).backward()
    for leaf, grad in zip(inputs, masked_lm(*case, labels)[1:], strict=True):
        torch.testing.assert_close(leaf.grad, 2.5 * grad)


def test_masked_lm_under_autocast_is_that_of_its_type():
    *case, labels = masked_lm_case()
    inputs = leaves(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backward(masked_lm_loss(*inputs, labels), *inputs)
    assert [t.dtype for t in found] == [torch.float32] * 4
    expected = masked_lm(*(t.bfloat16() for t in case), labels)
    assert all(torch.equal(a, b.float()) for a, b in zip(found, expected, strict=True))


def test_another_ignore_index():
    *case, labels = masked_lm_case()
    expected = masked_lm_loss(*case, labels)
    assert torch.equal(masked_lm_loss(*case, labels.where(labels >= 0, -1), -1), expected)


@pytest.mark.parametrize("wrong", [-1, -257, 100, 103, 2**40])
def test_a_label_outside_the_vocabulary_is_never_a_number(wrong):
    hidden, weight, bias, labels = masked_lm_case()
    labels[1, 2] = wrong
    if INTERPRETED:
        assert masked_lm(hidden, weight, bias, labels)[0].isnan()
    else:
        with pytest.raises(ValueError, match=r"labels \(120,\) must be in \[0, 100\) or -100"):
            masked_lm_loss(hidden, weight, bias, labels)


# ------------------------------------------------------------------------------ the alignment loss


def align(weight, pairs):
    (w,) = leaves(weight)
    return backward(alignment_loss(w, pairs), w)


def reference_alignment(weight, pairs):
    """In float64, of the pairs without zero rows: loss, dweight."""
    (w,) = leaves(weight, dtype=torch.float64)
    kept = pairs[(weight[pairs] != 0).any(2).all(1)]
    cosines = (w[kept[:, 0]] * w[kept[:, 1]]).sum(1) / w[kept].norm(dim=2).prod(1)
    return backward(-cosines.sum() / max(len(pairs), 1) + 0 * w.sum(), w)


@property_test
@given(seed=st.integers(0, 2**32), V=st.integers(2, 24), K=st.integers(0, 30),
       D=st.sampled_from([16, 48, 64, 528, 1024]), dtype=st.sampled_from(DTYPES),
       zeros=st.booleans())  # fmt: skip
@example(0, 12, 30, 48, torch.float32, True)
def test_alignment_is_minus_the_mean_cosine(seed, V, K, D, dtype, zeros):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    if zeros:
        weight[torch.rand(V, generator=generator) < 0.2] = 0
    i = torch.randint(0, V, (K,), generator=generator)  # among so few rows, many times the same
    pairs = torch.stack([i, (i + torch.randint(1, V, (K,), generator=generator)) % V], 1)
    found = align(weight, pairs)
    assert_close(found, reference_alignment(weight, pairs), dtype, ["loss", "dweight"])
    assert not found[1][(weight == 0).all(1)].any()


def test_alignment_of_a_word_with_itself_is_perfect():
    weight = torch.randn(5, 32)
    loss, grad = align(weight, torch.tensor([[1, 1], [1, 1], [4, 4]]))
    torch.testing.assert_close(loss, torch.tensor(-1.0))
    torch.testing.assert_close(grad, torch.zeros(5, 32), rtol=0, atol=1e-6)


def test_alignment_of_many_to_many_pairs_in_strides():
    torch.manual_seed(0)
    weight, pairs = torch.randn(12, 32), torch.cartesian_prod(torch.arange(3), torch.arange(3, 12))
    expected = reference_alignment(weight, pairs)
    for case in ((weight, pairs), (weight.T.contiguous().T, pairs.T.contiguous().T)):
        assert_close(align(*case), expected, torch.float32, ["loss", "dweight"])


@in_interpreter
def test_the_guess_of_the_upstream_gradient_leaves_no_trace():
    """Right or wrong, interleaved or not: the bits are those of a dictionary never seen before."""
    torch.manual_seed(0)
    weight, pairs = torch.randn(8, 16), torch.randint(0, 8, (10, 2))

    def fresh(g):
        (w,) = leaves(weight)
        return torch.autograd.grad(alignment_loss(w, pairs.clone()) * g, w)[0]

    (w,) = leaves(weight)
    for g in (1.0, 10.0, 10.0, 0.3, 0.0, 2.0):
        assert torch.equal(torch.autograd.grad(alignment_loss(w, pairs) * g, w)[0], fresh(g))
    losses = [alignment_loss(w, pairs) for _ in range(3)]
    for loss, g in zip(losses, (2.0, 5.0, 2.0), strict=True):
        assert torch.equal(torch.autograd.grad(loss * g, w)[0], fresh(g))
    loss = alignment_loss(w, pairs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # rather than write over a gradient that was handed out


@in_interpreter
def test_the_index_follows_its_dictionary():
    torch.manual_seed(0)
    weight, pairs = torch.randn(30, 16), torch.randint(0, 20, (10, 2))
    align(weight, pairs)
    before = len(alignment._indices)
    pairs[7] = torch.tensor([25, 26])
    for matrix in (weight, weight[:28]):
        expected = reference_alignment(matrix, pairs)
        assert_close(align(matrix, pairs), expected, torch.float32, ["loss", "dweight"])
    assert len(alignment._indices) == before
    del pairs
    assert len(alignment._indices) == before - 1


@pytest.mark.parametrize("wrong", [-1, 30, 2**40])
def test_a_pair_outside_the_matrix_is_never_a_number(wrong):
    weight, pairs = torch.randn(30, 16), torch.tensor([[1, 2], [3, wrong], [1, 4]])
    if INTERPRETED:
        assert align(weight, pairs)[0].isnan()
    else:
        with pytest.raises(ValueError, match=r"pairs of shape \(3, 2\) has values outside"):
            alignment_loss(weight, pairs)


# -------------------------------------------------------------------------------------------- both


def test_the_tied_matrix_gathers_all_its_gradients():
    torch.manual_seed(0)
    weight, bias, tokens = torch.randn(60, 16), torch.randn(60), torch.randint(0, 60, (4, 8))
    labels = torch.where(torch.rand(4, 8) < 0.4, tokens, -100)
    pairs = torch.randint(0, 60, (20, 2))
    w, b = leaves(weight, bias)
    hidden = F.embedding(tokens, w).tanh()
    (masked_lm_loss(hidden, w, b, labels) + 10 * alignment_loss(w, pairs)).backward()
    w64, b64 = leaves(weight, bias, dtype=torch.float64)
    logits = F.linear(F.embedding(tokens, w64).tanh(), w64, b64)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (loss - 10 * F.cosine_similarity(w64[pairs[:, 0]], w64[pairs[:, 1]]).mean()).backward()
    assert_close([w.grad, b.grad], [w64.grad, b64.grad], torch.float32, FOUR[2:])


def test_both_compile_without_a_graph_break():
    hidden, weight, bias, labels = masked_lm_case()
    pairs = torch.randint(0, 100, (30, 2))

    def both(h, w, b, y):
        return masked_lm_loss(h, w, b, y) + 10 * alignment_loss(w, pairs)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")  # all but code
    for B in (4, 3):  # the second compiles for any B
        inputs = leaves(hidden[:B], weight, bias)
        found = backward(compiled(*inputs, labels[:B]), *inputs)
        torch.testing.assert_close(found, backward(both(*inputs, labels[:B]), *inputs))


@pytest.mark.parametrize("name", ["masked_lm_loss", "alignment_loss"])
def test_a_second_derivative_is_refused(name):
    if name == "alignment_loss" and not INTERPRETED:
        pytest.skip("the oracle has all derivatives")
    hidden, weight, bias, labels = masked_lm_case()
    weight.requires_grad_()
    arguments = (hidden, weight, bias, labels) if "masked" in name else (weight, labels[:, :2] % 9)
    loss = getattr(kernels, name)(*arguments)
    with pytest.raises(RuntimeError, match=f"{name} can be differentiated once only"):
        torch.autograd.grad(loss, weight, create_graph=True)


def what_does_not_fit():
    hidden, weight, bias, labels = masked_lm_case()
    wide = torch.zeros(1, 1040), torch.zeros(5, 1040), torch.zeros(5), labels[0, :1]
    for name, *case in (
        ("hidden", hidden[..., :16], weight, bias, labels),
        ("hidden", hidden.double(), weight, bias, labels),
        ("hidden", hidden.to("meta"), weight, bias, labels),
        ("bias", hidden, weight, bias[:-1], labels),
        ("bias", hidden, weight, bias.half(), labels),
        ("bias", hidden, weight, bias.to("meta"), labels),
        ("labels", hidden, weight, bias, labels[:-1]),
        ("labels", hidden, weight, bias, labels.int()),
        ("labels", hidden, weight, bias, labels.to("meta")),
        ("weight", hidden[..., :24], weight[:, :24], bias, labels),
        ("weight", *wide),
        ("weight", hidden, weight[0], bias, labels),
        ("weight", hidden, weight[:0], bias[:0], labels),
        ("weight", hidden.long(), weight.long(), bias.long(), labels),
    ):
        yield masked_lm_loss, name, case
    pairs = torch.zeros(4, 2, dtype=torch.int64)
    for name, *case in (
        ("pairs", weight, pairs[:, :1]),
        ("pairs", weight, pairs.int()),
        ("pairs", weight, pairs.to("meta")),
        ("weight", weight[:, :8], pairs),
    ):
        yield alignment_loss, name, case


@pytest.mark.parametrize("loss, name, case", list(what_does_not_fit()))
def test_what_does_not_fit_is_refused_by_name_and_shape(loss, name, case):
    with pytest.raises(ValueError, match=rf"^{name} is .*\(.*must be"):
        loss(*case)


@on_plain_path
def test_gradients_of_the_oracles_are_those_of_their_values():
    torch.manual_seed(0)
    shapes = (2, 4, 16), (11, 16), (11,)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    labels = torch.tensor([[3, -100, 10, 3], [0, 0, -100, 7]])
    assert torch.autograd.gradcheck(lambda *a: masked_lm_loss(*a, labels), inputs)
    pairs = torch.tensor([[0, 5], [0, 6], [1, 5], [2, 7], [2, 7], [8, 8]])
    assert torch.autograd.gradcheck(lambda w: alignment_loss(w, pairs), inputs[1:2])


@on_plain_path
def test_the_plain_path_holds_one_chunk_of_logits(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                self.numel = max(self.numel, getattr(tensor, "numel", int)())
            return result

    monkeypatch.setattr(masked_softmax, "CPU_CHUNK", 40_000 * 4)
    case = draw_masked_lm(0, (240,), 16, 2000, "all", 0.25, torch.float32)  # 480,000 logits
    with Largest() as largest:
        masked_softmax.masked_lm_oracle(*case, -100, True)
    assert largest.numel == 40_000


@on_plain_path
def test_without_triton_the_plain_path_serves():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
assert kernels.masked_softmax.triton is None
w = torch.ones(4, 16, requires_grad=True)
loss = kernels.masked_lm_loss(w, w, w[:, 0], torch.tensor([0, 1, 2, -100]))
(loss + kernels.alignment_loss(w, torch.tensor([[0, 1]]))).backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@on_plain_path
def test_all_of_this_on_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--durations=5", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0
