"""Freed memory that the C library keeps."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from moebench.allocator import keep_freed_memory
torch.set_num_threads(1)
if not keep_freed_memory(all_blocks=sys.argv[1] == "all"):
    sys.exit(3)
faults = []
for step in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(int(sys.argv[2]) * 2**18) for _ in range(3)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def count_faults(setting: str, mebibytes: int) -> int:
    """Return the fewest page faults of a step that allocates and frees three blocks."""
    command = [sys.executable, "-c", STEPS, setting, str(mebibytes)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if finished.returncode == 3:
        pytest.skip("the C library is not glibc")
    return int(finished.stdout)


@pytest.mark.parametrize(("setting", "mebibytes"), [("heap", 24), ("all", 24), ("all", 48)])
def test_pages_of_freed_blocks_are_used_again(setting: str, mebibytes: int) -> None:
    pages = 3 * mebibytes * 2**20 / 4096
    assert count_faults(setting, mebibytes) < pages / 100


def test_large_blocks_stay_outside_of_the_heap() -> None:
    # There they would leave holes, in which small tensors keep large ones from being used again.
    pages = 3 * 48 * 2**20 / 4096
    assert count_faults("heap", 48) > pages / 100
