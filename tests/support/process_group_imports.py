"""Preloaded by the fork server of `process_group`, so that its processes do not import the same modules each."""

import pytest  # noqa: F401
import support.mesh_cases
import support.separate_device
import support.task_data
import support.training_steps  # noqa: F401

import moebench.training.train  # noqa: F401
from moebench.registry import HOMES, get_registry

for kind in HOMES:
    get_registry(kind).names()
