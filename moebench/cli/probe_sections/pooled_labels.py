"""Section `labels` of an experiment: what experts say about labels, over the seeds of each arm."""

from dataclasses import replace

from moebench.analysis.specialisation.across_seeds import probe_experiment
from moebench.analysis.specialisation.across_seeds_report import build_pooled_report
from moebench.analysis.specialisation.measure import ProbeOptions
from moebench.cli.output import make_console
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import UsageError, build_unknown_error
from moebench.experiment.files import find_experiment
from moebench.experiment.grid import expand
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return means over seeds with intervals, and contrasts of layers and of neighbours."""
    if request.plot:
        raise UsageError("--plot: the labels of an experiment have no figure; draw those of one run")
    if not request.num_permutations:
        raise UsageError("--permutations: 0 was given (allowed for an experiment: at least 1)")
    experiment = expand(
        find_experiment(request.subject), request.overrides, request.plugins, finished_in=request.results
    )
    if request.arm is not None:
        if request.arm not in experiment.arms:
            raise build_unknown_error("--arm", request.arm, experiment.arms)
        experiment = replace(experiment, cells=tuple(cell for cell in experiment.cells if cell.arm == request.arm))
    console = make_console(stderr=True)
    pooled = probe_experiment(
        experiment,
        request.results,
        ProbeOptions(max_tokens=request.max_tokens, num_permutations=request.num_permutations, label=request.label),
        lambda line: console.print(line, highlight=False, markup=False),
    )
    return build_pooled_report(pooled, request.layer)
