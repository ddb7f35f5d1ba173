"""Every kernel, with its tuned settings, compiled for the chips of three generations without one.

The launches are recorded as they would happen at the size of the project's model, and compiled as
Triton would: for a chip, for these types, for these divisibilities. What the assembler reports must
fit the chip: no registers spilled, no more shared memory than there is, and on Hopper the matrix
instructions of a whole warp group.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from kernels import alignment, masked_softmax

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 163, 90: 227, 100: 227}  # KiB that a block can have (CUDA programming guide)
PRODUCTS = "exp_kernel", "weight_grad_kernel"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


class Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(monkeypatch, dtype, capability, D=512, V=80_000):
    """The launches of a step on a chip: kernel, arguments, settings."""
    launches = []
    for module in (masked_softmax, alignment):
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(value, launches))
    chosen = masked_softmax.tile_settings(dtype, divmod(capability, 10))
    monkeypatch.setattr(masked_softmax, "tile_settings", lambda *_: chosen)
    weight, bias = torch.zeros(V, D, dtype=dtype), torch.zeros(V, dtype=dtype)
    labels = torch.arange(32)
    masked_softmax.masked_lm_fused(weight[:32], weight, bias, labels, -100, True)
    gradient, scalar = torch.empty_like(weight[:64]), torch.ones(())
    for upstream in (None, scalar):
        alignment._alignment(weight[:64], labels.view(16, 2), gradient, scalar, upstream)
    return launches


def compile_launch(kernel, args, kwargs, capability):
    """As Triton specialises: constants, types, and what is a multiple of 16."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given.get(name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr:
            signature[name], constants[(at,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(at,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, text=True,
                               capture_output=True).stdout  # fmt: skip
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
    return registers, stack + local, compiled.metadata.shared, wgmma


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_fit_the_chip(monkeypatch, dtype, capability):
    launches = record(monkeypatch, dtype, capability)
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names == ["exp_kernel", "exp_kernel", "row_kernel", "weight_grad_kernel",
                     "alignment_kernel", "alignment_kernel"]  # fmt: skip
    for kernel, args, kwargs in launches:
        registers, spilled, shared, wgmma = compile_launch(kernel, args, kwargs, capability)
        what = f"{kernel.__name__} {NAMES[dtype]} sm_{capability}"
        print(f"{what}: {registers} registers, {spilled} spilled, {shared} shared, wgmma {wgmma}")
        assert spilled == 0, what
        assert shared <= SHARED[capability] * 1024, what
        assert wgmma == (capability == 90 and kernel.__name__ in PRODUCTS), what
