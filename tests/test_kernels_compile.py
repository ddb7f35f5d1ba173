"""Every kernel, as it is launched, compiled for GPUs that are not here.

    python tests/test_kernels_compile.py      # the table of results/kernels.md

A step's launches are recorded at the size of the project's model and compiled as Triton would: for
a chip, for these types, for these divisibilities. What the assembler reports must fit the chips
that `kernels.fused` sends to the kernels, and the others must be sent elsewhere.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import alignment, masked_softmax

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Bytes of shared memory that one program can have (CUDA programming guide, compute capabilities).
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
DTYPES = [torch.bfloat16, torch.float32]


def properties(capability):
    """What PyTorch reports of a GPU, as far as it is looked at."""
    return SimpleNamespace(major=capability // 10, shared_memory_per_block_optin=SHARED[capability],
                           multi_processor_count=132)  # fmt: skip


class Recorder:
    """Stands for a kernel, and keeps the arguments of its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(patch, dtype, capability, D=512, V=80_000, rows=256):
    """The launches of both losses in a step of two chunks of rows: (kernel, arguments, options)."""
    launches = []
    for module in (masked_softmax, alignment):
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction):
                patch.setattr(module, name, Recorder(value, launches))
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties(capability))
    patch.setattr(masked_softmax, "GPU_CHUNK", 1)
    weight, bias = torch.zeros(V, D, dtype=dtype), torch.zeros(V, dtype=dtype)
    labels = torch.arange(rows)
    masked_softmax.masked_lm(weight[:rows], weight, bias, labels, True)
    for with_grad in (True, False):
        alignment.alignment(weight[:64], torch.arange(64).view(32, 2), with_grad)
    return launches


def specialised(kernel, args, kwargs):
    """What Triton compiles for a launch, as it specialises, and the options of the launch."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {"num_warps": given.pop("num_warps")}
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given.get(name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr or value is None:
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
    return ASTSource(kernel, signature, constants, attributes), options


def measure(launch, capability):
    """Registers a thread, bytes spilled, bytes of shared memory, instructions, wgmmas."""
    source, options = specialised(*launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])

        def dump(what):
            command = [TOOLS / "cuobjdump", what, file.name]
            return subprocess.run(command, check=True, text=True, capture_output=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
        instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", dump("-sass"), re.MULTILINE))
    registers, stack, local = map(int, usage.groups())
    # All tiles come by the copy engine, and none by the threads' own copies.
    assert "cp.async.cg" not in compiled.asm["ptx"]
    wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
    return registers, stack + local, compiled.metadata.shared, instructions, wgmma


def rows_of_table(patch, dtype, capability):
    """Each different launch once: its name and what `measure` says."""
    known = set()
    for launch in record(patch, dtype, capability):
        kernel, _, options = launch
        flags = [name for name in ("REPAIR", "FIRST", "WITH_GRAD") if options.get(name)]
        name = " ".join([kernel.__name__, *flags])
        if name not in known:
            known.add(name)
            yield name, measure(launch, capability)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("capability", [90, 100])
def test_kernels_fit_the_chips_that_run_them(monkeypatch, dtype, capability):
    for name, (_, spilled, shared, _, wgmma) in rows_of_table(monkeypatch, dtype, capability):
        assert spilled == 0, name
        assert shared <= masked_softmax.SHARED_MEMORY <= SHARED[capability], name
        assert (wgmma > 0) == (capability == 90 and not name.startswith("alignment")), name


if __name__ == "__main__":
    print("| kernel | type | chip | registers | spilled | shared | instructions | wgmma |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for capability in map(int, sys.argv[1:] or [90]):
        for dtype in DTYPES:
            with pytest.MonkeyPatch.context() as patch:
                for name, numbers in rows_of_table(patch, dtype, capability):
                    cells = [name, NAMES[dtype], f"sm_{capability}", *(f"{n:,}" for n in numbers)]
                    print("|", " | ".join(cells), "|")
