"""Both losses, PyTorch's own way and by the kernels: on a GPU, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported. So without a GPU the last test runs this
file again in a process with TRITON_INTERPRET=1, where every tensor goes to the kernels.
"""

import gc
import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from alignmlm import alignment_equation, masked_lm_equation
from kernels import alignment, alignment_loss, masked_lm_loss, masked_softmax

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")
ON_KERNELS = INTERPRETED or (CUDA and kernels.fused(torch.empty(1, 16, device="cuda")))
of_kernels = pytest.mark.skipif(not ON_KERNELS, reason="of the kernels only")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = list(TOLERANCE)[ON_KERNELS:]  # the kernels have no float64
PAIRS = torch.arange(60, device=DEVICE).view(30, 2)
property_test = settings(max_examples=5 if INTERPRETED else 25, derandomize=True, deadline=None,
                         suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip

if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, c, *_):
        # The interpreter's own dot takes bf16, which is kept as its 16 bits, for integers.
        a, b = (self.cast_impl(handle, tl.float32).data for handle in (a, b))
        return TensorHandle(a @ b + c.data, c.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot

@pytest.fixture(autouse=True)
def on_the_kernels_in_the_interpreter(monkeypatch):
    if INTERPRETED:
        hopper = SimpleNamespace(major=9, multi_processor_count=3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
        monkeypatch.setattr(kernels, "fused", lambda weight: weight.dtype != torch.float64)

def differentiate(loss, *inputs, dtype=None):
    """The loss of tensors and an index, the last of the inputs, and the tensors' gradients."""
    tensors = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs[:-1]]
    value = loss(*tensors, inputs[-1])
    return value.detach(), *torch.autograd.grad(value, tensors)

def assert_same(loss, equation, *inputs):
    """The loss is that of the equation in float64, and so are the gradients; returns them."""
    found = differentiate(loss, *inputs)
    expected = differentiate(equation, *inputs, dtype=torch.float64)
    for a, b in zip(found, expected, strict=True):
        # An infinite loss is to be infinite; the distance of a NaN to anything is too large.
        a, b = (t.double().nan_to_num(nan=torch.nan, posinf=1e100) for t in (a, b))
        # A loss is compared with a nat at least: its rounding is that of the logits it comes from.
        # PyTorch's own gradient is a difference, p - 1 at the label, and so rounded as 1 is.
        floor = 1.0 if b.dim() == 0 or not ON_KERNELS else 1e-20
        assert (a - b).norm() / b.norm().clamp(min=floor) <= TOLERANCE[inputs[0].dtype]
    assert found[0].dtype == torch.promote_types(inputs[0].dtype, torch.float32)
    return found

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
    inputs = _, _, bias, labels = case(N, D, V, dtype, scale, seed)
    if forbidden:  # every third word that is no label
        words = torch.arange(V, device=DEVICE)
        bias[(words % 3 == 0) & ~torch.isin(words, labels)] = -torch.inf
    for chunk in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(masked_softmax, chunk, rows * V)
    found = assert_same(masked_lm_loss, masked_lm_equation, *inputs)
    # Every number is summed in one order.
    again = differentiate(masked_lm_loss, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

@pytest.mark.parametrize("scale, words, level", [
    *((0.5, slice(None), level) for level in (-1e5, -87.0, 87.0, 1e5)),
    (0.5, 7, -torch.inf),  # A label that cannot be costs infinity, but gives no NaN.
    (0.0, 7, 22.0),  # As a difference, p - 1 would be 0, but the others have e^-18 together.
])  # fmt: skip
def test_masked_lm_of_extreme_biases(scale, words, level):
    inputs = _, _, bias, labels = case(9, 16, 40, scale=scale)
    labels.fill_(7)
    bias[words] += level
    assert_same(masked_lm_loss, masked_lm_equation, *inputs)

def test_the_lines_that_explain_the_trick_are_right():
    """The indented lines of the module's docstring, run as they stand."""
    inputs = hidden, weight, bias, labels = case(dtype=torch.float64)
    names = {"torch": torch, "hidden": hidden, "weight": weight, "bias": bias, "labels": labels}
    names["N"] = len(hidden)
    exec("\n".join(re.findall("^    (.*)", masked_softmax.__doc__, re.MULTILINE)), names)
    found = tuple(names[name] for name in ("loss", "dhidden", "dweight", "dbias"))
    torch.testing.assert_close(found, differentiate(masked_lm_equation, *inputs))

@pytest.mark.parametrize("dtype", DTYPES)
@of_kernels
def test_the_gradient_of_a_rows_logits_sums_to_zero(dtype):
    """All words alike, as when training begins: bf16 rounds their sum, 511. B8."""
    hidden, weight, bias, labels = case(64, 16, 512, dtype, scale=0.0)
    hidden[:, 0], weight[:, 0], hidden[:, 1] = 0.0, 1.0, 1.0
    _, dhidden, dweight, dbias = differentiate(masked_lm_loss, hidden, weight, bias, labels)
    # Beside the column of ones in weight, or in hidden, the gradients are sums of the logits'. fp16
    # shows in dweight and dbias what bf16 rounds away.
    for sums in (dhidden[:, 0], dweight[:, 1].double().sum(), dbias.double().sum()):
        assert sums.abs().max() < 1e-6

class Operations(TorchDispatchMode):
    """PyTorch's operations by name, the first tensor they make, and if the mean finds it freed."""

    names, first = (), None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += (function.name(),)
        if function.name() == "aten::mean":
            gc.collect()  # the interpreter keeps its copies in a cycle
            self.freed = self.first.expired()
        result = function(*args, **(kwargs or {}))
        if self.first is None:
            self.shape, self.first = result.shape, StorageWeakRef(result.untyped_storage())
        return result

@of_kernels
def test_what_masked_lm_does_beside_its_kernels(monkeypatch):
    monkeypatch.setattr(masked_softmax, "GPU_CHUNK", 1)
    inputs = case(300, 16, 5000, torch.bfloat16)
    with Operations() as seen:
        masked_softmax.masked_lm._init_fn(*inputs, True)
    assert seen.shape == (128, 5008)  # p, a chunk of it and not N x V
    assert seen.freed  # before the gradients are copied, B5
    assert not {"aten::nonzero", "aten::item", "aten::_local_scalar_dense"} & set(seen.names)  # B11
    # The reference of a chunk is computed once: after the repair, an ulp could change it. B12.
    assert seen.names.count("aten::amax") == seen.names.count("aten::hardshrink") == 3

def test_masked_lm_does_not_mind_strides():
    hidden, weight, bias, labels = case()
    expected = differentiate(masked_lm_loss, hidden, weight, bias, labels)
    strided = hidden.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2]
    # TMA wants multiples of 16 bytes.
    odd = torch.zeros(weight.numel() + 1, device=DEVICE)[1:].view_as(weight).copy_(weight)
    assert not any(t.is_contiguous() for t in strided) and odd.data_ptr() % 16
    for inputs in (strided, (hidden, odd, bias)):
        found = differentiate(masked_lm_loss, *inputs, labels.repeat_interleave(2)[::2])
        torch.testing.assert_close(found, expected)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_lm_under_autocast_is_that_of_its_type(dtype):
    *tensors, labels = case(scale=4.0)
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = differentiate(masked_lm_loss, *tensors, labels)
    expected = differentiate(masked_lm_loss, *(t.to(dtype) for t in tensors), labels)
    torch.testing.assert_close(found, tuple(t.float() for t in expected))

@property_test
@given(seed=st.integers(0, 2**32), V=st.integers(2, 60), dtype=st.sampled_from(DTYPES),
       D=st.sampled_from([16, 48, 64, 528, 1024]), zeros=st.booleans())  # fmt: skip
@example(0, 24, torch.float32, 528, True)
def test_alignment_is_the_equation(seed, V, dtype, D, zeros):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator).to(DEVICE, dtype)
    # A row of zeros has the cosine 0 and the gradient of a norm of 1e-8, which is beyond fp16.
    if zeros and dtype != torch.float16:
        weight[torch.rand(V, generator=generator).to(DEVICE) < 0.2] = 0
    pairs = torch.randperm(V, generator=generator)[: V // 2 * 2].view(-1, 2)[: V // 3 + 1]
    for layout in (pairs, pairs.T.contiguous().T):
        assert_same(alignment_loss, alignment_equation, weight, layout.to(DEVICE))

@of_kernels
def test_a_pair_outside_the_matrix_is_nan_and_writes_nothing_else():
    with torch.inference_mode():  # which such a dictionary must survive, B9
        pairs = torch.tensor([[1, 2], [3, 30], [-1, 4]], device=DEVICE)
    loss, gradient = differentiate(alignment_loss, torch.randn(30, 16, device=DEVICE), pairs)
    assert loss.isnan() and gradient[[1, 2]].any() and not gradient[3:].any()

@of_kernels
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_keep_pytorchs_contract(dtype, with_grad):
    inputs = case(dtype=dtype)
    torch.library.opcheck(masked_softmax.masked_lm, (*inputs, with_grad))  # B6
    torch.library.opcheck(alignment.alignment, (inputs[1], PAIRS, with_grad))

@of_kernels
def test_gradients_are_made_once_and_where_they_are_wanted(monkeypatch):
    inputs = case()
    weight = inputs[1].requires_grad_()
    for loss in (masked_lm_loss(*inputs), alignment_loss(weight, PAIRS)):
        (gradient,) = torch.autograd.grad(loss**2, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
    # What makes gradients is not there to be used. B10.
    monkeypatch.delattr(alignment, "GradientsInForward")
    for wanted in (True, False):
        weight.requires_grad_(wanted)
        with torch.set_grad_enabled(not wanted):
            losses = masked_lm_loss(*inputs), alignment_loss(weight, PAIRS)
            expected = masked_lm_equation(*inputs), alignment_equation(weight, PAIRS)
        torch.testing.assert_close(losses, expected)

@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tied_matrix_gathers_all_its_gradients_compiled_or_not(dtype):
    _, weight, bias, tokens = case(dtype=dtype)

    def step(masked_lm, align, weight, bias, tokens):
        hidden = F.embedding(tokens, weight).tanh()  # not whole numbers
        return 3 * masked_lm(hidden, weight, bias, tokens) + 10 * align(weight, PAIRS)

    ours = partial(step, masked_lm_loss, alignment_loss)
    equation = partial(step, masked_lm_equation, alignment_equation)
    backend = AotEagerAndRecordGraphs()  # all but code
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for N in (60, 40):  # the second compiles for any N
        inputs = weight, bias, tokens[:N]
        found = assert_same(ours, equation, *inputs)
        torch.testing.assert_close(differentiate(compiled, *inputs), found)
    # The kernels' gradients are made in the forward and copied nowhere. B7.
    code = [graph.code for graph in backend.fw_graphs + backend.bw_graphs]
    assert code and not (ON_KERNELS and re.search("clone|copy|auto_", " ".join(code)))

def test_what_does_not_fit_is_refused_by_name_in_one_line():
    hidden, weight, bias, labels = case()
    pairs, other = PAIRS, "cpu" if CUDA else "meta"
    masked_lm = partial(masked_lm_loss, hidden=hidden, weight=weight, bias=bias, labels=labels)
    align = partial(alignment_loss, weight=weight, pairs=pairs)
    hiddens = hidden[:, :16], hidden.double(), hidden.to(other), hidden[None], hidden[:0]
    for loss, name, wrongs in (
        (masked_lm, "hidden", hiddens),
        (masked_lm, "bias", (bias[:-1], bias.half())),
        (masked_lm, "labels", (labels[:-1], labels.int(), labels.to(other))),
        (masked_lm, "weight", (weight[0], weight.long())),
        (align, "weight", (weight[0], weight.long())),
        (align, "pairs", (pairs[:, :1], pairs[0], pairs[:0], pairs.int(), pairs.to(other))),
    ):
        for wrong in wrongs:
            with pytest.raises(ValueError, match=rf"^{name} is [^\n]*; it must be [^\n]*$"):
                loss(**{name: wrong})

@pytest.mark.skipif(CUDA or INTERPRETED, reason="of a CPU")
def test_gradients_of_the_plain_way_are_those_of_its_values(monkeypatch):
    torch.manual_seed(0)
    shapes = (4, 8), (7, 8), (7,)  # the kernels would not take a width of 8
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    # gradcheck goes back through a graph several times, which PyTorch 2.13's function forbids.
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert torch.autograd.gradcheck(masked_lm_loss, (*inputs, torch.tensor([3, 6, 6, 0])))
    assert torch.autograd.gradcheck(alignment_loss, (inputs[1], torch.tensor([[0, 5], [6, 2]])))

@pytest.mark.skipif(ON_KERNELS or not hasattr(F, "linear_cross_entropy"), reason="new in 2.13")
def test_the_plain_way_holds_one_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(masked_softmax, "CPU_CHUNK", 40_000)
    with torch.profiler.profile(profile_memory=True) as profile:
        differentiate(masked_lm_loss, *case(240, 16, 2000))  # 480,000 logits
    events = profile.profiler.kineto_results.events()
    assert max(e.nbytes() for e in events if e.name() == "[memory]") < 400_000

@pytest.mark.skipif(INTERPRETED, reason="all is sent to the kernels")
def test_where_the_kernels_run(monkeypatch):
    """B1 to B4: on GPUs of NVIDIA with TMA and room for the tiles, and nowhere else."""
    hopper = {"major": 9, "shared_memory_per_block_optin": 227 << 10, "triton": True, "hip": None}
    matrix = {"is_cuda": True, "device": torch.device("cuda:0"), "current": 0}
    matrix |= {"shape": (80_000, 512), "dtype": torch.bfloat16}

    def runs(**changes):
        facts = SimpleNamespace(**hopper | matrix | changes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: facts.current)
        monkeypatch.setattr(torch.version, "hip", facts.hip)
        monkeypatch.setattr(alignment, "triton", facts.triton)
        return kernels.fused(facts)

    assert runs() and runs(major=10) and runs(dtype=torch.float32) and runs(dtype=torch.float16)
    assert not runs(triton=None) and not runs(hip="6.4")  # B2
    assert not runs(major=8)  # sm_80 and sm_89: B3, B4
    assert not runs(major=12, shared_memory_per_block_optin=99 << 10)  # sm_120: B1
    assert not runs(dtype=torch.float64) and not runs(is_cuda=False) and not runs(current=1)
    assert not runs(shape=(80_000, 24)) and not runs(shape=(80_000, 1040))
    without_triton = """
import sys
sys.modules["triton"] = None
from kernels import alignment, masked_softmax
assert alignment.triton is masked_softmax.triton is None
"""
    subprocess.run([sys.executable, "-c", without_triton], check=True)

@pytest.mark.skipif(CUDA or INTERPRETED, reason="without a GPU, for the kernels")
def test_all_of_this_on_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__]
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=interpreted, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
