"""Preloaded by the fork server, which forks the workers; do not import it elsewhere."""

from moebench.launch.worker_process import exit_with_parent

exit_with_parent()
