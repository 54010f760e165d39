"""What the server that processes are forked from loads; imported there alone."""

from moebench.launch.worker import die_with_parent

die_with_parent()
