import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from moebench.errors import UsageError, suggest
from moebench.registry import (
    FOLDERS,
    HOMES,
    Registry,
    field_docs,
    get_registry,
    load_plugin,
    names_without_import,
    require_plugins,
)
from moebench.routing.router import ROUTERS
from moebench.schema import ExperimentConfig, ModelConfig, TrainConfig

ROUTER = '''
"""A plugin."""

from dataclasses import dataclass

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(
    Facts(
        family="token choice", equation="y = x", paper="arXiv:0000.00000",
        causality=Causality(causal=True, reason="as switch", batch_dependent=False),
    )
)
class Mine(Switch):
    """A router from a file."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        """Options."""

        name: str = "NAME"
        depth: int = 3
        """How deep it goes."""
'''


def load_error(path: str) -> str:
    """Load a plugin that cannot be loaded and return the error's one line."""
    with pytest.raises(UsageError) as caught:
        load_plugin(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        ROUTERS.get("swich", where="router.name")
    message = str(caught.value)
    assert message.startswith("router.name: 'swich' is unknown. Did you mean 'switch'?")
    assert message.endswith(f"Allowed: {', '.join(ROUTERS.names())} (and those of a file given by --plugin)")
    with pytest.raises(UsageError, match=r"^router: 'zzz' is unknown\. Allowed: "):
        ROUTERS.get("zzz")


def test_nearest_is_empty_when_nothing_is_near() -> None:
    assert suggest("zzzzz", ["switch", "hash"]) == ""
    assert suggest("hsah", ["switch", "hash"]) == " Did you mean 'hash'?"


def test_second_component_of_a_name_is_refused() -> None:
    registry: Registry[type, str] = Registry("thing", None)

    @registry.register("facts", name="one")
    class First:
        """The first."""

    with pytest.raises(UsageError, match=r"test_registry\.py:\d+: thing 'one' is already defined in .*\.py:\d+"):

        @registry.register("facts", name="one")
        class Second:
            """The second."""

    assert registry.get("one").item is First
    assert registry.get("one").doc == "The first."
    assert registry.names() == ["one"]


def test_definition_executed_again_in_a_notebook_replaces_the_earlier_one() -> None:
    registry: Registry[type, str] = Registry("thing", None)
    cell = "@registry.register('facts', name='one')\nclass Mine:\n    version = VERSION\n"
    for version in ("1", "2"):
        exec(cell.replace("VERSION", version), {"__name__": "__main__", "registry": registry})
    assert registry.get("one").item.version == 2
    with pytest.raises(UsageError, match="'one' is already defined"):
        exec(cell.replace("Mine", "Other").replace("VERSION", "3"), {"__name__": "__main__", "registry": registry})


def test_component_without_a_name_is_refused() -> None:
    registry: Registry[type, str] = Registry("thing", None)
    with pytest.raises(UsageError, match="this thing has no name"):

        @registry.register("facts")
        class Nameless:
            pass


def test_plugin_joins_the_registry_once(plugin) -> None:
    path = plugin.write(ROUTER.replace("NAME", "mine"))
    loaded = load_plugin(path)
    entry = ROUTERS.get("mine")
    assert re.fullmatch(r"[0-9a-f]{64}", loaded.digest)
    assert loaded.names == {"mine"}
    assert entry.origin.startswith(path)
    assert load_plugin(path) == loaded
    assert field_docs(entry.item.Config)["depth"] == "How deep it goes."
    assert field_docs(entry.item.Config)["jitter"].startswith("In training")


def test_plugin_that_takes_a_name_is_refused(plugin) -> None:
    message = load_error(plugin.write(ROUTER.replace("NAME", "switch")))
    assert "plugin.py:" in message
    assert "router 'switch' is already defined in" in message
    assert ROUTERS.get("switch").item.__name__ == "Switch"


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_missing_plugin(plugin, name: str) -> None:
    path = str(plugin.folder / name)
    assert load_error(path) == f"--plugin {path}: no such file"


def test_plugin_with_a_syntax_error(plugin) -> None:
    path = plugin.write("x = 1\ndef broken(:\n    pass\n")
    message = load_error(path)
    assert message.startswith(f"--plugin {path}: SyntaxError: ")
    assert "line 2" in message


def test_plugin_that_raises(plugin) -> None:
    path = plugin.write("def f():\n    return 1 / 0\n\n\nf()\n")
    assert load_error(path) == f"--plugin {path}: ZeroDivisionError: division by zero (line 2)"


def test_plugin_that_imports_what_is_not_there(plugin) -> None:
    path = plugin.write("import torch\nimport no_such_package\n")
    message = load_error(path)
    assert message == f"--plugin {path}: ModuleNotFoundError: No module named 'no_such_package' (line 2)"


def test_plugin_that_is_not_python(plugin) -> None:
    path = plugin.write("name: switch\n", name="plugin.yaml")
    assert load_error(path) == f"--plugin {path}: not a Python file (a name ending in .py)"


def test_repaired_plugin_loads(plugin) -> None:
    load_error(plugin.write("raise ValueError('not yet')\n"))
    load_plugin(plugin.write(ROUTER.replace("NAME", "repaired")))
    assert "repaired" in ROUTERS.names()


@pytest.mark.parametrize("kind", list(FOLDERS))
def test_names_read_from_source_are_the_real_ones(kind: str) -> None:
    built_in = [entry.name for entry in get_registry(kind).entries() if "moebench/" in entry.origin]
    assert names_without_import(kind) == built_in


def test_every_kind_has_a_registry() -> None:
    for kind in HOMES:
        assert get_registry(kind).kind == kind
        assert get_registry(kind).names()


def config_classes() -> list[type]:
    configs: list[type] = [ModelConfig, TrainConfig, ExperimentConfig]
    pending = [entry.item.Config for kind in FOLDERS for entry in get_registry(kind).entries()]
    while pending:
        config_class = pending.pop()
        configs.append(config_class)
        types = [field.type for field in dataclasses.fields(config_class)]
        pending += [found_type for found_type in types if dataclasses.is_dataclass(found_type)]
    return configs


@pytest.mark.parametrize("config_class", config_classes(), ids=lambda cls: cls.__qualname__)
def test_every_option_has_a_doc(config_class: type) -> None:
    docs = field_docs(config_class)
    for field in dataclasses.fields(config_class):
        if field.name != "name":
            assert docs[field.name].endswith((".", ")")), field.name
            assert docs[field.name][0].isupper() or docs[field.name].startswith(("'", "c:", "all:", "auto ", "bf16 "))


def test_docs_of_fields_that_follow_each_other() -> None:
    docs = field_docs(TrainConfig)
    assert docs["clip_norm"] == "Maximum L2 norm of the gradient of all parameters together."
    assert docs["device"] == "Device of the run; auto is CUDA if a device is available, else the CPU."


def test_every_component_has_a_source_location() -> None:
    for kind in HOMES:
        for entry in get_registry(kind).entries():
            file, _, line = entry.origin.rpartition(":")
            source = Path(file).read_text().splitlines()[int(line) - 1 :]
            assert source[0].lstrip().startswith(("@", "class ", "def ")), entry.origin
            assert entry.doc, entry.name


def test_a_run_needs_the_plugin_that_it_was_trained_with(tmp_path: Path) -> None:
    path = str(tmp_path / "trained_with.py")
    Path(path).write_text("VALUE = 1")
    with pytest.raises(UsageError, match=r"run abc needs the plug-in .*trained_with\.py"):
        require_plugins([path], [], "run abc")
    trained = load_plugin(path).digest
    require_plugins([path], [trained], "run abc")
    require_plugins([path], [], "run abc")  # of a version that recorded none
    with pytest.raises(
        UsageError, match=r"run abc was trained with a different version of the plug-in .*trained_with\.py"
    ):
        require_plugins([path], ["0" * 64], "run abc")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("frozen=True, kw_only=True", "kw_only=True", "cannot inherit non-frozen dataclass from a frozen one"),
        ("(frozen=True, kw_only=True)", "", "cannot inherit non-frozen dataclass from a frozen one"),
        ("frozen=True, kw_only=True", "frozen=True", "non-default argument 'depth' follows default argument"),
    ],
)
def test_a_config_that_dataclass_refuses_names_the_rule(plugin: Any, old: str, new: str, reason: str) -> None:
    text = ROUTER.replace("depth: int = 3", "depth: int").replace(old, new)
    path = plugin.write(f"{text}# {plugin.folder}\n", name="my_router.py")
    message = load_error(path)
    rule = rf"{re.escape(path)}:\d+: a Config must be decorated with @dataclass\(frozen=True, kw_only=True\)"
    assert re.match(rule, message)
    assert reason in message


def test_another_type_error_of_a_plugin_is_reported_as_it_is(plugin: Any) -> None:
    path = plugin.write("max(1)\n", name="my_router.py")
    assert load_error(path) == f"--plugin {path}: TypeError: 'int' object is not iterable (line 1)"
