"""`moebench export`: write the model of a run for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Plugins, Results, print_json
from moebench.printable import print_text


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The id of a run, or how it begins.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the model.")],
    format_: Annotated[
        str,
        typer.Option("--format", help="hf: for transformers; safetensors: any model, with the names of moebench."),
    ] = "hf",
    step: Annotated[
        int | None, typer.Option(help="Step of weights that train.keep_checkpoints kept. Default: the last one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace an exported model in the folder.")] = False,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Write the model of a run with its tokenizer and a model card to a folder.

    With --format hf it is one of the architectures of transformers, and its logits are those of the run; a model that
    none of them computes is refused, with the reason.
    """
    from moebench.analysis.exported_run import ExportOptions, export_run
    from moebench.analysis.trained_run import TrainedRun
    from moebench.reporting.formatting import format_bytes

    options = ExportOptions(out=out, format=format_, step=step, dtype=dtype, force=force)
    options.check()
    exported = export_run(TrainedRun.open(results, run, plugin or ()), options, results)
    if json:
        print_json(exported.to_dict())
        return
    size = f"{exported.num_parameters:,} parameters, {format_bytes(exported.num_bytes)}"
    print_text(f"{out}: {exported.model_type} of run {exported.run}, step {exported.step:,}, {size}")
    if exported.format == "hf":
        print_text(f'load it: transformers.AutoModelForCausalLM.from_pretrained("{out}")')
    print_text(f"continue from it: init.from=hf:{out} (settings that fit: moebench show hf:{out})")
