"""Text in several kinds of files, and folders that `moebench prepare` makes of it, in the process of the test."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebench.tasks.text.prepared.build import Outcome, build_folder
from moebench.tasks.text.prepared.options import PrepareOptions, describe_source
from moebench.tasks.text.prepared.source import open_source

WORDS = [f"{first}{second}" for first in "abcdeé日" for second in ("", "ing", "👍", "-\n", "ly ")]


def draw_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Return documents of two domains."""
    rng = random.Random(seed)
    return [
        {"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 60))), "domain": "xy"[index % 2]}
        for index in range(number)
    ]


def write_mixed(folder: Path, number: int = 120) -> Path:
    """Write documents as JSONL, packed JSONL, parquet, CSV-like text and packed text."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = draw_rows(number)
    third = number // 3
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:third])))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[third : 2 * third])).encode()))
    rest = rows[2 * third :]
    pq.write_table(pa.table({key: [row[key] for row in rest] for key in rest[0]}), folder / "c.parquet")
    (folder / "notes").mkdir()
    for index, row in enumerate(draw_rows(30, seed=1)):
        (folder / "notes" / f"{index}.txt").write_text(row["text"])
    with pa.CompressedOutputStream(str(folder / "notes" / "z.txt.zst"), "zstd") as file:
        file.write(rows[0]["text"].encode())
    return folder


def options_for(source: Path | str, out: Path, **changes: Any) -> PrepareOptions:
    """Return options with small shards."""
    columns = {name: changes.pop(name) for name in ("text_column", "domain_column", "group_column") if name in changes}
    values = {"tokenizer": "bytes", "validation": 0.2, "test": 0.2, "shard_bytes": 3000} | changes
    return PrepareOptions(sources=(str(source),), out=out, data=describe_source([str(source)], None, columns), **values)


def prepare_folder(source: Path | str, out: Path, **changes: Any) -> Outcome:
    """Prepare a folder, silently."""
    return build_folder(options_for(source, out, **changes), lambda stage, progress: None)


def read_blocks(options: PrepareOptions) -> list[Any]:
    """Return all blocks of a source."""
    from moebench.tasks.text.prepared.blocks import Position

    return list(open_source(options).blocks(Position()))


def folder_content(folder: Path) -> dict[str, bytes]:
    """Return the files of a prepared folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}
