"""The settings of a model of transformers, as the `base` of an experiment whose cells start from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebench.config import format_yaml
from moebench.pretrained.folder import PREFIX, open_pretrained
from moebench.pretrained.parent import read_parent


def describe_parent(name: str) -> dict[str, Any]:
    """Return the sections of a cell that starts from the folder `hf:PATH`; raise UsageError where it cannot."""
    path = Path(name.removeprefix(PREFIX)).expanduser().absolute()
    parent = read_parent(open_pretrained(f"{PREFIX}{path}" if name != PREFIX else name, requires_experts=False))
    return {**parent.settings, "init": {"from": f"{PREFIX}{path}"}}


def render_parent(settings: Mapping[str, Any]) -> str:
    """Return the sections as YAML, ending in a newline."""
    return format_yaml({"base": dict(settings)})
