"""scripts/gpu_check.sh: a stage that hangs is stopped, later stages run, and finished results are kept."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/gpu_check.sh"

STUB = """#!/usr/bin/env bash
# An interpreter whose programs are these.
case "$*" in
  '-c import torch') exit ${NO_TORCH:-0} ;;
  *is_available*) exit ${NO_CUDA:-0} ;;
  '-c '*) echo 'Python 3.12.3 torch 2.11.0 NVIDIA H200' ;;
  '- '*) cat >/dev/null; echo '0 wheels to install' ;;
  *pytest*) [[ -z ${DEAF:-} ]] || trap '' TERM; echo 'half a result'; while :; do sleep 0.1; done ;;
  *'bench layer'*) echo 'error: it broke' >&2; exit 3 ;;
  *routers_h200*)
    mkdir -p "$MOEBENCH_RESULTS/runs/a"
    printf '{"id":\\n"a"}' >"$MOEBENCH_RESULTS/runs/a/result.json" ;;
  *) echo "$*" ;;
esac
"""


def check(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the script with a stub in place of the interpreter."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MOEBENCH_")}
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHON": str(stub)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def summary(out: Path) -> dict[str, str]:
    """Return the outcome of each stage in the summary, without its seconds."""
    lines = [line.partition(": ") for line in (out / "summary.txt").read_text().splitlines()]
    return {name: state.partition(" s")[0].rstrip("0123456789").rstrip(" ,") for name, _, state in lines}


def test_a_stage_that_hangs_is_stopped_and_the_others_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = wait_for(check(tmp_path, str(out), "--each", "1", "--limit", "90"))
    assert code == 1
    text = (out / "summary.txt").read_text()
    assert printed == text  # as it goes
    assert "cuda, limit 90 s: Python 3.12.3 torch 2.11.0 NVIDIA H200" in text
    assert "tests: stopped after 1 s; partial output in tests.log\n" in text
    assert "layer: failed with exit code 3, 0 s: error: it broke\n" in text
    assert [name for name, what in summary(out).items() if what == "ok"] == ["step", "step_512", "step_1152", "ranking"]
    assert (out / "tests.log").read_text() == "half a result\n"
    wide = (out / "step_1152.log").read_text()
    assert "-m moebench bench step --device cuda" in wide
    assert "model.d_model=1152" in wide
    assert wide.endswith("train.precision=bf16\n")
    assert "results: 1 finished cells\n" in text
    assert (out / "results.jsonl").read_text() == '{"id":"a"}\n'


def test_a_stage_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (str(out), "--each", "1", "--grace", "1", "--stages", "tests,step")
    code, _, _ = wait_for(check(tmp_path, *arguments, DEAF="yes"))
    assert code == 1
    assert summary(out)["tests"] == "stopped after"
    assert summary(out)["step"] == "ok"


def test_no_stage_starts_after_the_time_limit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin = time.monotonic()
    code, _, _ = wait_for(check(tmp_path, str(out), "--limit", "4", "--grace", "1"))
    assert code == 1
    assert time.monotonic() - begin < 60
    states = summary(out)
    assert states["kernels"] == "stopped after"
    assert {states[name] for name in ("tests", "step", "layer", "step_512", "step_1152", "ranking")} == {
        "not run: out of time"
    }


def test_finished_stages_survive_the_loss_of_the_machine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = check(tmp_path, str(out), "--stages", "tests")
    try:
        while not (out / "tests.log").exists() or not (out / "tests.log").read_text():
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    wait_for(process)
    assert "setup: 0 wheels" in (out / "summary.txt").read_text()
    assert (out / "tests.log").read_text() == "half a result\n"


def test_exit_code_is_0_if_all_stages_succeed(tmp_path: Path) -> None:
    code, _, err = wait_for(check(tmp_path, str(tmp_path / "out"), "--stages", "step,ranking"))
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {"NO_CUDA": "1"}, "torch finds no CUDA device (MOEBENCH_TEST_DEVICE=cpu tries the script without one)"),
        ((), {"NO_TORCH": "1"}, "has no torch (PYTHON names another interpreter)"),
        (("--fast",), {}, "--fast: no such option (allowed: --collect"),
        (("--limit",), {}, "--limit: a value is missing"),
        (("--limit", "soon"), {}, "'soon' is not a whole number of seconds"),
        (
            ("--stages", "step,all"),
            {},
            "'all' is unknown (allowed: kernels tests step layer step_512 step_1152 ranking)",
        ),
        ((), {"MOEBENCH_TEST_DEVICE": "tpu"}, "MOEBENCH_TEST_DEVICE: 'tpu' is unknown (allowed: cuda, cpu)"),
    ],
)
def test_mistakes_are_named_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    code, out, err = wait_for(check(tmp_path, *arguments, **environment))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("gpu_check: ")
    assert message in err


def wheel(folder: Path, name: str, version: str) -> None:
    """Write a wheel with one module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = '{version}'\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_only_wheels_of_what_is_missing_are_installed(tmp_path: Path) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    wheel(wheels, "moebench_never_there", "1.0")
    wheel(wheels, "torch", "99.0")  # newer than what is here, which is new enough
    arguments = (str(out), "--wheels", str(wheels), "--stages", "tests", "--each", "1", "--grace", "1")
    wait_for(check(tmp_path, *arguments, PYTHON=sys.executable, MOEBENCH_TEST_DEVICE="cpu"))
    text = (out / "summary.txt").read_text()
    assert "setup: 1 wheels to install moebench_never_there-1.0-py3-none-any.whl\n" in text


def test_every_selected_name_is_in_a_gpu_test() -> None:
    selections = re.findall(r"^  TESTS='(.*)'$", (ROOT / SCRIPT).read_text(), re.MULTILINE)
    files = [*(ROOT / "tests" / "gpu").glob("test_*.py"), ROOT / "tests" / "contract" / "test_execution.py"]
    names = " ".join(name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))
    assert len(selections) == 2
    assert not [word for words in selections for word in words.split(" or ") if word not in names]


def test_the_script_passes_bash_and_shellcheck() -> None:
    subprocess.run(["bash", "-n", SCRIPT], cwd=ROOT, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stages_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (str(out), "--wheels", str(tmp_path), "--limit", "800")
    process = check(tmp_path, *arguments, PYTHON=sys.executable, MOEBENCH_TEST_DEVICE="cpu", OMP_NUM_THREADS="1")
    process.communicate(timeout=850)
    text = (out / "summary.txt").read_text()
    assert process.returncode == 0, text
    assert "results: 2 finished cells\n" in text
