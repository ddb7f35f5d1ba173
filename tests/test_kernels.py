"""Both losses, PyTorch's own way and by the kernels: on a GPU, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported. So without a GPU the last test runs this
file again in a process with TRITON_INTERPRET=1, where every tensor goes to the kernels.
"""

import gc
import os
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from alignmlm import alignment_equation, masked_lm_equation
from kernels import alignment, alignment_loss, masked_lm_loss, masked_softmax

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")
ON_KERNELS = INTERPRETED or (CUDA and kernels.fused(torch.empty(1, 16, device="cuda")))
FUSED = kernels.fused
of_kernels = pytest.mark.skipif(not ON_KERNELS, reason="of the kernels only")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = list(TOLERANCE)[ON_KERNELS:]  # the kernels have no float64
FOUR = "loss", "dhidden", "dweight", "dbias"
property_test = settings(max_examples=5 if INTERPRETED else 25, derandomize=True, deadline=None,
                         suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip

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
def on_the_kernels_in_the_interpreter(monkeypatch):
    if INTERPRETED:
        hopper = SimpleNamespace(major=9, multi_processor_count=3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
        monkeypatch.setattr(kernels, "fused", lambda weight: weight.dtype != torch.float64)


def leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def backward(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def assert_close(found, expected, dtype, names=FOUR):
    for a, b, name in zip(found, expected, names, strict=True):
        assert not a.isnan().any(), name
        if b.isinf().any():
            assert torch.equal(a.double(), b), name
            continue
        # A loss is compared with a nat at least: its rounding is that of the logits it comes from.
        # PyTorch's own gradient is a difference, p - 1 at the label, and so rounded as 1 is.
        floor = 1.0 if b.dim() == 0 or not ON_KERNELS else 1e-20
        error = (a.double() - b).norm() / b.norm().clamp(min=floor)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


# ------------------------------------------------------------------ the masked-language-model loss


def masked_lm(hidden, weight, bias, labels):
    inputs = leaves(hidden, weight, bias)
    return backward(masked_lm_loss(*inputs, labels), *inputs)


def expected_masked_lm(hidden, weight, bias, labels):
    inputs = leaves(hidden, weight, bias, dtype=torch.float64)
    return backward(masked_lm_equation(*inputs, labels), *inputs)


def case(N=60, D=32, V=100, dtype=torch.float32, scale=0.25, seed=0):
    """Whole numbers, whose products are exact in any order: the errors are those of the softmax."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*size):
        return torch.randint(-2, 3, size, generator=generator).double()

    made = whole(N, D), whole(V, D) * scale, whole(V) * scale
    labels = torch.randint(0, V, (N,), generator=generator)
    return *(t.to(DEVICE, dtype) for t in made), labels.to(DEVICE)


@property_test
@given(seed=st.integers(0, 2**32), N=st.sampled_from([1, 7, 140, 300]), V=st.integers(1, 600),
       D=st.sampled_from([16, 48, 80, 320]), dtype=st.sampled_from(DTYPES),
       scale=st.sampled_from([0.0, 0.0625, 0.5, 4.0, 128.0]), forbidden=st.booleans(),
       rows=st.sampled_from([40, 1000]))  # fmt: skip
@example(0, 300, 513, 48, torch.float32, 0.0625, False, 1000)
@example(1, 300, 513, 48, torch.bfloat16, 128.0, True, 40)  # beyond reach, in chunks
@example(2, 140, 513, 48, torch.float16, 4.0, False, 40)
def test_masked_lm_is_the_equation(monkeypatch, seed, N, V, D, dtype, scale, forbidden, rows):
    hidden, weight, bias, labels = case(N, D, V, dtype, scale, seed)
    if forbidden:  # every third word that is no label
        words = torch.arange(V, device=DEVICE)
        bias[(words % 3 == 0) & ~torch.isin(words, labels)] = -torch.inf
    for chunk in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(masked_softmax, chunk, rows * V)
    found = masked_lm(hidden, weight, bias, labels)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for grad, owner in zip(found[1:], (hidden, weight, bias), strict=True):
        assert (grad.dtype, grad.shape) == (owner.dtype, owner.shape)
    assert_close(found, expected_masked_lm(hidden, weight, bias, labels), dtype)
    # Every number is summed in one order.
    again = masked_lm(hidden, weight, bias, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_lm_of_random_reals(dtype):
    torch.manual_seed(0)
    inputs = torch.randn(150, 64), torch.randn(300, 64) / 4, torch.randn(300)
    inputs = *(t.to(DEVICE, dtype) for t in inputs), torch.randint(0, 300, (150,)).to(DEVICE)
    assert_close(masked_lm(*inputs), expected_masked_lm(*inputs), dtype)


def test_the_lines_that_explain_the_trick_are_right():
    """The indented lines of the module's docstring, run as they stand."""
    hidden, weight, bias, labels = case(dtype=torch.float64)
    names = {"torch": torch, "hidden": hidden, "weight": weight, "bias": bias, "N": len(hidden),
             "labels": labels[:, None]}  # fmt: skip
    lines = masked_softmax.__doc__.splitlines()
    exec(textwrap.dedent("\n".join(line for line in lines if line.startswith("    "))), names)
    found = [names[name].view_as(t) for name, t in
             zip(FOUR, (torch.zeros([]), hidden, weight, bias), strict=True)]  # fmt: skip
    assert_close(found, expected_masked_lm(hidden, weight, bias, labels), torch.float64)


@of_kernels  # PyTorch's own function does take that difference
def test_a_confident_prediction_keeps_its_small_gradient():
    """p - 1, as a difference, would be 0 here: the other words have e^-20 together."""
    inputs = hidden, weight, _, labels = [t.zero_() for t in case(1, 16, 8)]
    weight[3, 0], hidden[0, 0], labels[0] = 1.0, 22.0, 3
    assert_close(masked_lm(*inputs)[1:], expected_masked_lm(*inputs)[1:], torch.float32, FOUR[1:])


@pytest.mark.parametrize("level", [-1e5, -70.0, 70.0, 1e5])
def test_a_common_shift_of_the_logits_changes_nothing(level):
    hidden, weight, bias, labels = case(9, 16, 40, scale=0.5)
    expected = expected_masked_lm(hidden, weight, bias, labels)
    assert_close(masked_lm(hidden, weight, bias + level, labels), expected, torch.float32)


def test_a_label_that_cannot_be_costs_infinity_and_gives_no_nan():
    inputs = _, _, bias, labels = case(9, 16, 40, scale=0.5)
    bias[labels[4]] = -torch.inf
    assert_close(masked_lm(*inputs), expected_masked_lm(*inputs), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@of_kernels
def test_the_gradient_of_a_rows_logits_sums_to_zero(dtype):
    """As when training begins: all words alike, and their sum, 511, one that bf16 rounds. B8.

    fp16, whose exponentials are kept in bf16 too, shows in dweight and dbias what bf16 rounds away.
    """
    hidden, weight, bias, labels = case(64, 16, 512, dtype, scale=0.0)
    hidden[:, 0], weight[:, 0], hidden[:, 1] = 0.0, 1.0, 1.0
    _, dhidden, dweight, dbias = masked_lm(hidden, weight, bias, labels)
    # Beside the column of ones in weight, or in hidden, the gradients are sums of the logits'.
    for sums in (dhidden[:, 0], dweight[:, 1].double().sum(), dbias.double().sum()):
        assert sums.abs().max() < 1e-6


@of_kernels
def test_the_reference_is_computed_once(monkeypatch):
    """A repair that changed the maxima by an ulp might take the row for one within reach. B12."""
    kernel = masked_softmax.exp_kernel

    class ForgetsThePeaks:
        def __getitem__(self, grid):
            def launch(*args, REPAIR, **kwargs):
                kernel[grid](*args, REPAIR=REPAIR, **kwargs)
                if REPAIR:
                    args[5].zero_()

            return launch

    inputs = case(9, 16, 40, scale=128.0)
    monkeypatch.setattr(masked_softmax, "exp_kernel", ForgetsThePeaks())
    assert_close(masked_lm(*inputs), expected_masked_lm(*inputs), torch.float32)


class Operations(TorchDispatchMode):
    """What PyTorch does within: names, p (its largest bf16 tensor), and whether that is freed."""

    def __init__(self):
        super().__init__()
        self.names, self.largest, self.p, self.freed = [], 0, None, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        if function.name() == "aten::mean":
            gc.collect()  # the interpreter keeps its copies in a cycle
            self.freed = self.p is not None and self.p.expired()
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if getattr(tensor, "dtype", None) == torch.bfloat16 and tensor.numel() > self.largest:
                self.largest, self.p = tensor.numel(), StorageWeakRef(tensor.untyped_storage())
        return result


@of_kernels
def test_the_chunk_is_freed_before_the_gradients_are_copied_and_nothing_waits(monkeypatch):
    monkeypatch.setattr(masked_softmax, "GPU_CHUNK", 1)
    inputs = case(300, 16, 5000, torch.bfloat16)
    with Operations() as seen:
        masked_softmax.masked_lm._init_fn(*inputs, True)
    assert seen.largest == 128 * 5008  # one chunk of p, and not N x V
    assert seen.freed  # B5
    assert not {"aten::nonzero", "aten::item", "aten::_local_scalar_dense"} & set(seen.names)  # B11


@pytest.mark.skipif(not CUDA or not ON_KERNELS, reason="only a GPU can be waited for")
def test_neither_loss_waits_for_the_gpu():
    inputs, pairs = leaves(*case()[:3]), torch.arange(20, device=DEVICE).view(10, 2)
    labels = case()[3]
    try:
        for mode in ("default", "error"):  # the first time compiles
            torch.cuda.set_sync_debug_mode(mode)
            (masked_lm_loss(*inputs, labels) + alignment_loss(inputs[1], pairs)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_masked_lm_does_not_mind_strides():
    hidden, weight, bias, labels = case()
    expected = masked_lm(hidden, weight, bias, labels)
    strided = hidden.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2]
    # TMA wants multiples of 16 bytes.
    odd = torch.zeros(weight.numel() + 1, device=DEVICE)[1:].view_as(weight).copy_(weight)
    assert not any(t.is_contiguous() for t in strided) and odd.data_ptr() % 16
    for other in (strided, (hidden, odd, bias)):
        inputs = [t.detach().requires_grad_() for t in other]
        found = backward(masked_lm_loss(*inputs, labels.repeat_interleave(2)[::2]), *inputs)
        torch.testing.assert_close(found, expected)


def test_masked_lm_scales_with_the_upstream_gradient_and_accumulates():
    *tensors, labels = case()
    inputs = leaves(*tensors)
    for factor in (2.0, 0.5):
        (factor * masked_lm_loss(*inputs, labels)).backward()
    for leaf, grad in zip(inputs, masked_lm(*tensors, labels)[1:], strict=True):
        torch.testing.assert_close(leaf.grad, 2.5 * grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_lm_under_autocast_is_that_of_its_type(dtype):
    *tensors, labels = case(scale=4.0)
    inputs = leaves(*tensors)
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = backward(masked_lm_loss(*inputs, labels), *inputs)
    assert [t.dtype for t in found] == [torch.float32] * 4
    expected = masked_lm(*(t.to(dtype) for t in tensors), labels)
    torch.testing.assert_close(found, tuple(t.float() for t in expected))


# ------------------------------------------------------------------------------ the alignment loss


def align(weight, pairs, upstream=1.0):
    (w,) = leaves(weight)
    return backward(alignment_loss(w, pairs) * upstream, w)


def one_to_one(V, K, generator=None):
    return torch.randperm(V, generator=generator)[: 2 * K].view(K, 2).to(DEVICE)


@property_test
@given(seed=st.integers(0, 2**32), V=st.integers(2, 60), dtype=st.sampled_from(DTYPES),
       D=st.sampled_from([16, 48, 64, 528, 1024]), zeros=st.booleans())  # fmt: skip
@example(0, 24, torch.float32, 48, True)
def test_alignment_is_the_equation(seed, V, dtype, D, zeros):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator).to(DEVICE, dtype)
    if zeros:  # their cosine is 0, and their gradient that of a norm of 1e-8, as PyTorch has it
        weight[torch.rand(V, generator=generator).to(DEVICE) < 0.2] = 0
    pairs = one_to_one(V, V // 3 + 1 if V > 2 else 1, generator)
    (w,) = leaves(weight, dtype=torch.float64)
    expected = backward(alignment_equation(w, pairs) * 3, w)
    if dtype == torch.float16 and zeros:
        return  # 1e8 is beyond fp16
    for layout in (pairs, pairs.T.contiguous().T):
        assert_close(align(weight, layout, 3.0), expected, dtype, ["loss", "dweight"])


@of_kernels
def test_without_grad_no_gradient_is_made(monkeypatch):
    """B6 and B10: neither by the operators nor in what they hand over."""
    seen = []
    for module, name in ((masked_softmax, "masked_lm"), (alignment, "alignment")):
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=operator: seen.append(f(*a)) or seen[-1])
    hidden, weight, bias, labels = case()
    pairs = one_to_one(100, 30)
    for tensors, grad in (((hidden, weight, bias), True), (leaves(hidden, weight, bias), False)):
        with torch.set_grad_enabled(grad):
            masked_lm_loss(*tensors, labels)
            alignment_loss(tensors[1], pairs)
    assert [sum(t.numel() for t in made) for made in seen] == [1] * 4
    masked_lm(hidden, weight, bias, labels)
    align(weight, pairs)
    assert [t.shape for t in seen[-1][1:]] == [weight.shape]
    assert [t.shape for t in seen[-2][1:]] == [hidden.shape, weight.shape, bias.shape]


@of_kernels
def test_a_pair_outside_the_matrix_is_nan_and_writes_nothing_else():
    with torch.inference_mode():  # which such a dictionary must survive, B9
        pairs = torch.tensor([[1, 2], [3, 30], [-1, 4]], device=DEVICE)
    weight = torch.randn(30, 16, device=DEVICE)
    loss, gradient = align(weight, pairs)
    assert loss.isnan() and gradient[[1, 2]].any() and not gradient[3:].any()


# -------------------------------------------------------------------------------------------- both


@of_kernels
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_keep_pytorchs_contract(dtype, with_grad):
    hidden, weight, bias, labels = case(dtype=dtype)
    torch.library.opcheck(masked_softmax.masked_lm, (hidden, weight, bias, labels, with_grad))
    torch.library.opcheck(alignment.alignment, (weight, one_to_one(100, 30), with_grad))


def test_the_tied_matrix_gathers_all_its_gradients():
    _, weight, bias, _ = case(D=16, V=60)
    tokens, pairs = torch.randint(0, 60, (30,), device=DEVICE), one_to_one(60, 20)

    def step(masked_lm, align, w, b):
        loss = masked_lm(F.embedding(tokens, w).tanh(), w, b, tokens) + 10 * align(w, pairs)
        return backward(loss, w, b)

    found = step(masked_lm_loss, alignment_loss, *leaves(weight, bias))
    wide = leaves(weight, bias, dtype=torch.float64)
    expected = step(masked_lm_equation, alignment_equation, *wide)
    assert_close(found, expected, torch.float32, ["loss", "dweight", "dbias"])


def test_both_compile_without_a_graph_break():
    hidden, weight, bias, labels = case()
    pairs = one_to_one(100, 30)

    def both(h, w, b, y):
        return masked_lm_loss(h, w, b, y) + 10 * alignment_loss(w, pairs)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")  # all but code
    for N in (60, 40):  # the second compiles for any N
        inputs = leaves(hidden[:N], weight, bias)
        found = backward(compiled(*inputs, labels[:N]), *inputs)
        torch.testing.assert_close(found, backward(both(*inputs, labels[:N]), *inputs))


@of_kernels
def test_the_compiled_backward_of_the_alignment_copies_no_matrix():
    """B7: in the graphs after the compiler's passes, one product of the gradient and no clone."""
    graphs = []

    def capture(module, *_, **__):
        post_grad_passes(module, is_inference=False)
        graphs.append(module.graph)
        return module  # to be run as it is, with no code made of it

    pairs, (weight,) = one_to_one(100, 30), leaves(case()[1])
    backend = partial(compile_fx, inner_compile=capture)
    compiled = torch.compile(lambda w: alignment_loss(w, pairs), fullgraph=True, backend=backend)
    found = backward(compiled(weight), weight)
    torch.testing.assert_close(found, align(weight, pairs))
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert len(graphs) == 2 and "aten.mul.Tensor" in names
    assert not [name for name in names if "clone" in name or "copy" in name or "auto_" in name]


@of_kernels
def test_a_second_derivative_is_refused():
    hidden, weight, bias, labels = case()
    weight.requires_grad_()
    pairs = one_to_one(100, 30)
    for loss in (masked_lm_loss(hidden, weight, bias, labels), alignment_loss(weight, pairs)):
        (gradient,) = torch.autograd.grad(loss**2, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def what_does_not_fit():
    hidden, weight, bias, labels = case()
    pairs, other = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE), "cpu" if CUDA else "meta"
    for wrong in (hidden[:, :16], hidden.double(), hidden.to(other), hidden[None], hidden[:0]):
        yield masked_lm_loss, "hidden", (wrong, weight, bias, labels)
    for wrong in (bias[:-1], bias.half()):
        yield masked_lm_loss, "bias", (hidden, weight, wrong, labels)
    for wrong in (labels[:-1], labels.int(), labels.to(other)):
        yield masked_lm_loss, "labels", (hidden, weight, bias, wrong)
    for wrong in (weight[0], weight.long()):
        yield masked_lm_loss, "weight", (hidden, wrong, bias, labels)
        yield alignment_loss, "weight", (wrong, pairs)
    for wrong in (pairs[:, :1], pairs[0], pairs[:0], pairs.int(), pairs.to(other)):
        yield alignment_loss, "pairs", (weight, wrong)


@pytest.mark.parametrize("loss, name, inputs", list(what_does_not_fit()))
def test_what_does_not_fit_is_refused_by_name_in_one_line(loss, name, inputs):
    with pytest.raises(ValueError, match=rf"^{name} is [^\n]*; it must be [^\n]*$"):
        loss(*inputs)


# ------------------------------------------------------------------------- PyTorch's own way, where


@pytest.mark.skipif(CUDA or INTERPRETED, reason="of a CPU")
def test_gradients_of_the_plain_way_are_those_of_its_values(monkeypatch):
    torch.manual_seed(0)
    shapes = (4, 8), (7, 8), (7,)  # the kernels would not take a width of 8
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    labels = torch.tensor([3, 6, 6, 0])

    # gradcheck goes back through one graph several times, which the chunked function forbids: so
    # this is the loss as without it, in PyTorch 2.11.
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert torch.autograd.gradcheck(lambda *tensors: masked_lm_loss(*tensors, labels), inputs)
    assert torch.autograd.gradcheck(alignment_loss, (inputs[1], torch.tensor([[0, 5], [6, 2]])))


@pytest.mark.skipif(ON_KERNELS, reason="of PyTorch's own way")
def test_the_plain_way_holds_one_chunk_of_logits(monkeypatch):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("new in PyTorch 2.13")
    monkeypatch.setattr(masked_softmax, "CPU_CHUNK", 40_000)
    inputs = case(240, 16, 2000)  # 480,000 logits
    with torch.profiler.profile(profile_memory=True) as profile:
        masked_lm(*inputs)
    events = profile.profiler.kineto_results.events()
    assert max(e.nbytes() for e in events if e.name() == "[memory]") < 400_000


def test_where_the_kernels_run(monkeypatch):
    """B1 to B4: on GPUs of NVIDIA with TMA and room for the tiles, and nowhere else."""
    gpu = {"major": 9, "shared_memory_per_block_optin": 227 << 10}
    here = {"dtype": torch.bfloat16, "shape": (80_000, 512), "is_cuda": True}
    here |= {"hip": None, "current": 0}

    def runs(**changes):
        facts = gpu | here | changes
        device = SimpleNamespace(**{name: facts[name] for name in gpu})
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_properties", lambda _: device)
            patch.setattr(torch.cuda, "current_device", lambda: facts["current"])
            patch.setattr(torch.version, "hip", facts["hip"])
            if "triton" in changes:
                patch.setattr(alignment, "triton", changes["triton"])
            facts["device"] = torch.device("cuda:0")
            return FUSED(SimpleNamespace(**facts))

    assert runs() and runs(major=10) and runs(dtype=torch.float32) and runs(dtype=torch.float16)
    assert not runs(is_cuda=False) and not runs(major=8)
    assert not runs(hip="6.4")  # B2
    assert not runs(major=8, shared_memory_per_block_optin=163 << 10)  # sm_80: B3, B4
    assert not runs(major=8, shared_memory_per_block_optin=99 << 10)  # sm_89
    assert not runs(major=12, shared_memory_per_block_optin=99 << 10)  # sm_120: B1
    assert not runs(dtype=torch.float64)
    assert not runs(shape=(80_000, 24)) and not runs(shape=(80_000, 1040))
    assert not runs(triton=None)
    assert not runs(current=1)


@pytest.mark.skipif(INTERPRETED, reason="of PyTorch's own way")
def test_without_triton_pytorchs_own_way_serves():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
w = torch.ones(4, 16, requires_grad=True)
loss = kernels.masked_lm_loss(w, w, w[:, 0], torch.tensor([0, 1, 2, 3]))
(loss + kernels.alignment_loss(w, torch.tensor([[0, 1]]))).backward()
assert kernels.alignment.triton is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="without a GPU, for the kernels")
def test_all_of_this_on_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--durations=5", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0
