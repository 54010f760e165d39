"""The options of `moebench probe`."""

from pathlib import Path
from typing import Annotated

import typer

from moebench.analysis.pretrained.options import PretrainedOptions
from moebench.cli.probe_sections.table import SECTIONS

DEFAULTS = PretrainedOptions()
MEANINGS = "; ".join(f"{name}: {section.meaning}" for name, section in SECTIONS.items())

Subject = Annotated[
    str,
    typer.Argument(
        metavar="RUN|EXPERIMENT|hf:PATH",
        help="Id of a finished run, or its beginning; an experiment, for all its runs; a folder of transformers.",
    ),
]
Show = Annotated[str, typer.Option(metavar="SECTION,...", help=f"{MEANINGS}.")]
Label = Annotated[
    str | None, typer.Option(help="One kind of label: domain, class, position, token_id ... Default: all.")
]
Layer = Annotated[str | None, typer.Option(help="Only this layer. Default: all, or the one with the most information.")]
Arm = Annotated[str | None, typer.Option(help="Only this arm of an experiment. Default: all.")]
Tokens = Annotated[
    int,
    typer.Option(
        min=1, help="Approximate number of positions of the test split (history, agreement, ablations: validation)."
    ),
]
Permutations = Annotated[
    int, typer.Option(min=0, help="Permutations of the labels; 0: only the tables that the run has stored.")
]
Data = Annotated[
    str | None, typer.Option(help="hf:PATH: text file or folder. Default: the test split of the embedded text.")
]
Dtype = Annotated[str, typer.Option(help="hf:PATH: float32, bfloat16, float16, or auto: as the weights are stored.")]
BatchSize = Annotated[int, typer.Option(min=1, help="hf:PATH: sequences per batch.")]
SequenceLength = Annotated[int, typer.Option(min=4, help="hf:PATH: largest number of tokens of a sequence.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the section (PNG, PDF, SVG).")]
