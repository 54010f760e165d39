"""Text of figures in scripts for which no font is installed: escapes that can be read in place of boxes."""

import sys
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter
from typing_extensions import override

from moebench.printable import print_text

DEFAULT = "DejaVu Sans"
"""Part of matplotlib: Latin, Greek, Cyrillic, Arabic letters and mathematics."""
OTHERS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Hebrew",
    "Arial Unicode MS",
    "Unifont",
)
"""Fonts of other scripts: those that are installed are used for what the default font lacks."""


@lru_cache(maxsize=1)
def list_families() -> tuple[str, ...]:
    """Return the installed families, in the order in which they are asked for a character."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return (DEFAULT, *(name for name in OTHERS if name in installed))


@lru_cache(maxsize=4096)
def has_glyph(character: str) -> bool:
    """Return whether one of the families has a character."""
    paths = [font_manager.findfont(family, fallback_to_default=False) for family in list_families()]
    return any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


def escape_missing(text: str) -> str:
    r"""Return the text with escapes such as \u8def in place of characters that no family has."""
    return "".join(
        character if character.isspace() or has_glyph(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def escape_figure(figure: Figure) -> None:
    """Escape all text of a figure that would be boxes, and say once which characters they are."""
    missing: set[str] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            missing |= _list_missing("".join(label.get_text() for label in axis.get_ticklabels()))
            if isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter | StrCategoryFormatter):
                axis.set_major_formatter(_EscapingFormatter(axis.get_major_formatter()))
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        missing |= _list_missing(text.get_text())
        text.set_text(escape_missing(text.get_text()))
    if missing:
        _report("".join(sorted(missing)))


class _EscapingFormatter(Formatter):
    """Escapes the labels of ticks, which every drawing sets again."""

    def __init__(self, formatter: Formatter) -> None:
        self.formatter = formatter

    @override
    def __call__(self, x: float, pos: int | None = None) -> str:
        return escape_missing(str(self.formatter(x, pos)))


def _list_missing(text: str) -> set[str]:
    return {character for character in text if not character.isspace() and not has_glyph(character)}


@lru_cache(maxsize=64)
def _report(characters: str) -> None:
    names = " ".join(characters[:8])
    print_text(
        f"note: no installed font has {names}{' ...' if len(characters) > 8 else ''}: figures show them as"
        f" {escape_missing(characters[0])}; install one, such as Noto Sans CJK",
        file=sys.stderr,
    )
