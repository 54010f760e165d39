"""`moebench bench`: structure and agreement of what is reported; no time is asserted."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

PEERS = {
    "transformers": "transformers",
    "st-moe-pytorch": "st_moe_pytorch",
    "mixture-of-experts": "mixture_of_experts",
    "soft-moe-pytorch": "soft_moe_pytorch",
    "deepspeed": "deepspeed",
}
TINY = ("--shape", "32,8,16,4,2,swiglu", "--rounds", "1", "--threads", "1")


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory, warm: WarmCommandLine) -> Any:
    folder = tmp_path_factory.mktemp("bench")
    loads = ("--load", "zipf", "--load", "balanced")
    ended = warm(CommandLine(folder), "bench", "layer", *TINY, *loads, "--plot", "layer.png", "--json")
    assert ended.code == 0, ended.err
    assert (folder / "layer.png").read_bytes().startswith(b"\x89PNG")
    assert "[1/2] 32,8,16,4,2,swiglu: T32 d8 hidden16 E4 k2 swiglu, zipf load" in ended.err
    return ended.json


def test_layer_reports_every_variant_with_its_numbers(layer: Any) -> None:
    zipf, balanced = layer["rows"]
    assert (zipf["load_E"], balanced["load_E"]) == ([31, 15, 10, 8], [16] * 4)
    for row in layer["rows"]:
        lines = {line["name"]: line for line in row["lines"]}
        assert {"dense", "moebench", "moebench capacity 1.25", "plain grouped_mm", "double loop"} <= set(lines)
        assert lines["dense"]["train"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert lines["double loop"]["approximate"] is False  # 32 tokens are few enough
        for line in lines.values():
            assert line["train"]["low"] <= line["train"]["median"] <= line["train"]["high"]
            assert line["forward_ms"] > 0
            assert line["saved_bytes"] is None or line["saved_bytes"] > 0
        assert row["rounds"]["train"]["kept"] == 1
        assert row["least_saved_bytes"] == 64 * (8 + 2 * 16) * 4


def test_layers_of_one_formula_agree(layer: Any) -> None:
    for row in layer["rows"]:
        agrees = {line["name"]: line["agrees"] for line in row["lines"]}
        assert agrees["moebench"] is True  # the double loop agrees
        assert agrees["plain grouped_mm"] is True
        assert False not in agrees.values()


def test_capacity_reports_its_drops(layer: Any) -> None:
    dropped = [{line["name"]: line["dropped"] for line in row["lines"]} for row in layer["rows"]]
    assert dropped[0]["moebench capacity 1.25"] == 11 / 64  # loads 31 15 10 8 over 20 slots
    assert dropped[1]["moebench capacity 1.25"] == 0
    assert dropped[0]["moebench"] == 0


def test_libraries_are_measured_or_absent_with_a_reason(layer: Any) -> None:
    for package, module in PEERS.items():
        installed = importlib.util.find_spec(module) is not None
        assert installed or "not installed" in layer["absent"][package]
    assert "no adapter" in layer["absent"]["deepspeed"]
    assert {one["name"] for one in layer["rows"][0]["skipped"]} >= {"moebench bf16"} or layer["machine"]["bf16_units"]


@pytest.mark.slow
def test_layer_as_tables(cli: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(cli, "bench", "layer", *TINY, "--markdown")
    assert ended.code == 0, ended.err
    assert "**T32 d8 hidden16 E4 k2 swiglu, router load**" in ended.out
    assert "| moebench |" in ended.out
    assert "- Machine: " in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "1,2"], ["--shape 1,2", "six values", "T,d,hidden,E,k,activation"]),
        (["--shape", "32,8,16,4,9,gelu"], ["k must be at most E=4", "9"]),
        (["--shape", "32,8,x,4,2,gelu"], ["hidden", "whole number", "'x'"]),
        (["--shape", "32,8,16,4,2,swiglo"], ["'swiglo'", "Did you mean 'swiglu'?"]),
        (["--shape", "32,4,16,8,2,gelu", "--load", "zipf"], ["--load", "d >= E"]),
        (["--only", "midle"], ["--only", "'midle'", "Did you mean 'middle'?"]),
        (["--load", "zip"], ["--load", "'zip'", "Did you mean 'zipf'?"]),
        (["--rounds", "0"], ["--rounds", "1"]),
        (["--device", "tpu"], ["--device", "'tpu'", "auto, cpu, cuda"]),
        (["--allocator", "kep"], ["--allocator", "'kep'", "Did you mean 'keep'?"]),
        (["--plot", "nowhere/x.png"], ["--plot nowhere/x.png"]),
    ],
)
def test_a_mistake_in_bench_layer(
    cli: CommandLine, warm: WarmCommandLine, arguments: list[str], words: list[str]
) -> None:
    assert_refused(warm(cli, "bench", "layer", *arguments), words)


def assert_refused(ended: Any, words: list[str]) -> None:
    assert ended.code == 2, ended.err
    assert ended.out == ""
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in last


@pytest.fixture(scope="session")
def routers(tmp_path_factory: pytest.TempPathFactory, warm: WarmCommandLine) -> Any:
    folder = tmp_path_factory.mktemp("routers")
    names = [part for name in ("base", "top_k", "hash", "olmoe", "soft_moe") for part in ("--router", name)]
    sizes = ("--tokens", "32", "--experts", "4", "--experts", "8", "--rounds", "1", "--threads", "1")
    ended = warm(CommandLine(folder), "bench", "router", *names, *sizes, "--plot", "router.png", "--json")
    assert ended.code == 0, ended.err
    assert (folder / "router.png").read_bytes().startswith(b"\x89PNG")
    assert "[1/2] 5 routers, T32 E4" in ended.err
    return ended.json


def test_every_router_is_compared_with_top_k(routers: Any) -> None:
    four, eight = routers["tables"]
    assert (four["num_tokens"], four["num_experts"], eight["num_experts"]) == (32, 4, 8)
    assert list(four["skipped"]) == ["olmoe"]  # 8 experts per token do not fit 4
    assert eight["skipped"] == {}
    lines = {line["name"]: line for line in eight["lines"]}
    assert list(lines) == ["base", "base solver=auction", "base solver=exact", "top_k", "hash", "olmoe", "soft_moe"]
    assert [lines[name]["top_k"] for name in ("base", "top_k", "olmoe")] == [1, 2, 8]
    assert [lines[name]["goal"] for name in ("base", "top_k", "hash")] == [30.0, 3.0, None]
    for line in lines.values():
        assert line["forward_ms"] > 0
        assert line["train"]["low"] <= line["train"]["median"] <= line["train"]["high"]
        reaches = None if line["goal"] is None else line["train"]["median"] <= line["goal"]
        assert line["reaches_goal"] is reaches


def test_solvers_of_base_report_the_gain_of_their_assignment(routers: Any) -> None:
    for table in routers["tables"]:
        shares = {line["name"]: line["share_of_optimum"] for line in table["lines"]}
        assert shares["base solver=exact"] == pytest.approx(1.0)
        assert 0.9 < shares["base"] <= 1.0 + 1e-9
        assert 0.9 < shares["base solver=auction"] <= 1.0 + 1e-9
        assert shares["top_k"] is None


def test_routers_as_tables(cli: CommandLine, warm: WarmCommandLine) -> None:
    arguments = ("--router", "hash", "--tokens", "16", "--experts", "4", "--rounds", "1", "--threads", "1")
    ended = warm(cli, "bench", "router", *arguments, "--markdown")
    assert ended.code == 0, ended.err
    assert "**T16 E4 d64**" in ended.out
    assert "| hash | 1 | T |" in ended.out
    assert "goal missed: by none" in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--router", "swich"], ["--router", "'swich'", "Did you mean 'switch'?"]),
        (["--tokens", "300"], ["--tokens", "256", "300"]),
        (["--experts", "0"], ["--experts", "1"]),
        (["--plot", "nowhere/x.png"], ["--plot nowhere/x.png"]),
    ],
)
def test_a_mistake_in_bench_router(
    cli: CommandLine, warm: WarmCommandLine, arguments: list[str], words: list[str]
) -> None:
    assert_refused(warm(cli, "bench", "router", *arguments), words)


@pytest.fixture(scope="session")
def step(tmp_path_factory: pytest.TempPathFactory, warm: WarmCommandLine) -> Any:
    command_line = CommandLine(tmp_path_factory.mktemp("step"))
    command_line.write(grid={"router": ["dense", "top_k"]})
    ended = warm(
        command_line, "bench", "step", "./tiny.yaml", "--rounds", "1", "--steps", "2", "--plot", "step.png", "--json"
    )
    assert ended.code == 0, ended.err
    assert (command_line.folder / "step.png").read_bytes().startswith(b"\x89PNG")
    assert Results(command_line.folder / "results").folders() == []  # a benchmark is no run
    return ended.json


def test_step_reports_every_arm(step: Any) -> None:
    assert list(step["arms"]) == ["dense", "top_k"]
    dense, top_k = step["arms"].values()
    assert set(dense["seconds"]) == {"trainer", "plain", "timed"}  # no load to force
    assert set(top_k["seconds"]) == {"trainer", "unwatched", "plain", "timed", "uniform"}
    assert top_k["tokens_per_step"] == 2 * 32
    assert set(top_k["tokens_per_s"]) == set(top_k["seconds"])
    assert dense["uniform_over_own_load"] is None


def test_step_compares_the_same_work(step: Any) -> None:
    for arm in step["arms"].values():
        assert arm["weights_differ_by"] == 0.0  # same batches, same updates, to the last bit


def test_step_divides_a_step_into_its_parts(step: Any) -> None:
    dense, top_k = (arm["parts_s"] for arm in step["arms"].values())
    assert dense["router"] == dense["dispatch, experts"] == 0
    assert all(seconds > 0 for name, seconds in top_k.items() if name != "rest of forward")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], ["'nosuch'"]),
        (["tiny.yaml", "other.yaml"], ["bench step", "tiny.yaml, other.yaml"]),
        (["tiny.yaml", "--router", "switch"], ["bench step", "--router switch"]),
        (["--router", "swich"], ["'swich'", "Did you mean 'switch'?"]),
        (["tiny.yaml", "train.stepps=3"], ["train.stepps", "Did you mean 'steps'?"]),
        (["tiny.yaml", "--steps", "0"], ["--steps", "1"]),
        (["tiny.yaml", "--device", "cud"], ["--device", "Did you mean 'cuda'?"]),
    ],
)
def test_a_mistake_in_bench_step(
    cli: CommandLine, warm: WarmCommandLine, arguments: list[str], words: list[str]
) -> None:
    assert_refused(warm(cli, "bench", "step", *arguments), words)


def test_bench_alone_prints_its_help(cli: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(cli, "bench")
    assert ended.code == 0
    assert "layer" in ended.out
    assert "step" in ended.out


@pytest.mark.slow
def test_meshes_report_what_they_exchange_and_keep(tmp_path: Path, warm: WarmCommandLine) -> None:
    sizes = ("--processes", "2", "--width", "16", "--steps", "12", "--rounds", "1")
    ended = warm(CommandLine(tmp_path), "bench", "parallel", *sizes, "parallel.shard_optimizer=true", "--json")
    assert ended.code == 0, ended.err
    costs = {mesh["name"]: mesh["costs"] for mesh in ended.json["meshes"]}
    data, expert = costs["data 2 x expert 1"], costs["data 1 x expert 2"]
    assert data["collectives"] == expert["collectives"] == 3
    # Every parameter has two copies, or two shards with one copy each; a step counter of 4 bytes for each.
    assert data["optimizer_mib"] == pytest.approx(expert["optimizer_mib"], rel=0.01)
    assert costs["1 process"] == {}
