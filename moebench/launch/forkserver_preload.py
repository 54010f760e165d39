"""Preloaded by the fork server, which forks the workers; do not import it elsewhere."""

import atexit
import os
import warnings

from moebench.launch.descendants import adopt_orphans
from moebench.launch.parent_death import exit_with_parent

atexit.register(os._exit, 0)  # the interpreter's teardown of torch takes a second
exit_with_parent()
adopt_orphans()  # of workers that crash
warnings.filterwarnings("ignore", message="forkserver: waitpid returned unexpected pid")  # that of an orphan

import moebench.launch.worker_process  # noqa: E402, F401 - after the lines above, because it takes seconds
