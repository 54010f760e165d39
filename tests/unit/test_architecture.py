"""The architecture: direction of imports, light imports, and the size of files, functions and signatures."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moebench

PACKAGE = Path(moebench.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    (
        "errors",
        "interrupts",
        "process_setup",
        "cores",
        "allocator",
        "ranks",
        "seeds",
        "plugin_errors",
        "plugin_sources",
        "file_access",
        "printable",
        "stored_values",
        "commands",
    ),
    ("ranges",),
    ("components", "component_rules", "registry_entry", "registry", "yaml_text", "metric"),
    ("metrics",),
    ("conversion",),
    (
        "model_config",
        "optimizer_config",
        "step_config",
        "checkpoint_config",
        "tuning_config",
        "init_config",
        "stage_config",
    ),
    ("schema",),
    ("config",),
    ("routing",),
    ("experts",),
    ("parallel",),
    ("tasks",),
    ("causality",),
    ("compatibility",),
    ("models",),
    ("standalone",),
    ("runs",),
    ("reporting",),
    ("pretrained",),
    ("training",),
    ("tracking",),
    ("launch",),
    ("experiment",),
    ("analysis",),
    ("calibration",),
    ("catalogue",),
    ("bench",),
    ("cli",),
    ("api",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 50, 6


@cache
def parse(file: Path) -> ast.Module:
    """Return the tree of a source file, for all tests here, and not before one of them runs."""
    return ast.parse(file.read_text())


def package_of(file: Path) -> str:
    """Return the package, or the module, directly below `moebench` that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST, file: Path) -> Iterator[tuple[str, int]]:
    """Yield the modules that the code imports, functions included, blocks for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative imports hide the direction"
            yield node.module or "", node.lineno
            if node.module == "moebench":
                yield from ((f"moebench.{alias.name}", node.lineno) for alias in node.names)
        yield from imported_modules(node, file)


@cache
def imports_of(file: Path) -> list[tuple[str, int]]:
    """Return the modules that a file imports, with their lines."""
    return [*imported_modules(parse(file), file)]


@cache
def functions_of(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the functions and methods of a file, nested ones included."""
    return [node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_imports_go_one_way() -> None:
    wrong = []
    for file in FILES:
        package = package_of(file)
        if package in ("__init__", "__main__"):
            continue
        assert package in RANK, f"{package} is missing in the order of imports"
        for module, line in imports_of(file):
            parts = module.split(".")
            if parts[0] == "moebench" and len(parts) > 1 and parts[1] in RANK and RANK[parts[1]] > RANK[package]:
                wrong.append(f"{file}:{line} imports {module}")
    assert not wrong


def test_packages_of_the_analysis_do_not_import_each_other() -> None:
    """Longer cycles are found too."""
    imports: dict[str, set[str]] = {}
    for file in FILES:
        if package_of(file) == "analysis":
            package = file.relative_to(PACKAGE / "analysis").parts[0].removesuffix(".py")
            parts = [module.split(".") for module, _ in imports_of(file)]
            others = {each[2] for each in parts if each[:2] == ["moebench", "analysis"] and len(each) > 2} - {package}
            imports.setdefault(package, set()).update(others)
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_the_documented_order_of_imports_is_the_tested_one() -> None:
    contributing = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [order] = re.findall(r"Imports go one way: (.*?)\.", contributing, re.DOTALL)
    assert [tuple(re.findall(r"`(\w+)`", level)) for level in order.split("<")] == [*ORDER]
    architecture = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", architecture.split("```mermaid")[0], re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", row)]
    assert sorted(documented) == sorted(RANK)
    assert [RANK[name] for name in documented] == sorted(RANK.values())


def test_only_two_files_import_yaml() -> None:
    importing = [file for file in FILES if "yaml" in {module.split(".")[0] for module, _ in imports_of(file)}]
    assert importing == [PACKAGE / "config.py", PACKAGE / "yaml_text.py"]


def test_files_and_functions_are_short() -> None:
    long = []
    for file in FILES:
        num_lines = len(file.read_text().splitlines())
        if num_lines > MAX_FILE_LINES:
            long.append(f"{file} has {num_lines} lines")
        for function in functions_of(file):
            assert function.end_lineno is not None
            length = function.end_lineno - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long.append(f"{file}:{function.lineno} {function.name} has {length} lines")
    assert not long


def test_functions_have_few_parameters() -> None:
    """A command's parameters are its options, so `cli` is exempt, and so are kernels; `self` and `cls` do not count."""
    long = []
    for file in FILES:
        if package_of(file) == "cli":
            continue
        for function in functions_of(file):
            arguments = function.args
            names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if "triton.jit" in map(ast.unparse, function.decorator_list):
                continue  # addresses and sizes, no values
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                long.append(f"{file}:{function.lineno} {function.name} has {count} parameters")
    assert not long


def test_file_names_state_their_content() -> None:
    vague = {"utils", "util", "helper", "helpers", "manager", "misc", "common", "base"}
    assert not [file for file in FILES if vague & {*file.stem.split("_")}]


REPORT = "\nimport sys; print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))\n"


def loaded_by(*programs: str) -> list[set[str]]:
    """Run programs in a fresh interpreter and return the top-level packages that were loaded after each of them."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT.join((*programs, ""))],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
        timeout=120,
    )
    return [set(part.split("\n")[0].split()) for part in done.stdout.split("LOADED")[1:]]


def modules_of(*packages: str) -> list[str]:
    """Return the dotted names of all modules of some packages."""
    files = [file for file in FILES if package_of(file) in packages]
    return [".".join(("moebench", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """What is loaded in one process after routing and experts, after a layer was built, and after `pretrained`."""
    layers = [name for name in modules_of("routing", "experts") if ".kernels.gpu" not in name]  # Triton: on a GPU
    assert len(layers) > 15
    readers = modules_of("pretrained")  # `analysis` loads lightning, whose torchmetrics imports transformers by itself
    assert len(readers) > 5
    import_all = "import importlib\nfor name in {!r}: importlib.import_module(name)"
    build = "import moebench; moebench.moe_layer(8, 4)"
    return loaded_by(import_all.format(layers), build, import_all.format(readers))


def test_routing_and_experts_need_torch_alone(loaded: list[set[str]]) -> None:
    assert "torch" in loaded[0]
    assert not loaded[0] & {"lightning", "mlflow", "yaml", "datasets", "matplotlib", "scipy", "pandas", "triton"}


def test_building_a_layer_loads_nothing_heavy(loaded: list[set[str]]) -> None:
    assert not loaded[1] & {"lightning", "mlflow", "pandas", "statsmodels", "matplotlib", "datasets"}


def test_transformers_is_imported_only_where_a_folder_of_it_is_read(loaded: list[set[str]]) -> None:
    assert not loaded[2] & {"transformers", "safetensors"}


def test_help_loads_nothing_heavy() -> None:
    program = """
import contextlib, io, sys
sys.argv = ["moebench", "--help"]
from moebench.__main__ import main
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    main()
assert "Usage" in out.getvalue()
"""
    (loaded,) = loaded_by(program)
    assert not loaded & {"torch", "mlflow", "lightning", "datasets", "matplotlib", "scipy", "statsmodels", "pandas"}
