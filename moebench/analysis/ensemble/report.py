"""The report of an ensemble: each run, its mixtures, and the posterior of each run by domain."""

from moebench.analysis.ensemble.measure import EVEN, LABEL, POSTERIOR, EnsembleQuality
from moebench.reporting.formatting import MISSING, format_count, format_number, format_percent
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table
from moebench.tasks.domain_metrics import OUT_OF_DOMAIN

MEANINGS = {
    LABEL: "label: the run that was trained on the domain of the sequence.",
    POSTERIOR: "posterior: probabilities mixed by the posterior over runs given the earlier tokens of the sequence,"
    " from an even prior.",
    EVEN: "even: the mean of the probabilities.",
}


def build_report(ensemble: EnsembleQuality) -> Report:
    """Return the tables of quality and of posteriors."""
    names = {member.run.id: f"{member.run.id} {member.run.arm}" for member in ensemble.members}
    domains = list(ensemble.posterior)
    return Report(
        tables=(_quality_table(ensemble, names, domains), _posterior_table(ensemble, domains)),
        notes=(
            *(meaning for name, meaning in MEANINGS.items() if name in ensemble.metrics),
            "In domain is what any of the runs was trained on. FLOPs: forward, per token; a mixture executes all runs.",
        ),
        values={
            "metric": ensemble.metric,
            "runs": [
                {
                    "id": member.run.id,
                    "arm": member.run.arm,
                    "seed": member.run.seed,
                    "domains": list(member.domains),
                    "flops_per_token": member.flops_per_token,
                }
                for member in ensemble.members
            ],
            "metrics": ensemble.metrics,
            "posterior": ensemble.posterior,
        },
    )


def _quality_table(ensemble: EnsembleQuality, names: dict[str, str], domains: list[str]) -> Table:
    flops = {member.run.id: member.flops_per_token for member in ensemble.members}
    flops |= {POSTERIOR: sum(flops.values()), EVEN: sum(flops.values())}
    flops[LABEL] = sum(member.flops_per_token for member in ensemble.members) / len(ensemble.members)
    keys = [ensemble.metric, f"{ensemble.metric}/{OUT_OF_DOMAIN}", *(f"{ensemble.metric}/{each}" for each in domains)]
    rows = []
    for name, metrics in ensemble.metrics.items():
        cells = [format_number(metrics[key], 4) if key in metrics else MISSING for key in keys]
        rows.append((names.get(name, name), format_count(flops[name]), *cells))
    headers = ("FLOPs", "in domain", "out of domain", *domains)
    return Table(
        title=f"Ensemble of {len(names)} runs: {ensemble.metric.replace('_', ' ')} on the test split, lower is better",
        columns=(Column(header="run", align="left"), *(Column(header=header) for header in headers)),
        rows=tuple(rows),
    )


def _posterior_table(ensemble: EnsembleQuality, domains: list[str]) -> Table:
    members = [member.run.id for member in ensemble.members]
    return Table(
        title="Mean posterior of each run on the test text of a domain",
        columns=(Column(header="domain", align="left"), *(Column(header=run) for run in members)),
        rows=tuple((domain, *map(format_percent, ensemble.posterior[domain])) for domain in domains),
    )
