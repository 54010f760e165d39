"""The libraries of the extra `hf`, which are imported only where a folder of transformers is read."""

from importlib.metadata import PackageNotFoundError, version

from moebench.errors import UsageError

NEEDED = {"transformers": (5, 24), "safetensors": (0, 5)}
"""Library -> first version. Routers of earlier transformers return other values (`analysis/pretrained/recorder.py`)."""


def require_libraries() -> None:
    """Raise UsageError, with the command that installs them, where the libraries are missing or too old."""
    for name, first in NEEDED.items():
        least = ".".join(map(str, first))
        try:
            installed = version(name)
        except PackageNotFoundError as error:
            raise UsageError(f"hf: needs {name}>={least} (pip install 'moebench[hf]')") from error
        if _parse(installed) < first:
            raise UsageError(f"hf: needs {name}>={least}, and {installed} is installed (pip install 'moebench[hf]')")


def _parse(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
