"""From a grid to its cells: arms of several keys, equal arms, plug-ins."""

import json
import sys
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.registry import PLUGIN_MODULE
from moebench.routing.losses import LOSSES
from moebench.routing.router import ROUTERS
from moebench.runs.cell import Cell

ARMS = [
    {"label": "dense", "router": "dense"},
    {"label": "low", "layout": {"name": "first_n", "n": 1, "num_experts": 4}},
    {"label": "wide", "router": {"name": "top_k", "top_k": 4}, "layout.depth": 2, "train": {"steps": 7}},
]


def experiment(tmp_path: Path, *overrides: str, **grid: object) -> Experiment:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 200)
    base = {"task": {"data": {"path": str(text)}}, "router": {"name": "switch", "jitter": 0.0}}
    file = tmp_path / "arms.yaml"
    file.write_text(json.dumps({"base": base, "grid": grid or {"arm": ARMS}, "seeds": [0]}))
    return expand(file, overrides)


def test_each_arm_sets_its_own_keys(tmp_path: Path) -> None:
    expanded = experiment(tmp_path)
    assert expanded.arms == ["dense", "low", "wide"]
    dense, low, wide = (cell.config for cell in expanded.cells)
    assert (dense.router.name, dense.layout.name) == ("dense", "every_n")
    assert (low.router.name, low.router.jitter, low.layout.name, low.layout.num_experts) == (
        "switch",
        0.0,
        "first_n",
        4,
    )
    assert (wide.router.top_k, wide.layout.name, wide.layout.depth, wide.train.steps) == (4, "every_n", 2, 7)
    assert expanded.cells[0].varies == {"router.name": "dense", "seed": 0}
    assert expanded.cells[2].varies == {
        "router.name": "top_k",
        "router.top_k": 4,
        "layout.depth": 2,
        "train.steps": 7,
        "seed": 0,
    }


def test_an_arm_that_cannot_be_trained_is_named(tmp_path: Path) -> None:
    arms = [ARMS[0], {"label": "large", "router": {"name": "top_k", "top_k": 8}, "layout": {"num_experts": 4}}]
    with pytest.raises(UsageError, match=r"^router\.top_k=8 does not fit .*\(allowed: 2 to 4\); arm 'large'$"):
        experiment(tmp_path, arm=arms)
    with pytest.raises(UsageError, match=r"\(allowed: 2 to 4\)$"):  # there is no other arm
        experiment(tmp_path, arm=arms[1:])


def test_arms_times_another_axis(tmp_path: Path) -> None:
    expanded = experiment(tmp_path, **{"arm": ARMS[:2], "train.steps": [3, 5]})
    assert expanded.arms == ["dense, steps=3", "dense, steps=5", "low, steps=3", "low, steps=5"]


def test_an_override_goes_to_the_arms_that_have_the_key(tmp_path: Path) -> None:
    expanded = experiment(tmp_path, "layout.n=2", "router.top_k=3")
    assert [getattr(cell.config.layout, "n", None) for cell in expanded.cells] == [2, 2, 2]
    assert expanded.cells[2].config.router.top_k == 3
    assert "router.top_k applies to wide; the other arms have no such key" in expanded.notes
    with pytest.raises(UsageError, match=r"layout: the grid varies it; choose with 'grid.layout=\[...\]' instead"):
        experiment(tmp_path, "layout.name=every_n")


def test_two_arms_need_two_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two arms are called 'dense'"):
        experiment(tmp_path, arm=[ARMS[0], {**ARMS[1], "label": "dense"}])


def refusal(tmp_path: Path, *overrides: str, **grid: object) -> str:
    with pytest.raises(UsageError) as caught:
        experiment(tmp_path, *overrides, **grid)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arms_that_differ_in_keys_outside_the_id_are_one_cell(tmp_path: Path) -> None:
    message = refusal(tmp_path, **{"train.eval_every": [10, 20]})
    assert "the arms 'eval_every=10' and 'eval_every=20' are the same cells" in message
    assert "they differ only in train.eval_every, which changes no result; leave one out" in message
    arms = [
        {"label": "a", "train": {"log_every": 1}},
        {"label": "b", "layout.recompute": True, "parallel.timeout_s": 5},
    ]
    message = refusal(tmp_path, arm=arms)
    assert "'a' and 'b'" in message
    assert "differ only in layout.recompute, parallel.timeout_s, train.log_every, which" in message
    # One key that enters the id is enough.
    assert experiment(tmp_path, arm=[arms[0], {**arms[1], "train.threads": 2}]).arms == ["a", "b"]


def test_a_copy_of_the_data_is_the_same_cell(tmp_path: Path) -> None:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path in paths:
        path.write_text("the same words " * 200)
    named = {"task.data.path": [str(path) for path in paths]}
    assert "differ only in task.data.path, which changes no result" in refusal(tmp_path, **named)
    paths[1].write_text("other words " * 200)
    assert len(experiment(tmp_path, **named).arms) == 2


def test_two_labels_of_one_cell_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, arm=[{"label": "a", "router": "top_k"}, {"label": "b", "router": {"name": "top_k"}}])
    assert "the arms 'a' and 'b' are the same cells: they have equal settings; leave one out" in message


@pytest.mark.parametrize(
    ("routers", "parts"),
    [
        (["top_k", "top_k"], "the arm 'top_k' occurs twice; leave one out"),
        (["top_k", {"name": "top_k"}], "the arm 'top_k' occurs twice; leave one out"),
        (["top_k", {"name": "top_k", "top_k": 2}], "'top_k' and 'top_k top_k=2' are the same cells"),  # the default
        (["top_k", {"name": "top_k", "losses": {"z": 0.001}}], None),
    ],
)
def test_a_router_that_is_listed_twice(tmp_path: Path, routers: list[object], parts: str | None) -> None:
    if parts is None:
        assert experiment(tmp_path, router=routers).arms == ["top_k", "top_k losses={'z': 0.001}"]
    else:
        assert parts in refusal(tmp_path, router=routers)


def test_an_override_that_makes_arms_equal_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, "train.steps=7", **{"train.steps": [3, 5]})
        == "train.steps: grid varies it; choose its values with 'grid.train.steps=[7]' instead"
    )
    routers = {"router": [{"name": "top_k", "top_k": 2}, {"name": "top_k", "top_k": 4}]}
    advice = "router.top_k is set for all of them: leave it out, or choose the arms with 'grid.router=[...]'"
    assert advice in refusal(tmp_path, "router.top_k=3", **routers)
    arms = {"arm": [{"label": "few", "train.steps": 3}, {"label": "many", "train": {"steps": 5}}]}
    assert "train.steps is set for all of them" in refusal(tmp_path, "train.steps=4", **arms)


def test_labels_have_typed_values(tmp_path: Path) -> None:
    file = tmp_path / "typed.yaml"
    file.write_text(
        "grid:\n  task.data.domain_column: [on, 007, 7, null]\n  train.learning_rate: [1.0e-3, 5]\nseeds: [010]\n"
    )
    expanded = expand(file)
    assert expanded.arms[:3] == [
        "domain_column=on, learning_rate=0.001",
        "domain_column=on, learning_rate=5.0",
        "domain_column=007, learning_rate=0.001",
    ]
    assert [cell.config.task.data.domain_column for cell in expanded.cells[::2]] == ["on", "007", "7", None]
    varies = {"task.data.domain_column": "007", "train.learning_rate": 5.0, "seed": 10}
    assert expanded.cells[3].varies == varies
    json.dumps(expanded.cells[3].to_dict("typed"))
    file.write_text("grid: {arm: [{label: on}, {label: 1e3, router: dense}]}\nseeds: [0]\n")
    assert expand(file).arms == ["on", "1e3"]
    file.write_text("grid: {arm: [{label: null}, {label: b, router: dense}]}\n")
    with pytest.raises(UsageError, match=r"^grid\.arm: label: null was given\. Allowed: text"):
        expand(file)


PLUGIN = '''
from dataclasses import dataclass

from moebench.routing.router import ROUTERS, Causality, Facts

Parent = ROUTERS.get("PARENT").item


@ROUTERS.register(
    Facts(
        family="token choice", equation="y = x", paper="arXiv:0000.00000",
        causality=Causality(causal=True, reason="as switch", batch_dependent=False),
    )
)
class Mine(Parent):
    """A router from a file."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Parent.Config):
        """Options."""

        name: str = "NAME"
'''


def plugin_text(name: str, parent: str = "switch", comment: str = "") -> str:
    return PLUGIN.replace("NAME", name).replace("PARENT", parent) + f"# {comment}\n"


def by_arm(folder: Path, routers: list[str], *plugins: str) -> dict[str, Cell]:
    """Expand a grid of routers as a new process would, and return the cell of each."""
    for name in [name for name, entry in ROUTERS._entries.items() if entry.item.__module__.startswith(PLUGIN_MODULE)]:
        del ROUTERS._entries[name]
    for module in [module for module in sys.modules if module.startswith(PLUGIN_MODULE)]:
        del sys.modules[module]
    file = folder / "plugged.yaml"
    file.write_text(json.dumps({"grid": {"router": routers}, "seeds": [0]}))
    return {cell.arm: cell for cell in expand(file, (), plugins).cells}


def test_a_plugin_enters_the_ids_of_cells_that_use_it(plugin) -> None:
    alone = by_arm(plugin.folder, ["dense", "switch"])
    path = plugin.write(plugin_text("mine"))
    first = by_arm(plugin.folder, ["dense", "switch", "mine"], path)
    plugin.write(plugin_text("mine", comment="edited"))
    second = by_arm(plugin.folder, ["dense", "switch", "mine"], path)
    for name in ("dense", "switch"):
        assert alone[name].id == first[name].id == second[name].id
        assert first[name].plugins == ()
    assert first["mine"].id != second["mine"].id
    assert first["mine"].plugins == (str(Path(path).resolve()),)


def test_a_plugin_enters_the_ids_of_plugins_built_on_it(plugin) -> None:
    below = plugin.write(plugin_text("below"), "below.py")
    above = plugin.write(plugin_text("above", parent="below"), "above.py")
    other = plugin.write(plugin_text("other"), "other.py")
    routers = ["dense", "below", "above", "other"]
    first = by_arm(plugin.folder, routers, below, above, other)
    assert [len(first[name].plugins) for name in routers] == [0, 1, 2, 1]
    plugin.write(plugin_text("below", comment="edited"), "below.py")
    second = by_arm(plugin.folder, routers, below, above, other)
    assert [first[name].id == second[name].id for name in routers] == [True, False, False, True]


def test_a_plugin_that_registers_nothing_enters_all_ids(plugin) -> None:
    path = plugin.write("import torch\n", "patch.py")
    alone, patched = (by_arm(plugin.folder, ["dense", "switch"], *given) for given in ((), (path,)))
    assert all(alone[name].id != patched[name].id for name in ("dense", "switch"))


def test_a_loss_of_a_plugin_enters_the_ids_of_cells_that_name_it(plugin) -> None:
    path = plugin.write(
        "from moebench.routing.losses import LOSSES, LossFacts\n\n\n"
        "@LOSSES.register(LossFacts(equation='0', paper='none', uniform='0', collapsed='0'), name='mine')\n"
        "def mine(record):\n"
        "    return record.routing.logits_TE.sum() * 0\n"
    )
    file = plugin.folder / "losses.yaml"
    file.write_text("grid: {router: [switch, {name: switch, losses: {mine: 0.1}, label: with}]}\nseeds: [0]\n")
    try:
        plain, with_loss = expand(file, (), [path]).cells
    finally:
        LOSSES._entries.pop("mine", None)
    assert (plain.plugins, with_loss.plugins) == ((), (str(Path(path).resolve()),))


def test_modules_beside_a_plugin_enter_the_id_if_imported(plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(plugin.folder)
    plugin.write("from rest_of_plugin.inner import WIDTH\n" + plugin_text("mine"))
    (plugin.folder / "rest_of_plugin").mkdir()
    for name, text in {
        "__init__": "",
        "inner": "from . import deeper\nWIDTH = 3\n",
        "deeper": "",
        "unused": "",
    }.items():
        plugin.write(text, f"rest_of_plugin/{name}.py")
    path = str(plugin.folder / "plugin.py")
    ids = [by_arm(plugin.folder, ["dense", "mine"], path)["mine"].id]
    for name in ("unused", "deeper", "inner", "__init__"):
        plugin.write("from . import deeper\nWIDTH = 3\n# edited\n", f"rest_of_plugin/{name}.py")
        ids.append(by_arm(plugin.folder, ["dense", "mine"], path)["mine"].id)
    for module in [module for module in sys.modules if module.startswith("rest_of_plugin")]:
        del sys.modules[module]
    assert ids[0] == ids[1]  # `unused` is not imported
    assert len(set(ids)) == 4
