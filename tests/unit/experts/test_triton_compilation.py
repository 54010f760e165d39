"""The kernels compile for NVIDIA GPUs, without one: Triton brings its assembler. Vectors are read by 16 bytes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moebench.experts.kernels.gpu import activation, rows

WEIGHTS = {"weight_ptr": "*fp32", "grad_weight_ptr": "*fp32", "inner_ptr": "*fp32"}
LISTS = {name: "*i64" for name in ("index_ptr", "row_ptr", "start_ptr", "token_ptr")}
TILE = {"ROWS": 4, "BLOCK": 1024}
NO_WEIGHTS = {"weight_ptr": None, "weighted_ptr": None, "grad_weight_ptr": None}

def compile_kernel(kernel, **constants):
    signature, values, aligned = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
        else:
            signature[name] = (WEIGHTS | LISTS).get(name, "*bf16" if name.endswith("_ptr") else "i32")
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": 4 if kernel is rows._sum_groups else 8}  # as they are launched
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    print(kernel.__name__, bool(re.search(r"ld\\.global\\S*\\.v4\\.b32", made.asm["ptx"])), len(made.asm["cubin"]) > 0)

for gated in (True, False):
    compile_kernel(activation._activate, GATED=gated, **TILE)
    compile_kernel(activation._activate_backward, GATED=gated, **TILE)
    compile_kernel(activation._activate_backward, GATED=gated, **TILE, **NO_WEIGHTS)
compile_kernel(rows._gather, **TILE)
compile_kernel(rows._weigh_gathered, **TILE)
compile_kernel(rows._sum_groups, start_ptr=None, TOP_K=8, UNROLLED=True, BLOCK=1024)
compile_kernel(rows._sum_groups, start_ptr=None, weight_ptr=None, TOP_K=64, UNROLLED=False, BLOCK=1024)
compile_kernel(rows._sum_groups, TOP_K=0, UNROLLED=False, BLOCK=1024)
"""
NUM_KERNELS = 11


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu_and_read_16_bytes_at_once(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == NUM_KERNELS
    assert all(line.endswith("True True") for line in lines), lines
