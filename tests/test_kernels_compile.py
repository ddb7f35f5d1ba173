"""Every kernel, as it is launched, compiled for GPUs that are not here.

    python tests/test_kernels_compile.py      # the table of results/kernels.md

Triton is told that it runs on another chip, and compiles what a step at the size of the project's
model launches. What the assembler reports must fit the chips that `kernels.fused` sends to the
kernels; tests/test_kernels.py checks that it sends the others elsewhere.
"""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import alignment, masked_softmax

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = 227 << 10  # bytes that a program can have on sm_90 and sm_100 (CUDA programming guide)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

def compiled_kernels(patch, dtype, capability, D, V=80_000, rows=256):
    """What a step of two chunks of rows launches, both losses of it: name -> compiled kernel."""
    compiled = {}
    run = triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        flags = [name for name in ("REPAIR", "FIRST", "WITH_GRAD") if options.get(name)]
        name = " ".join([kernel.__name__, *flags])
        compiled[name] = run(kernel, *args, grid=grid, warmup=True, **options)

    # Triton keeps what it compiles by the number of the device, for which the chip's serves.
    driver = SimpleNamespace(get_current_device=lambda: capability,
                             get_current_stream=lambda device: 0,
                             get_current_target=lambda: GPUTarget("cuda", capability, 32))
    chip = SimpleNamespace(major=capability // 10, multi_processor_count=132)
    patch.setattr(triton.runtime.driver, "_active", driver)
    patch.setattr(triton.JITFunction, "run", compile_only)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    patch.setattr(masked_softmax, "GPU_CHUNK", 1)
    weight, bias = torch.zeros(V, D, dtype=dtype), torch.zeros(V, dtype=dtype)
    masked_softmax.masked_lm(weight[:rows], weight, bias, torch.arange(rows), True)
    for with_grad in (True, False):
        alignment.alignment(weight, torch.arange(64).view(32, 2), with_grad)
    return compiled

@pytest.mark.parametrize("D", [256, 512])  # At 256 one tile is as wide as the matrix.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [90, 100])
def test_kernels_fit_the_chips_that_run_them(monkeypatch, tmp_path, D, dtype, capability):
    compiled = compiled_kernels(monkeypatch, DTYPES[dtype], capability, D)
    assert len(compiled) == 6
    for name, kernel in compiled.items():
        cubin = tmp_path / "cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", "-sass", cubin]
        dump = subprocess.run(command, check=True, text=True, capture_output=True).stdout
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump)
        registers, stack, local = map(int, usage.groups())
        instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", dump, re.MULTILINE))
        wgmma, shared = kernel.asm["ptx"].count("wgmma.mma_async"), kernel.metadata.shared
        numbers = registers, stack + local, shared, instructions, wgmma
        print("|", " | ".join([name, dtype, f"sm_{capability}", *(f"{n:,}" for n in numbers)]), "|")
        assert stack + local == 0, name
        assert shared <= masked_softmax.SHARED_MEMORY <= SHARED, name
        assert (wgmma > 0) == (capability == 90 and not name.startswith("alignment")), name
        # All tiles come by the copy engine, and none by the threads' own copies.
        assert "cp.async.cg" not in kernel.asm["ptx"], name

if __name__ == "__main__":
    print("| kernel | type | chip | registers | spilled | shared | instructions | wgmma |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    pytest.main([__file__, "-s", "-p", "no:terminal", "-o", "addopts=", "-k", "90 and 512"])
