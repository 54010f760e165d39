"""Preloaded by the fork server, which forks the workers; do not import it elsewhere."""

from moebench.launch.parent_death import exit_with_parent

exit_with_parent()

import moebench.launch.worker_process  # noqa: E402, F401 - after the line above, because it takes seconds
