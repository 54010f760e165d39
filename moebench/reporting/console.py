"""The console that every table, progress display and line is printed on."""

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from typing_extensions import override

from moebench.printable import make_printable


class SafeConsole(Console):
    """A console that shows the control characters of texts; those of its own styles and displays are obeyed.

    It prints text as it is; with NO_COLOR (no-color.org) without colors and bold.
    """

    def __init__(self, **options: Any) -> None:
        color_system = None if os.environ.get("NO_COLOR") else "auto"
        super().__init__(**{"highlight": False, "markup": False, "color_system": color_system} | options)

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # Most text is printable, and a segment passes here once for each level of nesting.
            if segment.control or (text := make_printable(segment.text)) == segment.text:
                yield segment
            else:
                yield segment._replace(text=text)
