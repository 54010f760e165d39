"""The script that times the layer of two versions by turns."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_version_beside_itself_saves_the_same_bytes() -> None:
    script = ROOT / "scripts" / "compare_layer_versions.py"
    command = [sys.executable, str(script), str(ROOT), str(ROOT), "--rounds", "2", "--only", "tiny-batch:router"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert re.fullmatch(
        r"tiny-batch:router +time [0-9.]+ \[[0-9.-]+, [0-9.]+\], fastest [0-9.]+, first version [0-9.]+ ms;"
        r" saved bytes 1\.00\n",
        output,
    )
