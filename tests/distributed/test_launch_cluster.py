"""`moebench run` under torchrun and SLURM: rank 0 runs the grid, the others participate and print nothing."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.command_line import CommandLine, WarmCommandLine, wait_until
from support.results_folder import Results
from support.start_methods import (
    EXPERT_2,
    TIMEOUT_S,
    free_port,
    kill_all,
    moebench_lines,
    slurm,
    torchrun,
    wait_for_first_steps,
    workers_by_rank,
    write_faulty,
)

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(autouse=True)
def _kill_leftovers() -> Iterator[None]:
    yield
    kill_all()


def wait_for_all(processes: list[subprocess.Popen[str]], timeout: float = TIMEOUT_S) -> list[tuple[int, str, str]]:
    """Wait for all processes; return exit code, stdout and stderr of each."""
    streams = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *stream) for process, stream in zip(processes, streams, strict=True)]


def train_locally(cli: CommandLine, warm: WarmCommandLine, *changes: str) -> dict[str, Any]:
    """Return the metrics of the same cells over two processes that the runner starts itself."""
    ended = warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--results", "local", *changes, timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    return metrics_of(Results(cli.folder / "local"))


def metrics_of(results: Results) -> dict[str, Any]:
    return {arm: results.result(arm, seed)["metrics"] for arm, seed in results.statuses()}


def write(cli: CommandLine, **changes: Any) -> None:
    cli.write(**{"grid": {"router": ["dense", "switch"]}, "seeds": [0]} | changes)


@pytest.mark.slow
def test_torchrun(cli: CommandLine, warm: WarmCommandLine) -> None:
    write(cli)
    ((code, out, err),) = wait_for_all([torchrun(cli, *EXPERT_2)])
    assert (code, out) == (0, ""), err
    lines = moebench_lines(err)
    assert len([line for line in lines if line.startswith("done ")]) == 2
    assert len([line for line in lines if line.startswith("2 of 2 cells done")]) == 1
    cli.assert_no_process_is_left()
    assert metrics_of(Results(cli.folder / "results")) == train_locally(cli, warm, *EXPERT_2)


@pytest.mark.slow
def test_slurm(cli: CommandLine, warm: WarmCommandLine) -> None:
    write(cli)
    first, second = wait_for_all(slurm(cli, *EXPERT_2, "--json"))
    assert first[0] == 0, first
    assert second == (0, "", "")  # a participant prints nothing
    cli.assert_no_process_is_left()
    assert metrics_of(Results(cli.folder / "results")) == train_locally(cli, warm, *EXPERT_2)


@pytest.mark.slow
def test_two_nodes(cli: CommandLine, warm: WarmCommandLine) -> None:
    write(cli)
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "nodes")
    options = ("--nnodes", "2", "--nproc-per-node", "1", *rendezvous, "--local-addr", "127.0.0.1")
    nodes = [torchrun(cli, *EXPERT_2, "parallel.nodes=2", options=options) for _ in range(2)]
    outcomes = wait_for_all(nodes)
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert sum("2 of 2 cells done" in err for _, _, err in outcomes) == 1
    cli.assert_no_process_is_left()
    assert metrics_of(Results(cli.folder / "results")) == train_locally(cli, warm, *EXPERT_2)


@pytest.mark.slow
def test_a_wrong_number_of_processes_is_refused_once(cli: CommandLine) -> None:
    first, second = wait_for_all(slurm(cli, "parallel.expert=4"))
    assert (first[0], first[1]) == (2, ""), first
    assert first[2].count("\n") == 1, first
    assert first[2].startswith("error: parallel.data=1 times parallel.expert=4 are 4 processes, and 2 were started")
    assert second == (2, "", "")
    cli.assert_no_process_is_left()


@pytest.mark.slow
def test_a_mistake_is_printed_once(cli: CommandLine) -> None:
    ((code, _, err),) = wait_for_all([torchrun(cli, "parallel.exprt=2")])
    assert code != 0
    assert err.count("error: parallel.exprt") == 1


@pytest.mark.slow
def test_a_failing_remote_worker_is_named_and_the_next_call_repairs(cli: CommandLine, warm: WarmCommandLine) -> None:
    arms = ("raise 1", "kill 1", "stop 1")
    write_faulty(cli, "none 0", *arms)
    options = ("--plugin", "faulty.py", *EXPERT_2, "parallel.timeout_s=10")
    first, second = wait_for_all(slurm(cli, *options))
    assert first[0] == second[0] == 1, (first, second)
    assert second[1:] == ("", "")
    cli.assert_no_process_is_left()
    results = Results(cli.folder / "results")
    assert results.result("none 0", 0)["status"] == "done"
    error = results.result("raise 1", 0)["error"]
    assert re.fullmatch(r"rank 1: ValueError: the router failed in two lines \(.*faulty\.py:\d+\)", error)
    assert results.result("kill 1", 0)["error"] == "rank 1 was killed by SIGKILL (out of memory?)"
    assert results.result("stop 1", 0)["error"].startswith("rank 1 hung: no progress for ")
    (cli.folder / "repaired").touch()
    assert [code for code, _, _ in wait_for_all(slurm(cli, *options))] == [0, 0]
    metrics = metrics_of(results)
    assert all(metrics[arm] == metrics["none 0"] for arm in arms)


LONG = {"steps": 4000, "checkpoint_every": 1000, "eval_every": 2000}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_one_program_ends_the_others(cli: CommandLine, lost: int, number: signal.Signals) -> None:
    write(cli, train=LONG)
    processes = slurm(cli, *EXPERT_2, "parallel.timeout_s=10")
    try:
        wait_for_first_steps(cli)
        processes[lost].send_signal(number)
        sent_at = time.monotonic()
        other = processes[1 - lost]
        _, err = other.communicate(timeout=90)
        assert time.monotonic() - sent_at < 60
        assert other.returncode == 1, err
        expected = (f"rank {lost} is unreachable",) if lost else ("error: rank 1: ", "error: the store of this launch")
        assert any(message in err for message in expected), err
    finally:
        processes[lost].kill()
        processes[lost].communicate(timeout=20)
    cli.assert_no_process_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_the_run(cli: CommandLine, number: signal.Signals) -> None:
    write(cli, train=LONG)
    process = torchrun(cli, *EXPERT_2)
    folder = wait_for_first_steps(cli)
    process.send_signal(number)
    ((code, _, err),) = wait_for_all([process], timeout=90)
    assert code != 0
    cli.assert_no_process_is_left()
    assert "interrupted; continue with: moebench run ./tiny.yaml" in err
    assert list(folder.glob("checkpoints/step_*.json"))
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_a_signal_to_one_node_of_slurm_stops_the_run(cli: CommandLine) -> None:
    write(cli, train=LONG)
    processes = slurm(cli, *EXPERT_2)
    folder = wait_for_first_steps(cli)
    processes[1].send_signal(signal.SIGTERM)
    first, second = wait_for_all(processes, timeout=90)
    assert (first[0], second) == (143, (143, "", "")), first
    cli.assert_no_process_is_left()
    assert list(folder.glob("checkpoints/step_*.json"))
    wait_until(lambda: not workers_by_rank(cli), "processes are left")
