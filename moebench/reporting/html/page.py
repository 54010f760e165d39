"""A page as one self-contained file: no script, no address, and a policy that forbids browsers to load any.

Everything that a template prints is escaped: names, questions and error texts come from files that others can write.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moebench.printable import make_printable

FOLDER = Path(__file__).parent
STYLE_SHEET = FOLDER / "page.css"


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Return a page from one of the templates in this folder; raise jinja2's errors for a value that is missing."""
    # `finalize` acts on what expressions print, before it is escaped.
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_make_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["style_classes"] = name_style_classes
    style = _drop_blank_lines(STYLE_SHEET.read_text(encoding="utf-8"))
    html = environment.get_template(template).render(values, style=Markup(style), policy=build_policy(style))
    return _drop_blank_lines(html)


def build_policy(style: str) -> str:
    """Return the Content-Security-Policy: this style sheet, by its hash, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def name_style_classes(style: str) -> str:
    """Return the classes of the style sheet for a style of rich: `bold red` becomes `s-bold s-red`."""
    return " ".join(f"s-{word}" for word in style.split() if word.isalpha())


def _drop_blank_lines(text: str) -> str:
    return re.sub(r"\n[ \t\n]*\n", "\n", text)


def _make_printable(value: Any) -> Any:
    """Return a text without control characters and marks of the direction of writing; other values as they are."""
    return make_printable(value) if type(value) is not Markup and isinstance(value, str) else value
