"""The information of one run as a table."""

from moebench.analysis.specialisation.information import Information
from moebench.analysis.specialisation.layer_information import CONTROLS, LayerInformation
from moebench.analysis.specialisation.measure import RunInformation
from moebench.reporting.formatting import MISSING, format_number, format_p, format_signed
from moebench.reporting.table import Column, Table

NOTES = (
    "bits: I(label; expert), without the bias of a finite sample; chance: where 95 % of permuted labels are;",
    "of label: I / H(label), 1 if the expert determines the label; of routing: I / I(token; expert), 1 if the label"
    " determines the experts;",
    "given token: I(label; expert | token id), what vocabulary does not explain, – where it determines the label or its"
    " tokens repeat too seldom; untrained, hash, random: bits"
    " of the model before training, of experts by a hash of the token id, and of experts at random (docs/probing.md)",
)


def build_information_table(run: RunInformation, layer: str | None = None) -> Table:
    """Return a row for each kind of label and layer, or of one layer."""
    rows = [
        _build_row(kind, name, value)
        for kind, layers in run.kinds.items()
        for name, value in layers.items()
        if layer in (None, name)
    ]
    left_out = run.num_batches_left_out
    part = f"; {left_out} batches of the test split are left out (--tokens)" if left_out else ""
    headers = ("bits", "chance", "p", "of label", "of routing", "given token", *CONTROLS)
    # Without tokens there is neither a hash of them nor anything given them.
    used = [index for index in range(len(headers)) if any(row[index + 2] != MISSING for row in rows)]
    return Table(
        title=f"What experts say about labels, in bits: {run.num_tokens:,} tokens of the test split{part}",
        columns=(
            Column(header="label", align="left", is_key=True),
            Column(header="layer", align="left", is_key=True),
            *(Column(header=headers[index]) for index in used),
        ),
        rows=tuple((*row[:2], *(row[index + 2] for index in used)) for row in rows),
        notes=NOTES,
    )


def _build_row(kind: str, layer: str, value: LayerInformation) -> tuple[str, ...]:
    trained = value.trained
    low, high = trained.null_interval
    return (
        kind,
        layer,
        format_bits(trained),
        f"{format_signed(low, 4)} … {format_signed(high, 4)}",
        format_p(trained.p),
        format_number(trained.of_label, decimals=3),
        format_number(trained.of_routing, decimals=3),
        format_bits(value.given_token),
        *(format_bits(value.controls.get(name)) for name in CONTROLS),
    )


def format_bits(value: Information | None) -> str:
    """Return the corrected information with four decimals."""
    return MISSING if value is None else format_number(value.corrected, decimals=4)
