"""moebench: which router? Sparse-expert routing algorithms compared under matched conditions.

The Python API is imported on first use, so that `import moebench` and the command line stay light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebench.api import (
        MoE,
        MoERecord,
        UsageError,
        balance_loss,
        compare,
        load_experiment,
        load_model,
        load_runs,
        measure_fairness,
        measure_transfer,
        moe_layer,
        pool,
        run,
        to_text,
    )

__version__ = "0.1.0"
__all__ = [
    "MoE",
    "MoERecord",
    "UsageError",
    "balance_loss",
    "compare",
    "load_experiment",
    "load_model",
    "load_runs",
    "measure_fairness",
    "measure_transfer",
    "moe_layer",
    "pool",
    "run",
    "to_text",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moebench' has no attribute '{name}'")
    from moebench import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
