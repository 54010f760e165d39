"""`moebench probe`: what the experts of a finished run have learned to tell apart."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results
from moebench.errors import UsageError, unknown

if TYPE_CHECKING:
    from moebench.analysis.specialisation.report import LabelReport


def probe(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The id of a finished run, or how it begins (list runs).")],
    label: Annotated[
        str | None, typer.Option(help="One kind of label: domain, class, position ... (default: all that there are).")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="The layer shown in words (default: the one that knows most of the label).")
    ] = None,
    results: Results = DEFAULT_RESULTS,
    plot: Annotated[Path | None, typer.Option(help="Draw labels and experts of every layer to this PNG file.")] = None,
    json: Json = False,
) -> None:
    """Show which expert takes tokens of which label - domain, class, position, kind of token - on the test split.

    The number of a layer is I(label; expert) / H(label): 1 when the expert gives the label away, 0 when it says
    nothing. --json has the whole tables, assignments of each label to each expert, for every layer.
    """
    if plot and (plot.is_dir() or not plot.parent.is_dir()):
        raise UsageError(f"--plot {plot}: must be a file in a folder that exists")
    from moebench.analysis.specialisation.report import read_label_report

    report = read_label_report(results, run, label)
    for table in report.tables.values() if layer is not None else ():
        if layer not in table.layers:
            raise unknown("--layer", str(layer), table.layers)
    if plot:
        from moebench.analysis.specialisation.figures import draw_labels

        draw_labels(report.tables, path=plot, title=f"Who takes what: {report.arm}, seed {report.seed}")
    if json:
        import json as json_module

        print(json_module.dumps(report.to_dict(), ensure_ascii=False))
    else:
        _print(report, layer)


def _print(report: "LabelReport", layer: str | None) -> None:
    from moebench.analysis.specialisation.report import build_label_rows, find_best_layer
    from moebench.cli.output import print_table

    print(f"{report.arm}, seed {report.seed} ({report.id})")
    for kind, table in report.tables.items():
        shown = layer or find_best_layer(table)
        print(f"\n{kind}: " + ", ".join(f"layer {name} {known:.3f}" for name, known in table.information.items()))
        rows = build_label_rows(table, shown)
        heads = (kind, "share", "of what is known", f"experts of layer {shown}")
        print_table(heads, rows, right=heads[1:3], no_wrap=heads[1:3])
        present = int(table.layers[shown].any(1).sum())
        if len(rows) - 1 < present:
            print(f"{len(rows) - 1} of {present} labels: those of which the layer knows most")
