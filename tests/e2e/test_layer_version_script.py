"""The script that times the layer of two versions by turns."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compare_layer_versions.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_a_version_beside_itself_saves_the_same_bytes() -> None:
    output = run(str(ROOT), str(ROOT), "--rounds", "2", "--only", "tiny-batch:router").stdout
    assert re.fullmatch(
        r"tiny-batch:router +time [0-9.]+ \[[0-9.-]+, [0-9.]+\], fastest [0-9.]+, first version [0-9.]+ ms;"
        r" saved bytes 1\.00\n",
        output,
    )


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    # Else the installed version would be timed in its place.
    finished = run(str(tmp_path), str(ROOT))
    assert finished.returncode == 2
    assert f"{tmp_path}: has no package moebench" in finished.stderr


def test_unknown_rows_are_refused() -> None:
    finished = run(str(ROOT), str(ROOT), "--only", "tiny:router")
    assert finished.returncode == 2
    assert "--only: tiny:router (allowed: few-wide:router, " in finished.stderr
