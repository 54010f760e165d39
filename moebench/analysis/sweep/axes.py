"""The settings that a curve varies: keys of layout and router, and the values of each."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from moebench.errors import UsageError, build_unknown_error
from moebench.routing.router import ROUTERS
from moebench.schema import CellConfig
from moebench.training.trained_model import EVALUATION_SECTIONS

OPTION = "--vary"
EXAMPLE = "layout.capacity_factor_eval=0.5,1"
KEYS = (
    *("layout.capacity_factor_eval", "layout.capacity_rule", "layout.drop_order", "layout.overflow"),
    *("router.top_k", "router.top_p", "router.priority"),
)
"""Keys that an error names: they leave the parameters of every model as they are."""
ALIASES: Mapping[str, str] = {"capacity": "layout.capacity_factor_eval"}
"""Short names that are not the last part of their key."""
MAX_SETTINGS = 200
"""Combinations of values of all axes; each is an evaluation of every seed."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A configuration key and the values to evaluate."""

    key: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of the key, for headers and legends."""
        return self.key.split(".")[-1]


def parse_axes(texts: Sequence[str], configs: Sequence[CellConfig]) -> tuple[Axis, ...]:
    """Parse KEY=v1,v2,... or several of them, KEY=v1,v2,OTHER=w1, where a part with an equals sign begins an axis.

    A key without a dot is an alias, or the name of an option that the layouts or the routers of `configs` have. Raises
    UsageError for another form, an unknown or ambiguous key, and a key or a value that is named twice.
    """
    values: dict[str, list[str]] = {}
    for text in texts:
        key = ""
        for part in text.split(","):
            name, separator, value = part.partition("=") if "=" in part else (key, "=" if key else "", part)
            if not separator or not name.strip() or not value.strip():
                raise UsageError(f"{OPTION}: '{text}' is not of the form KEY=v1,v2,... ({EXAMPLE})")
            if "=" in part:
                key = _complete_key(name.strip(), configs)
                if key in values:
                    raise UsageError(f"{OPTION}: '{key}' is named twice")
                values[key] = []
            if value.strip() in values[key]:
                raise UsageError(f"{OPTION}: '{text}' names a value twice")
            values[key].append(value.strip())
    if not values:
        raise UsageError(f"{OPTION}: must name a key and its values, KEY=v1,v2,... ({EXAMPLE})")
    return tuple(Axis(key=key, values=tuple(of_key)) for key, of_key in values.items())


def _complete_key(name: str, configs: Sequence[CellConfig]) -> str:
    """Return the key with its section; as given where it has one. Raises UsageError where no cell has it."""
    section, separator, option = name.partition(".")
    if separator:
        if section in EVALUATION_SECTIONS and not any(
            hasattr(getattr(c, section), option.split(".")[0]) for c in configs
        ):
            raise build_unknown_error(f"{OPTION}: {section}", option, _list_names(configs, section))
        return name
    if name in ALIASES:
        return ALIASES[name]
    options = {
        f"{section}.{option.name}": option.name
        for config in configs
        for section in EVALUATION_SECTIONS
        for option in fields(getattr(config, section))
    }
    keys = sorted(key for key, option in options.items() if option == name)
    if not keys:
        raise build_unknown_error(
            OPTION, name, {*ALIASES, *(each for part in EVALUATION_SECTIONS for each in _list_names(configs, part))}
        )
    if len(keys) > 1:
        raise UsageError(f"{OPTION}: '{name}' is ambiguous (allowed: {', '.join(keys)})")
    return keys[0]


def _list_names(configs: Sequence[CellConfig], section: str) -> list[str]:
    """Return the options of a section that may vary and that a cell has."""
    keys = [key for key in KEYS if key.startswith(f"{section}.") and any(has_key(config, key) for config in configs)]
    return [key.removeprefix(f"{section}.") for key in keys]


def has_key(config: CellConfig, key: str) -> bool:
    """Return whether a cell has experts and the key."""
    section, _, option = key.partition(".")
    has_experts = not ROUTERS.get(config.router.name).item.form.is_dense
    return has_experts and section in EVALUATION_SECTIONS and hasattr(getattr(config, section), option.split(".")[0])


def list_settings(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Yield key -> value for each combination, the first axis innermost."""
    combinations = itertools.product(*(axis.values for axis in reversed(axes)))
    for combination in combinations:
        yield dict(zip((axis.key for axis in axes), reversed(combination), strict=True))


def check_number(axes: Sequence[Axis]) -> None:
    """Raise UsageError for more combinations than are evaluated in reasonable time."""
    number = sum(1 for _ in itertools.islice(list_settings(axes), MAX_SETTINGS + 1))
    if number > MAX_SETTINGS:
        raise UsageError(f"{OPTION}: names more than {MAX_SETTINGS} combinations of values")
