"""`plan`, `list`, `show`, and plug-ins in them."""

import re
import subprocess
import sys
from functools import cache

import pytest
from support.command_line import ROOT, CommandLine, WarmCommandLine
from support.results_folder import Results
from support.tiny_experiment import ARMS

from moebench.catalogue.configuration import describe_name

PLUGIN = '''
"""Round robin over the experts by token id, weighted by a learned gate: not part of moebench."""

from dataclasses import dataclass, field

from torch import Tensor

from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterConfig, RouterBuildContext
from moebench.routing.context import RouteContext
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = (token id + shift) mod E,  y = softmax(W x)_i · E_i(x)",
        paper="none: written for a test",
        causality=Causality(causal=True, reason="each token is routed by its own id", batch_dependent=False),
    )
)
class MyRouter(Router):
    """Sends a token to the expert with the number of its id."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of my_router."""

        name: str = "my_router"
        shift: int = 0
        """Added to the token id."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.shift = config.shift

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the expert of its id."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        expert_TK = ((ctx.token_id_T + self.shift) % self.num_experts)[:, None]
        return Routing.from_top_k(
            expert_TK,
            scores_TE.gather(-1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
'''


@cache
def names() -> list[str]:
    """Return every registered name, from the registry in a process of its own."""
    code = (
        "from moebench.registry import HOMES, get_registry\n"
        "print(*(name for kind in HOMES for name in get_registry(kind).names()))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_plan_shows_every_cell_and_trains_nothing(cli: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(cli, "plan", "./tiny.yaml", "--json")
    assert (ended.code, ended.err) == (0, "")
    cells = ended.json["cells"]
    assert [(cell["arm"], cell["seed"], cell["state"]) for cell in cells] == [
        (arm, seed, "new") for seed in (0, 1) for arm in ARMS
    ]
    for cell in cells:
        assert re.fullmatch("[0-9a-f]{12}", cell["id"])
        assert cell["train_tokens"] == 12 * 2 * 32
        assert cell["train_flops"] == 3 * cell["flops_per_token"] * cell["train_tokens"]
        assert abs(cell["flops_vs_baseline"]) <= 0.02
    files = {path.name for path in (cli.folder / "results").iterdir()} if (cli.folder / "results").exists() else set()
    assert files <= {"cache"}  # no tracker, no run, no record of an experiment
    table = warm(cli, "plan", "./tiny.yaml")
    assert (table.code, table.err) == (0, "")
    assert all(cell["id"] in table.out for cell in cells)


def test_planned_costs_equal_executed_costs(finished: CommandLine, warm: WarmCommandLine) -> None:
    results = Results(finished.folder / "results")
    for cell in warm(finished, "plan", "./tiny.yaml", "--json").json["cells"]:
        cost = results.result(cell["arm"], cell["seed"])["cost"]
        assert cell["state"] == "done"
        planned = {key: value for key, value in cost.items() if key in cell}
        assert planned == {key: cell[key] for key in planned}
        executed = {
            f"{phase}_{name}" for phase in ("train", "eval") for name in ("flops_per_token", "experts_per_token")
        }
        assert set(cost) - set(planned) == executed
        assert all(cost[name] == cost[name.split("_", 1)[1]] for name in executed)  # dropless, and a fixed k


@pytest.mark.parametrize("kind", ["routers", "layouts", "tasks", "losses", "metrics", "experiments", "runs"])
def test_list_every_kind(finished: CommandLine, warm: WarmCommandLine, kind: str) -> None:
    listed = warm(finished, "list", kind, "--json")
    assert (listed.code, listed.err) == (0, "")
    table = warm(finished, "list", kind)
    assert (table.code, table.err) == (0, "")
    assert "\x1b" not in table.out
    for row in listed.json:
        assert str(row.get("name", row.get("id"))) in table.out
    if kind == "runs":
        assert {(row["arm"], row["seed"], row["state"]) for row in listed.json} == {
            (arm, seed, "done") for arm in ARMS for seed in (0, 1, 2)
        }
    elif kind == "experiments":
        assert {row["origin"] for row in listed.json} == {"packaged"}  # there is no folder `experiments` here
        assert "quickstart" in {row["name"] for row in listed.json}
    elif kind != "metrics":
        assert {row["name"] for row in listed.json} <= set(names())


def test_a_local_experiment_replaces_a_packaged_one_of_its_name(cli: CommandLine, warm: WarmCommandLine) -> None:
    packaged = warm(cli, "show", "experiment", "quickstart")
    assert (packaged.code, packaged.err) == (0, "")
    assert packaged.out == (ROOT / "moebench" / "experiments" / "quickstart.yaml").read_text()
    assert warm(cli, "show", "experiment", "experiments/quickstart.yaml").out == packaged.out
    (cli.folder / "experiments").mkdir()
    cli.write("experiments/quickstart.yaml", question="Mine?")
    cli.write("experiments/mine.yaml", question="Another?")
    rows = {row["name"]: row for row in warm(cli, "list", "experiments", "--json").json}
    assert (rows["mine"]["origin"], rows["mine"]["question"]) == ("local", "Another?")
    assert (rows["quickstart"]["origin"], rows["quickstart"]["question"]) == (
        "local, replaces the packaged one",
        "Mine?",
    )
    assert rows["vision"]["origin"] == "packaged"
    table = warm(cli, "list", "experiments").out
    assert "replaces" in table
    assert '"Mine?"' in warm(cli, "show", "experiment", "quickstart").out
    assert warm(cli, "plan", "quickstart", "--json").json["question"] == "Mine?"
    unknown = warm(cli, "show", "experiment", "quickstrt")
    assert (unknown.code, unknown.err.count("\n")) == (2, 1)
    assert "experiment: 'quickstrt' is unknown. Did you mean 'quickstart'?" in unknown.err


def test_list_of_a_folder_without_runs(cli: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(cli, "list", "runs", "--json")
    assert (ended.code, ended.json, ended.err) == (0, [], "")


def test_every_registered_name_is_described() -> None:
    for name in names():
        shown = describe_name(name)
        assert shown["name"] == name
        assert shown["about"]
        assert re.search(r"\.py:\d+$", shown["source"])
        for option in shown["options"]:
            assert option["about"] or option["name"] == "name", f"{name}: {option['name']} is not explained"


@pytest.mark.parametrize("name", ["switch", "every_n", "language", "load_balance"])
def test_show_prints_name_kind_and_options(finished: CommandLine, warm: WarmCommandLine, name: str) -> None:
    description, text = warm(finished, "show", name, "--json").json, warm(finished, "show", name)
    assert (text.code, text.err) == (0, "")
    assert text.out.startswith(f"{name}  ({description['kind']})\n")
    assert description["about"].split("\n")[0] in text.out
    assert all(option["name"] in text.out for option in description["options"])


def test_show_prints_use_and_pitfalls_of_a_router(cli: CommandLine, warm: WarmCommandLine) -> None:
    description, text = warm(cli, "show", "base", "--json").json, " ".join(warm(cli, "show", "base").out.split())
    assert f"When to use it: {description['use']}" in text
    assert f"What can go wrong: {description['beware']}" in text
    page = warm(cli, "show", "--all-routers")
    assert (page.code, page.err) == (0, "")
    assert f"**When to use it.** {description['use']}" in page.out
    every = warm(cli, "show", "--all-routers", "--json").json
    assert description in every


def test_show_writes_a_table_of_all_routers_and_a_page_for_each_family(cli: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(cli, "show", "--all-routers", "--out", "docs")
    assert (ended.code, ended.err) == (0, "")
    written = {path.relative_to(cli.folder).as_posix() for path in (cli.folder / "docs").rglob("*.md")}
    assert set(ended.out.split()) == written
    assert {"docs/routers.md", "docs/routers/token_choice.md", "docs/routers/baseline.md"} <= written
    links = re.findall(r"\]\((routers/\w+\.md)#(\w+)\)", (cli.folder / "docs" / "routers.md").read_text())
    assert ("routers/global_assignment.md", "base") in links
    assert {f"docs/{page}" for page, _ in links} == written - {"docs/routers.md"}
    for page, router in links:
        assert (cli.folder / "docs" / page).read_text().count(f"\n## {router}\n") == 1


@pytest.mark.parametrize(
    "router",
    [
        "hash",
        "soft_moe",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("top_k", "expert_choice", "base", "olmoe")),
    ],
)
def test_show_draws_a_worked_example(cli: CommandLine, warm: WarmCommandLine, router: str) -> None:
    ended = warm(cli, "show", router, "--plot", "example.png", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert ended.json["name"] == router
    assert (cli.folder / "example.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["show", "--all-routers"]),
        (["base", "--all-routers"], ["show", "--all-routers"]),
        (["base", "switch"], ["show", "give one of a name"]),
        (["--all-routers", "--plot", "x.png"], ["--plot", "one router"]),
        (["base", "--out", "docs"], ["--out", "--all-routers"]),
        (["--all-routers", "--out", "docs", "--json"], ["--out", "without --json"]),
        (["--all-routers", "--out", "tiny.yaml"], ["--out tiny.yaml", "cannot be written"]),
        (["every_n", "--plot", "x.png"], ["--plot", "'every_n' is a layout"]),
        (["base", "--plot", "nowhere/x.png"], ["--plot nowhere/x.png"]),
    ],
)
def test_a_mistake_in_show(cli: CommandLine, warm: WarmCommandLine, arguments: list[str], words: list[str]) -> None:
    ended = warm(cli, "show", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert all(word in ended.err for word in words)


def test_a_plugin_router_is_trained_listed_and_shown(cli: CommandLine, warm: WarmCommandLine) -> None:
    (cli.folder / "my_router.py").write_text(PLUGIN)
    grid = ["grid.router=[my_router]", "seeds=[0]", "router.shift=1"]
    ended = warm.train(cli, "--plugin", "my_router.py", *grid, "--json")
    assert ended.code == 0, ended.err
    results = Results(cli.folder / "results")
    result = results.result("my_router", 0)
    assert (result["status"], result["config"]["router"]["shift"]) == ("done", 1)
    assert "load/max_violation" in result["metrics"]
    compared = warm(cli, "compare", "./tiny.yaml", "--plugin", "my_router.py", *grid, "--json")
    assert [*compared.json["arms"]] == ["my_router"]
    shown = warm(cli, "show", "my_router", "--plugin", "my_router.py", "--json").json
    assert shown["family"] == "static"
    (shift,) = [option for option in shown["options"] if option["key"] == "router.shift"]
    assert (shift["type"], shift["default"], shift["about"]) == ("int", 0, "Added to the token id.")
    assert "my_router" in warm(cli, "list", "routers", "--plugin", "my_router.py").out
    # The content of the file is part of the cell's id.
    plan = ["plan", "./tiny.yaml", *grid, "--json", "--plugin"]
    assert [cell["state"] for cell in warm(cli, *plan, "./my_router.py").json["cells"]] == ["done"]
    (cli.folder / "my_router.py").write_text(PLUGIN.replace("num_experts)[:, None]", "num_experts)[:, None].clone()"))
    assert [cell["state"] for cell in warm(cli, *plan, "my_router.py").json["cells"]] == ["new"]
