"""The console that every table, progress display and line is printed on."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from typing_extensions import override

from moebench.printable import make_printable


class SafeConsole(Console):
    """A console that shows the control characters of texts; those of its own styles and displays are obeyed."""

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=make_printable(segment.text))
