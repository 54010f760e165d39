"""The kernels compile for NVIDIA GPUs, without one: Triton brings its assembler. Vectors are read by 16 bytes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import re
import sys
from functools import partial
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moebench.experts.kernels.gpu import activation, rows
from moebench.routing.kernels.gpu import counting_sort, top_k

WEIGHTS = {"weight_ptr": "*fp32", "grad_weight_ptr": "*fp32", "inner_ptr": "*fp32"}
LISTS = {name: "*i64" for name in ("index_ptr", "row_ptr", "start_ptr", "token_ptr")}
TILE = {"ROWS": 4, "BLOCK": 1024}
NO_WEIGHTS = {"weight_ptr": None, "weighted_ptr": None, "grad_weight_ptr": None}
FP32 = {name: "*fp32" for name in [*top_k._choose.arg_names, *top_k._choose_backward.arg_names] if name[-4:] == "_ptr"}
ROUTING = FP32 | {"expert_ptr": "*i64", "per_quantum": "fp32", "limit": "fp32"}
ROUTING |= {"key_ptr": "*i64", "kept_ptr": "*i1", "rank_ptr": "*i64", "place_ptr": "*i64", "index_ptr": "*i64"}
ROUTING |= {"count_ptr": "*i32", "end_ptr": "*i32"}
CHOICE = {"TOP_K": 8, "SIGMOID": False, "WEIGHTS": 1, "ROWS": 16, "BLOCK": 64}
SIGMOIDS = {"SIGMOID": True, "RANKS_SCORES": True, "ranked_ptr": None}

def compile_kernel(kernel, types=WEIGHTS | LISTS, num_warps=8, **constants):
    signature, values, aligned = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
            if signature[name] != "fp32":
                aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": num_warps})
    has_vectors = bool(re.search(r"ld\\.global\\S*\\.v4\\.b32", made.asm["ptx"]))
    is_sort = kernel in (counting_sort._rank, counting_sort._place)  # a key for each thread
    print(kernel.__name__, has_vectors or is_sort, len(made.asm["cubin"]) > 0)

for gated in (True, False):
    compile_kernel(activation._activate, GATED=gated, **TILE)
    compile_kernel(activation._activate_backward, GATED=gated, **TILE)
    compile_kernel(activation._activate_backward, GATED=gated, **TILE, **NO_WEIGHTS)
compile_kernel(rows._gather, **TILE)
compile_kernel(rows._weigh_gathered, **TILE)
compile_kernel(rows._sum_groups, num_warps=4, start_ptr=None, TOP_K=8, UNROLLED=True, BLOCK=1024)
compile_kernel(rows._sum_groups, num_warps=4, start_ptr=None, weight_ptr=None, TOP_K=64, UNROLLED=False, BLOCK=1024)
compile_kernel(rows._sum_groups, num_warps=4, TOP_K=0, UNROLLED=False, BLOCK=1024)
compile_routing = partial(compile_kernel, types=ROUTING, num_warps=4)
choose, backward = top_k._choose, top_k._choose_backward
compile_routing(choose, **CHOICE, K_BLOCK=8, RANKS_SCORES=False, ranked_ptr=None, bias_ptr=None)
compile_routing(choose, **CHOICE | SIGMOIDS, K_BLOCK=8)
compile_routing(choose, **CHOICE | {"WEIGHTS": 2, "TOP_K": 2}, K_BLOCK=2, RANKS_SCORES=False)
compile_routing(backward, **CHOICE)
compile_routing(backward, **CHOICE | {"SIGMOID": True, "grad_scores_ptr": None})
compile_kernel(counting_sort._rank, types=ROUTING, BLOCK=128, kept_ptr=None)
compile_routing(counting_sort._place, types=ROUTING | {"count_ptr": "*i64"}, BLOCK=128, KEYS=64)
"""
NUM_KERNELS = 18


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
