"""`moebench probe`: which labels the experts of a finished run distinguish."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results, check_plot, print_json
from moebench.errors import unknown
from moebench.printable import print_text

if TYPE_CHECKING:
    from moebench.analysis.specialisation.report import LabelReport


def probe(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The id of a finished run, or a prefix of it (list runs).")],
    label: Annotated[
        str | None, typer.Option(help="One kind of label: domain, class, position ... Default: all.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="The layer in the tables. Default: the one with the most information.")
    ] = None,
    results: Results = DEFAULT_RESULTS,
    plot: Annotated[Path | None, typer.Option(help="Draw labels and experts of each layer (PNG, PDF, SVG).")] = None,
    json: Json = False,
) -> None:
    """Show which expert takes tokens of which label - domain, class, position, kind of token - on the test split.

    The number of a layer is I(label; expert) / H(label): 1 if the expert determines the label, 0 if it is
    independent of it. --json has the whole tables, assignments of each label to each expert, for every layer.
    """
    check_plot(plot)
    from moebench.analysis.specialisation.report import read_label_report

    report = read_label_report(results, run, label)
    for table in report.tables.values() if layer is not None else ():
        if layer not in table.layers:
            raise unknown("--layer", str(layer), table.layers)
    if plot:
        from moebench.analysis.specialisation.figures import draw_labels

        draw_labels(report.tables, path=plot, title=f"Who takes what: {report.arm}, seed {report.seed}")
    if json:
        print_json(report.to_dict(), indent=None)
    else:
        _print(report, layer)


def _print(report: "LabelReport", layer: str | None) -> None:
    from moebench.analysis.specialisation.report import build_label_rows, find_best_layer
    from moebench.cli.output import print_table

    print_text(f"{report.arm}, seed {report.seed} ({report.id})")
    for kind, table in report.tables.items():
        shown = layer or find_best_layer(table)
        print_text(f"\n{kind}: " + ", ".join(f"layer {name} {value:.3f}" for name, value in table.information.items()))
        rows = build_label_rows(table, shown)
        heads = (kind, "share", "of what is known", f"experts of layer {shown}")
        print_table(heads, rows, right=heads[1:3], no_wrap=heads[1:3])
        num_labels = int(table.layers[shown].any(1).sum())
        if len(rows) - 1 < num_labels:
            print_text(f"{len(rows) - 1} of {num_labels} labels: those about which the layer has the most information")
