"""Plug-ins that break a rule, on the command line: one line that names the file, and no run that looks finished."""

import pytest
from support.broken_plugins import LAYOUT, ROUTER, TASK
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

GRID = ("grid.router=[switch]", "baseline=switch", "seeds=[0]")
TASK_KEYS = ("base.task={name: broken}", "model.tie_embeddings=false")
REFUSED = {
    "a layout without a plan": (
        LAYOUT,
        ("        return place_experts", "        place_experts"),
        ("plan", "./tiny.yaml", "layout={name: broken, num_experts: 4}", *GRID),
        ["layout 'broken'", "plan must return", "got NoneType"],
    ),
    "a task without a task": (
        TASK,
        ("        return cls(config)\n", "        cls(config)\n"),
        ("plan", "./tiny.yaml", *TASK_KEYS, *GRID),
        ["task 'broken'", "prepare must return the task"],
    ),
    "a task with one loss for the batch": (
        TASK,
        ("        return loss_T.view_as(batch.target_BP)\n", "        return loss_T.mean()\n"),
        ("run", "./tiny.yaml", "--tracker", "none", *TASK_KEYS, *GRID),
        ["task 'broken'", "loss must return one value for each prediction"],
    ),
    "a task in the foreground": (
        TASK,
        (', generator=make_generator("broken", *purpose)', ""),
        ("run", "./tiny.yaml", "--foreground", "switch", *TASK_KEYS, *GRID),
        ["task 'broken'", "train_batch must be a function of its arguments"],
    ),
    "a task that ends the process": (
        TASK,
        ("        return cls(config)\n", "        raise SystemExit(0)\n"),
        ("plan", "./tiny.yaml", *TASK_KEYS, *GRID),
        ["task 'broken'", "prepare: SystemExit: 0 (line"],
    ),
    "a router whose cost cannot be computed": (
        ROUTER,
        ("    def forward(", "    def linear_maps(self):\n        raise KeyError('map')\n\n    def forward("),
        ("plan", "./tiny.yaml", "grid.router=[broken]", "baseline=broken", "train.mup_base_width=8"),
        ["KeyError: 'map'"],
    ),
    "a router that ends the process": (
        ROUTER,
        ("    def forward(", "    def linear_maps(self):\n        raise SystemExit(0)\n\n    def forward("),
        ("plan", "./tiny.yaml", "grid.router=[broken]", "baseline=broken", "train.mup_base_width=8"),
        ["SystemExit: 0"],
    ),
}


@pytest.mark.parametrize(("text", "change", "call", "words"), REFUSED.values(), ids=REFUSED)
def test_a_broken_rule_is_one_line(
    cli: CommandLine,
    warm: WarmCommandLine,
    text: str,
    change: tuple[str, str],
    call: tuple[str, ...],
    words: list[str],
) -> None:
    old, new = change
    assert text.count(old) == 1
    (cli.folder / "mine.py").write_text(text.replace(old, new))
    ended = warm(cli, *call, "--plugin", "mine.py")
    assert ended.code == 2, ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    for word in [*words, "mine.py:"]:
        assert word in ended.err
    assert not (cli.folder / "results" / "runs").exists()


@pytest.mark.parametrize("call", [("--tracker", "none"), ("--foreground", "broken")], ids=["worker", "foreground"])
def test_draws_of_the_process_fail_the_cell_in_one_line(
    cli: CommandLine, warm: WarmCommandLine, call: tuple[str, ...]
) -> None:
    noise = "        logits_TE = self.gate(x_TD) + torch.rand(4)\n"
    (cli.folder / "mine.py").write_text(ROUTER.replace("        logits_TE = self.gate(x_TD)\n", noise))
    grid = ("grid.router=[broken]", "baseline=broken", "seeds=[0]")
    ended = warm(cli, "run", "./tiny.yaml", *call, *grid, "--plugin", "mine.py")
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    assert "forward draws from the global random generator of torch" in ended.err
    result = Results(cli.folder / "results").result("broken", 0)
    assert (result["status"], result["step"]) == ("failed", 0)
    assert "mine.py:" in result["error"]
