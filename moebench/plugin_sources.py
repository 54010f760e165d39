"""The source files of a plug-in: its text and that of the local modules that it imports, as one digest."""

import ast
import hashlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path


def digest_sources(file: Path) -> str:
    """Return the SHA-256 of a plug-in file and of the files beside it that it imports; call after it was imported."""
    first, *others = (hashlib.sha256(source.read_bytes()).hexdigest() for source in _find_sources(file.resolve()))
    return hashlib.sha256("".join([first, *sorted(others)]).encode()).hexdigest() if others else first


def _find_sources(plugin: Path) -> list[Path]:
    """Return a plug-in file and the files below its folder that it imports, directly or not; no installed packages."""
    sources, packages = [plugin], [""]
    for file, package in zip(sources, packages, strict=False):  # both grow during the loop
        for name in _list_imports(file, package):
            module = sys.modules.get(name)
            source = Path(getattr(module, "__file__", None) or "")
            is_local = (
                source.suffix == ".py" and source.is_relative_to(plugin.parent) and name.split(".")[0] != "moebench"
            )
            if is_local and "site-packages" not in source.parts and source not in sources:
                sources.append(source)
                packages.append(getattr(module, "__package__", None) or "")
    return sources


def _list_imports(file: Path, package: str) -> Iterator[str]:
    """Yield the names of the modules that a file may import, and of the packages above them."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            yield from itertools.accumulate(name.split("."), lambda above, part: f"{above}.{part}")
