"""Whether a model fits into memory, known before a weight is loaded."""

import psutil
import torch

from moebench.cores import available_memory
from moebench.errors import UsageError
from moebench.pretrained.folder import PretrainedFolder
from moebench.reporting.formatting import format_bytes

PROGRAM_BYTES = 700 * 2**20
"""Python, torch, transformers and the tables of a probe."""
LOADING_FACTOR = 1.15
"""Peak over the size of the weights while the experts of a layer are joined into one tensor."""


def require_memory(folder: PretrainedFolder, num_parameters: int, dtype: torch.dtype) -> None:
    """Raise UsageError for a model whose weights do not fit into the memory that is available now."""
    needed = int(num_parameters * dtype.itemsize * LOADING_FACTOR) + PROGRAM_BYTES
    available = min(available_memory(), psutil.virtual_memory().available)
    if needed > available:
        smaller = " (--dtype bfloat16 needs half)" if dtype.itemsize > 2 else ""
        raise UsageError(
            f"{folder.path}: needs about {format_bytes(needed)} for {num_parameters:,} parameters in"
            f" {str(dtype).removeprefix('torch.')}, and {format_bytes(available)} are available{smaller}"
        )
