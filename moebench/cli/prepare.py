"""`moebench prepare`: text of any size to a folder of tokens that training memory-maps."""

import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebench.cli.options import Json, print_json
from moebench.errors import UsageError
from moebench.printable import print_text

if TYPE_CHECKING:
    from moebench.tasks.text.prepared.build import Outcome, Report
    from moebench.tasks.text.prepared.source import Progress

LINE_EVERY_S = 10.0
"""Seconds between lines of progress where there is no terminal."""
OPTION_OF = {"path": "DATA", "max_bytes": "--max-bytes"}
"""Key of task.data -> what this command calls it, where that is not the key with dashes."""


Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[DATA]...",
        help="Files, folders or patterns: .parquet, .jsonl, .json, .csv, .txt, also .gz and .zst; kinds can be mixed.",
    ),
]
TokenizerName = Annotated[
    str,
    typer.Option(help="bpe4096, bytes, a tokenizer.json or its folder, a hub name, or train:VOCAB for a new BPE."),
]
Out = Annotated[Path, typer.Option(help="Folder to write; pass it to runs as task.data.path.")]
Dataset = Annotated[str | None, typer.Option(help="Data set on the Hugging Face hub, instead of DATA.")]
HubConfig = Annotated[str | None, typer.Option(help="Configuration (subset) of the hub data set.")]
HubSplit = Annotated[str, typer.Option(help="Split of the hub data set to read; it is divided again.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub data set.")]
TextColumn = Annotated[str, typer.Option(help="Column with the text.")]
DomainColumn = Annotated[
    str, typer.Option(help="Column with the domain; empty: one domain, 'all', also for text files.")
]
GroupColumn = Annotated[str | None, typer.Option(help="Column with the group; a group is in one split.")]
SplitBy = Annotated[
    str, typer.Option(help="Unit that is in one split: document (or its group), file, or block of 64 KiB of text.")
]
Validation = Annotated[float, typer.Option(help="Share of the validation split, unless the source has one.")]
Test = Annotated[float, typer.Option(help="Share of the test split, unless the source has one.")]
KeepOverlap = Annotated[
    bool, typer.Option("--keep-overlap", help="Keep validation and test documents that are also in the training split.")
]
Workers = Annotated[
    int | None, typer.Option(help="Encoder threads; the result does not depend on it. Default: number of cores.")
]
ShardBytes = Annotated[int, typer.Option(help="Bytes of tokens per shard.")]
SampleBytes = Annotated[int, typer.Option(help="Bytes of training text that train:VOCAB is trained on.")]


def prepare(
    out: Out,
    sources: Sources = None,
    tokenizer: TokenizerName = "bpe4096",
    dataset: Dataset = None,
    config: HubConfig = None,
    split: HubSplit = "train",
    revision: Revision = None,
    text_column: TextColumn = "text",
    domain_column: DomainColumn = "domain",
    group_column: GroupColumn = None,
    split_by: SplitBy = "document",
    validation: Validation = 0.05,
    test: Test = 0.05,
    keep_overlap: KeepOverlap = False,
    workers: Workers = None,
    shard_bytes: ShardBytes = 256 << 20,
    sample_bytes: SampleBytes = 64 << 20,
    json: Json = False,
) -> None:
    """Encode text into a folder that any number of runs read at once, in memory that does not depend on its size.

    A call that was interrupted continues when it is given again. `moebench verify DIR` checks the result.
    """
    from moebench.cores import available_cores
    from moebench.tasks.text.prepared.build import build_folder
    from moebench.tasks.text.prepared.options import PrepareOptions, describe_source

    with _option_names():
        hub = None if dataset is None else {"dataset": dataset, "config": config, "split": split, "revision": revision}
        columns = {"text_column": text_column, "domain_column": domain_column or None, "group_column": group_column}
        options = PrepareOptions(
            sources=tuple(sources or ()),
            out=out.expanduser(),
            tokenizer=tokenizer,
            data=describe_source(sources or (), hub, columns),
            split_by=split_by,
            validation=validation,
            test=test,
            remove_overlap=not keep_overlap,
            shard_bytes=shard_bytes,
            sample_bytes=sample_bytes,
            workers=available_cores() if workers is None else workers,
        )
        begin_s = time.monotonic()
        with _display() as report:
            outcome = build_folder(options, report)
    _print_outcome(outcome, options.out, time.monotonic() - begin_s, json=json)


@contextmanager
def _option_names() -> Iterator[None]:
    """Name options of this command in errors, in place of the keys of an experiment."""
    try:
        yield
    except UsageError as error:
        text = re.sub(r"task\.data\.(\w+)", lambda m: OPTION_OF.get(m[1], f"--{m[1].replace('_', '-')}"), str(error))
        raise UsageError(text) from error


@contextmanager
def _display() -> "Iterator[Report]":
    """Yield a function that shows the progress: a bar on a terminal, else a line once in a while."""
    from moebench.cli.output import make_console

    console = make_console(stderr=True)
    if not console.is_terminal:
        yield _print_lines()
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[detail]}"))
    with Bars(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=60) as bars:
        bar = bars.add_task("", total=None, detail="")

        def show(stage: str, progress: "Progress") -> None:
            total = progress.num_bytes or None
            bars.update(bar, description=stage, total=total, completed=progress.bytes_done, detail=_describe(progress))

        yield show


def _print_lines() -> "Report":
    printed_at, printed_stage = time.monotonic(), ""

    def show(stage: str, progress: "Progress") -> None:
        nonlocal printed_at, printed_stage
        now = time.monotonic()
        if stage != printed_stage or now - printed_at >= LINE_EVERY_S:
            printed_at, printed_stage = now, stage
            print_text(f"{stage}: {_describe(progress)}", file=sys.stderr)

    return show


def _describe(progress: "Progress") -> str:
    documents = f"{progress.num_documents:,} documents"
    if not progress.num_bytes:
        return documents
    return f"{progress.bytes_done / 1e6:,.0f} of {progress.num_bytes / 1e6:,.0f} MB, {documents}"


def _print_outcome(outcome: "Outcome", out: Path, seconds: float, *, json: bool) -> None:
    manifest = outcome.manifest
    totals = manifest.totals()
    if json:
        values: dict[str, Any] = {"path": str(out), "digest": manifest.digest, "vocab_size": manifest.vocab_size}
        print_json(values | {"shards": len(manifest.shards), "domains": totals, "was_ready": outcome.was_ready})
        return
    by_split: dict[str, dict[str, int]] = {}
    for splits in totals.values():
        for name, counts in splits.items():
            by_split[name] = {key: by_split.get(name, {}).get(key, 0) + value for key, value in counts.items()}
    for name in ("train", "validation", "test"):
        counts = by_split[name]
        ratio = counts["bytes"] / max(counts["tokens"], 1)
        print_text(
            f"{name:<10} {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes"
            f" ({ratio:.2f} per token)"
        )
    kept = f", {outcome.num_kept} of them from an earlier call" if outcome.num_kept else ""
    state = "was ready" if outcome.was_ready else f"{len(manifest.shards)} shards{kept}, {seconds:.0f} s"
    print_text(f"{len(totals)} domains, {manifest.vocab_size:,} ids: {state}")
    print_text(f"use it: moebench run EXPERIMENT {shlex.quote(f'task.data.path={out}')}")
