"""Plug-in layouts that break a rule of the contract: each is refused in one line that names the file and the rule."""

from typing import Any

import pytest
from support.broken_plugins import LAYOUT, assert_one_line, write_broken

from moebench.errors import UsageError
from moebench.experts.contract import plan_layout
from moebench.experts.layout import LAYOUTS
from moebench.registry import load_plugin

BANK, RETURN = (
    "        bank = Experts(shapes=config.shapes)\n",
    "        return place_experts([num_layers - 1], num_layers, bank)\n",
)

REGISTRATION = {
    "no layout": ("class Broken(Layout):", "class Broken:", ["must be a class that derives from Layout"]),
    "no plan": ("    def plan(", "    def layers(", ["it must define plan"]),
    "a plan of an instance": (
        "    @staticmethod\n    def plan(config, num_layers):",
        "    def plan(self, config, num_layers):",
        ["plan must be a static or class method"],
    ),
    "a plan without the number of blocks": (
        "def plan(config, num_layers):",
        "def plan(config):",
        ["plan must take (config, num_layers), got plan(config)"],
    ),
    "a Config of its own": (
        "class Config(LayoutConfig):",
        "class Config:",
        ["its Config must derive from LayoutConfig"],
    ),
    "facts without a paper": (', paper="none"', "", ["missing 1 required keyword-only argument: 'paper'"]),
    "a fact of another type": ('paper="none"', "paper=2023", ["LayoutFacts(paper) must be of type str, got 2023"]),
    "a name that is taken": ('"broken"', '"every_n"', ["layout 'every_n' is already defined in"]),
}
"""What is replaced in the plug-in, by what, and what the error names; refused when the file is loaded."""

PLANNING = {
    "no return": (
        RETURN,
        RETURN.replace("return ", "plan = "),
        ["a tuple with one BlockPlan", "got NoneType", "return?"],
    ),
    "a bank alone": (RETURN, "        return bank\n", ["a tuple with one BlockPlan", "got Experts"]),
    "banks in place of blocks": (RETURN, "        return (bank,) * num_layers\n", ["got Experts for block 0"]),
    "too many blocks": (
        RETURN,
        RETURN.replace("num_layers, bank", "num_layers + 1, bank"),
        ["model.num_layers=2", "got 3"],
    ),
    "too few blocks": (RETURN, "        return (BlockPlan(feed_forward=bank),)\n", ["model.num_layers=2", "got 1"]),
    "no experts": (RETURN, RETURN.replace("[num_layers - 1]", "[]"), ["must place experts in at least one block"]),
    "a plan that raises": (BANK, "        raise KeyError('width')\n", ["plan: KeyError: 'width' (line 17)"]),
    "an option that does not exist": (
        BANK,
        "        bank = config.wider\n",
        ["plan: AttributeError", "'wider'", "(line 17)"],
    ),
    "no shapes": (BANK, BANK.replace("config.shapes", "()"), ["feed_forward.shapes", "at least one"]),
    "widths in place of shapes": (
        BANK,
        BANK.replace("config.shapes", "(1.0, 2.0)"),
        ["feed_forward.shapes", "ExpertShape"],
    ),
    "a shape in place of a bank": (
        RETURN,
        "        return (BlockPlan(feed_forward=ExpertShape()),) * num_layers\n",
        ["block 0: feed_forward must be Experts(...), got ExpertShape"],
    ),
    "an unknown kind": (
        BANK,
        BANK.replace("config.shapes", "(ExpertShape(kind='mlp'),) * 4"),
        ["block 1: feed_forward holds experts of kind constant, copy, ffn, zero, got 'mlp'"],
    ),
    "a kind of another part": (
        RETURN,
        "        return place_experts([0], num_layers, BlockPlan(attention=bank))\n",
        ["block 0: attention holds experts of kind head, projection, shared_projection, got 'ffn'"],
    ),
    "a width of 0": (
        BANK,
        BANK.replace("config.shapes", "(ExpertShape(width=0.0),) * 4"),
        ["width", "greater than 0, got 0.0"],
    ),
    "a width that is nan": (
        BANK,
        BANK.replace("config.shapes", "(ExpertShape(width=float('nan')),) * 4"),
        ["width", "greater than 0, got nan"],
    ),
    "half a network": (BANK, BANK.replace("config.shapes", "(ExpertShape(depth=0.5),) * 4"), ["depth", "got 0.5"]),
    "groups that do not divide": (
        BANK,
        BANK.replace("config.shapes", "config.shapes, groups=3"),
        ["groups=3 must divide"],
    ),
    "no groups": (BANK, BANK.replace("config.shapes", "config.shapes, groups=0"), ["groups", "at least 1, got 0"]),
    "a negative shared network": (
        BANK,
        BANK.replace("config.shapes", "config.shapes, shared=-1.0"),
        ["shared", "got -1.0"],
    ),
    "mixing with nothing": (
        BANK,
        BANK.replace("config.shapes", "config.shapes, residual=True"),
        ["residual=True", "shared"],
    ),
    "whole models in each block": (
        RETURN,
        "        return (BlockPlan(stack=Experts(shapes=(ExpertShape(kind='stack'),) * 4)),) * num_layers\n",
        ["must return one BlockPlan(stack=...)"],
    ),
}
"""Refused when an experiment is read."""


@pytest.mark.parametrize(("old", "new", "words"), REGISTRATION.values(), ids=REGISTRATION)
def test_registration(plugin: Any, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, LAYOUT, old, new, "my_layout.py")
    with pytest.raises(UsageError) as caught:
        load_plugin(path)
    assert_one_line(caught.value, words, path)


@pytest.mark.parametrize(("old", "new", "words"), PLANNING.values(), ids=PLANNING)
def test_plans(plugin: Any, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, LAYOUT, old, new, "my_layout.py")
    load_plugin(path)
    with pytest.raises(UsageError) as caught:
        plan_layout(LAYOUTS.get("broken").item.Config(num_experts=4), num_layers=2)
    assert_one_line(caught.value, [*words, "layout 'broken'"], path)


def test_the_unbroken_layout_is_planned(plugin: Any) -> None:
    load_plugin(plugin.write(LAYOUT))
    dense, with_experts = plan_layout(LAYOUTS.get("broken").item.Config(num_experts=4), num_layers=2)
    assert (len(dense.banks), len(with_experts.banks)) == (0, 1)


def test_widths_may_be_integers_of_numpy(plugin: Any) -> None:
    shapes = "shapes=tuple(ExpertShape(width=width) for width in np.arange(1, 5))"
    text = LAYOUT.replace("shapes=config.shapes", shapes).replace(
        "from dataclasses", "import numpy as np\nfrom dataclasses"
    )
    load_plugin(plugin.write(text))
    _, with_experts = plan_layout(LAYOUTS.get("broken").item.Config(num_experts=4), num_layers=2)
    assert [shape.width for bank in with_experts.banks for shape in bank.shapes] == [1, 2, 3, 4]
