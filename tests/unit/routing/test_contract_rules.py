"""Plug-in routers that break a rule of the contract: each is refused in one line that names the file and the rule."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken_plugins import ROUTER, assert_one_line, write_broken
from support.training_cases import Run, tiny_config, write_text

from moebench.bench.router.measure import Settings, measure
from moebench.errors import UsageError
from moebench.experiment.grid import expand_config
from moebench.registry import load_plugin
from moebench.schema import ExperimentConfig
from moebench.training.model import build_model, prepare_task

GATE = "        self.gate = Gate(context.d_model, context.num_experts)\n"
FACTS = ROUTER[ROUTER.index("    Facts(\n") : ROUTER.index(")\nclass Broken")]

REGISTRATION = {
    "an unknown fact": ('family="token choice",', 'famly="token choice",', ["unexpected keyword argument 'famly'"]),
    "a missing fact": ('        equation="y = x",\n', "", ["missing 1 required keyword-only argument: 'equation'"]),
    "an old fact": ("causality=Causality(", "causal=True, causality=Causality(", ["unexpected", "'causal'"]),
    "no facts": (f"@ROUTERS.register(\n{FACTS})", "@ROUTERS.register", ["Facts(...)", "got Broken"]),
    "facts that are a mapping": (
        f"@ROUTERS.register(\n{FACTS})",
        "@ROUTERS.register({})",
        ["Facts(...)", "my_router.py:"],
    ),
    "a name that is not text": ('name: str = "broken"', "name: int = 3", ["has no name", "name: str = '...'"]),
    "no router": ("class Broken(Router):", "class Broken:", ["must be a class that derives from Router"]),
    "no name": ('        name: str = "broken"\n', "        pass\n", ["has no name", "name: str = '...'"]),
    "a name that is taken": ('"broken"', '"switch"', ["router 'switch' is already defined in", "switch.py"]),
    "no dataclass": ("    @dataclass(frozen=True, kw_only=True)\n", "", ["@dataclass(frozen=True, kw_only=True)"]),
    "an option without a default": (
        '        name: str = "broken"\n',
        '        name: str = "broken"\n        depth: int\n',
        ["option 'depth' of its Config needs a default"],
    ),
    "a Config of its own": (
        "class Config(RouterConfig):",
        "class Config:",
        ["its Config must derive from RouterConfig"],
    ),
    "causality that is text": (
        FACTS[FACTS.index("causality=") : -1],
        "causality='none',\n    )\n",
        ["Facts(causality)"],
    ),
    "an update without statistics": (
        "    def forward(",
        "    def after_step(self, load_E):\n        pass\n\n    def forward(",
        ["after_step must take (load_E, statistics), got after_step(self, load_E)"],
    ),
    "losses that are a value": (
        "    def __init__",
        "    losses = {}\n\n    def __init__",
        ["losses must be a method"],
    ),
    "traits that are a method": (
        "    def __init__",
        "    def traits(self):\n        return None\n\n    def __init__",
        ["traits must be a property"],
    ),
}
"""What is replaced in the plug-in, by what, and what the error names; refused when the file is loaded."""

BUILDING = {
    "item": (f"{GATE}", f"{GATE}        self.scale = torch.ones(1).item()\n", ["meta device", ".item()"]),
    "tolist": (f"{GATE}", f"{GATE}        self.order = torch.arange(3).tolist()\n", ["meta device", ".tolist()"]),
    "numpy": (f"{GATE}", f"{GATE}        self.table = torch.arange(3).numpy()\n", ["meta device", "numpy"]),
    "any failure": (f"{GATE}", "        self.gate = Gaet(context.d_model)\n", ["NameError", "'Gaet'"]),
    "half precision": (
        f"{GATE}",
        f"{GATE}        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float16))\n",
        ["parameter 'scale' must be float32, got torch.float16"],
    ),
    "an __init__ that leaves out the base class": (
        "super().__init__(config, context)",
        "nn.Module.__init__(self)",
        ["must begin with super().__init__(config, context)"],
    ),
    "costs that fail": (
        "    def forward(",
        "    def flops_per_token(self):\n        return self.nothing\n\n    def forward(",
        ["costs and traits: AttributeError", "'nothing'"],
    ),
    "costs that are missing": (
        "    def forward(",
        "    def rows_per_token(self, experts_per_token):\n        pass\n\n    def forward(",
        ["rows_per_token must return a number of at least 0, got None"],
    ),
    "traits of another type": (
        "    def __init__",
        "    traits = property(lambda self: {})\n\n    def __init__",
        ["traits must be RouterTraits(...), got {}"],
    ),
}
"""Refused when the cell is planned."""

METHOD = "    def __init__"
PLANNING = {
    "a form that is text": (METHOD, f"    form = 'soft'\n\n{METHOD}", ["form must be a member of Form", "'soft'"]),
    "experts_per_token of an instance": (
        METHOD,
        f"    def experts_per_token(self, config, num_experts):\n        return 1\n\n{METHOD}",
        ["must be a static or class method"],
    ),
    "experts_per_token that is text": (
        METHOD,
        f"    @staticmethod\n    def experts_per_token(config, num_experts):\n        return 'two'\n\n{METHOD}",
        ["must return a whole number, got 'two'"],
    ),
    "a check that fails": (
        METHOD,
        f"    @staticmethod\n    def check(config, num_experts):\n        raise ValueError('no')\n\n{METHOD}",
        ["ValueError: no", "my_router.py:"],
    ),
    "no expert per token": (
        METHOD,
        f"    @staticmethod\n    def experts_per_token(config, num_experts):\n        return 0\n\n{METHOD}",
        ["experts_per_token must be at least 1"],
    ),
    "no losses": (
        'equation="y = x",',
        'equation="y = x", own_losses=("spread",),',
        ["must define losses(record), which Facts.own_losses announces"],
    ),
    "no forward": ("    def forward(", "    def route(", ["must define forward(x_TD, ctx)"]),
    "a forward without the context": (
        "def forward(self, x_TD: Tensor, ctx: RouteContext)",
        "def forward(self, x_TD: Tensor)",
        ["my_router.py:", "forward must take (x_TD, ctx), got forward(self, x_TD)"],
    ),
    "losses that the facts do not name": (
        METHOD,
        f"    def losses(self, record):\n        return {{'mine': 0}}\n\n{METHOD}",
        ["Facts.own_losses must name what losses() returns"],
    ),
    "a default loss that does not exist": (
        '        name: str = "broken"\n',
        '        name: str = "broken"\n        losses: dict = field(default_factory=lambda: {"balance": 1.0})\n',
        ["Config.losses: 'balance' is unknown", "Did you mean 'load_balance'?"],
    ),
    "a coefficient below 0": (
        '        name: str = "broken"\n',
        '        name: str = "broken"\n        losses: dict[str, float] = field(default_factory=lambda: {"z": -1.0})\n',
        ["Config.losses.z must be at least 0, got -1.0"],
    ),
    "a coefficient that is text": (
        '        name: str = "broken"\n',
        '        name: str = "broken"\n        losses: dict[str, float] = field(default_factory=lambda: {"z": "x"})\n',
        ["Config.losses: coefficients must be numbers, got {'z': 'x'}"],
    ),
    "features that are classes": (
        METHOD,
        f"    @staticmethod\n    def required_features(config):\n        return (Form,)\n\n{METHOD}",
        ["required_features must return a tuple of Feature objects"],
    ),
    "an option of a type that is not defined": (
        '        name: str = "broken"\n',
        '        name: str = "broken"\n        depth: "Floot" = 1.0\n',
        ["Config: name 'Floot' is not defined"],
    ),
    "an option of a type that no file can give": (
        '        name: str = "broken"\n',
        '        name: str = "broken"\n        depth: complex = 1j\n',
        ["option 'depth' has the type <class 'complex'>"],
    ),
}
"""Refused when an experiment is read."""

ROUTING = {
    "a tensor": (".topk(1)\n", ".topk(1)\n        return weight_TK\n", ["forward must return a Routing", "got Tensor"]),
    "another form": (
        "    def __init__",
        "    form = Form.SOFT\n\n    def __init__",
        ["a SoftRouting", "form=Form.SOFT"],
    ),
    "nothing": ("        return Routing.from_top_k(", "        Routing.from_top_k(", ["got NoneType"]),
    "another k": (".topk(1)", ".topk(2)", ["uses 2 experts per token", "experts_per_token declares 1"]),
}
"""Fail the cell when it is trained."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(("old", "new", "words"), REGISTRATION.values(), ids=REGISTRATION)
def test_registration_rules(plugin: Any, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, ROUTER, old, new, "my_router.py")
    with pytest.raises(UsageError) as caught:
        load_plugin(path)
    assert_one_line(caught.value, words, path)


@pytest.mark.parametrize(
    "layout", [{}, {"name": "hierarchical", "num_experts": 4, "groups": 2}], ids=["plain", "groups"]
)
@pytest.mark.parametrize(("old", "new", "words"), BUILDING.values(), ids=BUILDING)
def test_build_rules(
    plugin: Any, text: Path, tmp_path: Path, old: str, new: str, words: list[str], layout: dict[str, Any]
) -> None:
    path = write_broken(plugin, ROUTER, old, new, "my_router.py")
    load_plugin(path)
    config = tiny_config(text, router="broken", layout=layout)
    task = prepare_task(config, tmp_path)
    with pytest.raises(UsageError) as caught, torch.device("meta"):
        build_model(config, task)
    assert_one_line(caught.value, [*words, "'broken'"], path)


@pytest.mark.parametrize(("old", "new", "words"), PLANNING.values(), ids=PLANNING)
def test_planning_rules(plugin: Any, text: Path, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, ROUTER, old, new, "my_router.py")
    task = {"name": "language", "data": {"path": str(text), "tokenizer": "bytes"}}
    config = ExperimentConfig(base={"task": task}, grid={"router": ["broken"]}, baseline="broken")
    with pytest.raises(UsageError) as caught:
        expand_config("broken", config, plugins=[load_plugin(path)])
    assert_one_line(caught.value, words, path)


@pytest.mark.parametrize(("old", "new", "words"), ROUTING.values(), ids=ROUTING)
def test_routing_rules(plugin: Any, text: Path, tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, ROUTER, old, new, "my_router.py")
    load_plugin(path)
    with pytest.raises(UsageError) as caught:
        Run(tiny_config(text, router="broken"), tmp_path)()
    assert_one_line(caught.value, [*words, "'broken'"], path)


def test_the_unbroken_plugin_trains(plugin: Any, text: Path, tmp_path: Path) -> None:
    load_plugin(plugin.write(ROUTER, name="my_router.py"))
    assert Run(tiny_config(text, router="broken"), tmp_path)() is not None


def test_costs_may_be_integers_of_numpy(plugin: Any, text: Path, tmp_path: Path) -> None:
    cost = "    def flops_per_token(self):\n        return np.int64(8)\n\n    def forward"
    router = ROUTER.replace("    def forward", cost).replace(
        "import torch\nfrom", "import numpy as np\nimport torch\nfrom"
    )
    load_plugin(plugin.write(router, name="my_router.py"))
    assert Run(tiny_config(text, router="broken"), tmp_path)() is not None


def test_the_benchmark_of_routers_keeps_the_rules_too(plugin: Any) -> None:
    path = write_broken(plugin, ROUTER, *ROUTING["a tensor"][:2], "my_router.py")
    load_plugin(path)
    with pytest.raises(UsageError) as caught:
        measure(Settings(routers=("broken",), tokens=(64,), experts=(4,), rounds=1, device="cpu"))
    assert_one_line(caught.value, [*ROUTING["a tensor"][2], "'broken'"], path)
