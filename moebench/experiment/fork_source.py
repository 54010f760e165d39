"""What the server that processes are forked from loads; imported there alone."""

from moebench.experiment.worker import die_with_parent

die_with_parent()
