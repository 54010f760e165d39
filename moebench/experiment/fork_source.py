"""What the server that processes are forked from loads; imported there alone."""

import atexit
import os

import moebench.experiment.worker  # noqa: F401 - so that its imports are there already

atexit.register(os._exit, 0)  # taking torch down again costs seconds on a busy machine, and there is nothing to save
