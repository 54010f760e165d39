"""Models without storage: what `plan` counts on."""

import subprocess
import sys
from pathlib import Path

from support.command_line import CommandLine
from torch import nn

from moebench.models.storageless import build_without_storage


def test_modules_have_shapes_and_no_values() -> None:
    with build_without_storage():
        modules = [nn.Linear(3, 5), nn.Embedding(7, 2), nn.LayerNorm(4), nn.Conv1d(2, 3, 1)]
    assert [tuple(module.weight.shape) for module in modules] == [(5, 3), (7, 2), (4,), (3, 2, 1)]
    assert all(parameter.is_meta for module in modules for parameter in module.parameters())
    assert not nn.Linear(3, 5).weight.is_meta


def test_plan_does_not_import_the_compiler(tmp_path: Path) -> None:
    cli = CommandLine(tmp_path)
    cli.write(grid={"router": ["dense", "switch", "hash"]})
    code = "import sys\nfrom moebench.__main__ import _run\nsys.argv = ['moebench', 'plan', './tiny.yaml', '--json']\n"
    code += "assert _run() == 0\nassert 'torch' in sys.modules\nassert 'torch._dynamo' not in sys.modules\n"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=cli.environment, capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == 0, ended.stderr
