"""Text, tables and tokenizers that no task can train on, each written by a function."""

import gzip
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = " ".join(random.Random(0).choices(["moe", "gate", "load", "token", "expert"], k=400))


@dataclass(frozen=True, kw_only=True)
class BadData:
    """A folder of data and the options with which it is read, and what the message must name."""

    name: str
    task: str
    expected: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files below the folder, by relative path."""
    path: str = ""
    """What task.data.path names below the folder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of task.data."""
    then: Callable[[Path], object] = lambda folder: None
    """Called with the folder after the files are written."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files; return the configuration of the task."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        self.then(folder)
        options = {
            key: str(folder / value[2:]) if str(value).startswith("@/") else value
            for key, value in self.options.items()
        }
        return {"name": self.task, "data": {"path": str(folder / self.path), **options}}


def texts(content: bytes, number: int = 6) -> dict[str, bytes]:
    """Return good documents, of which the last is `content`."""
    return {f"d{index}.txt": TEXT.encode() for index in range(number - 1)} | {"bad.txt": content}


def lines(*rows: Any) -> bytes:
    """Return JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns: Any) -> bytes:
    """Return a parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def damage(content: bytes, start: int, length: int = 40) -> bytes:
    """Return the content with some bytes overwritten."""
    return content[:start] + b"\xff" * length + content[start + length :]


def tokenizer(**changes: Any) -> bytes:
    """Return a small tokenizer.json, with changes to its model."""
    model = {"type": "WordLevel", "vocab": {"moe": 0, "[UNK]": 1}, "unk_token": "[UNK]"} | changes
    parts: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return json.dumps(
        {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}} | parts | {"model": model}
    ).encode()


ROW = {"text": TEXT}
TABLE = parquet(text=[TEXT] * 8)
BOTH = {"d.jsonl": lines(*[ROW] * 8)}


def text_case(name: str, expected: str, files: Mapping[str, bytes], **rest: Any) -> BadData:
    return BadData(name=f"text_{name}", task="language", expected=expected, files=files, **rest)


def table_case(name: str, expected: str, file: str, content: bytes, **rest: Any) -> BadData:
    return BadData(name=f"table_{name}", task="language", expected=expected, files={file: content}, path=file, **rest)


def tokenizer_case(name: str, expected: str, content: bytes) -> BadData:
    files = {f"d/{index}.txt": f"{index} {TEXT}".encode() for index in range(6)} | {"t/tokenizer.json": content}
    options = {"tokenizer": "@/t/tokenizer.json"}
    case = BadData(name=f"tokenizer_{name}", task="language", expected=expected, files=files, options=options)
    return replace(case, path="d")


TEXT_CASES: tuple[BadData, ...] = (
    text_case("no_files", "has no file that ends in", {"readme.md": b"x"}),
    text_case("latin1", "'bad.txt' cannot be read: it is not UTF-8", texts("täglich ".encode("latin-1") * 50)),
    text_case("utf16", "not UTF-8", texts(TEXT.encode("utf-16"))),
    text_case("utf16_no_mark", "has NUL bytes", texts(TEXT.encode("utf-16-le"))),
    text_case("nul", "has NUL bytes", texts(b"a\0b" * 50)),
    text_case("surrogate", "not UTF-8", texts(b"\xed\xa0\x80" * 50)),
    text_case("cut_gzip", "cannot be read", {"d.txt.gz": gzip.compress(TEXT.encode())[:-9]}),
    text_case("no_gzip", "cannot be read", {"d.txt.gz": TEXT.encode()}),
    text_case("damaged_gzip", "cannot be read", {"d.txt.gz": damage(gzip.compress(TEXT.encode()), 30, 9)}),
    text_case("all_empty", "has no text", {f"{n}.txt": b" \n" for n in range(6)}),
    text_case("two_kinds", "mixes", {"a.txt": b"x", "b.csv": b"text\nx\n"}),
    text_case("one_short_document", "", {"a.txt": b"hi"}),
    text_case("broken_link", "cannot be read", texts(b""), then=lambda f: (f / "x.txt").symlink_to(f / "nowhere")),
    text_case("stray_part", "belongs to no split", {"train/a.txt": b"x", "test/a.txt": b"x", "c.txt": b"x"}),
    text_case("no_train", "but no train", {"test/a.txt": b"x", "val/a.txt": b"x"}),
    text_case(
        "metric_name",
        "is the name of a metric",
        {f"{d}/{n}.txt": f"{d} {n} {TEXT}".encode() for n in range(6) for d in ("out_of_domain", "a")},
    ),
    text_case(
        "held_out_unknown",
        "is unknown",
        {f"a/{n}.txt": f"{n} {TEXT}".encode() for n in range(6)},
        options={"held_out_domains": ["nobody"]},
    ),
    text_case("held_out_all", "some of", {"a/1.txt": b"x"}, options={"held_out_domains": ["a"]}),
    text_case("no_bytes", "less than one byte", texts(b"x"), options={"max_bytes": 2}),
    table_case("empty_parquet_file", "cannot be read", "d.parquet", b""),
    table_case("text_as_parquet", "cannot be read", "d.parquet", TEXT.encode()),
    table_case("cut_parquet", "cannot be read", "d.parquet", TABLE[: len(TABLE) // 2]),
    table_case("damaged_pages", "", "d.parquet", damage(TABLE, 8, 60)),
    table_case("damaged_footer", "", "d.parquet", damage(TABLE, len(TABLE) - 60, 30)),
    table_case("footer_length", "cannot be read", "d.parquet", TABLE[:-8] + b"\xff\xff\xff\x7f" + b"PAR1"),
    table_case("no_column", "there is no column 'text'. Did you mean 'texts'?", "d.parquet", parquet(texts=[TEXT])),
    table_case("numbers", "is int, not text", "d.parquet", parquet(text=[1, 2, 3])),
    table_case("nulls", "is empty (null)", "d.parquet", parquet(text=[TEXT, None])),
    table_case("binary", "is bytes, not text", "d.parquet", parquet(text=[b"\xff\xfe"])),
    table_case("no_rows", "", "d.parquet", parquet(text=pa.array([], pa.string()))),
    table_case("domain_list", "not a name", "d.parquet", parquet(text=[TEXT] * 3, domain=[[1], [2], [3]])),
    table_case("domain_null", "is empty", "d.parquet", parquet(text=[TEXT] * 3, domain=["a", None, "b"])),
    table_case("empty_jsonl", "has no rows", "d.jsonl", b""),
    table_case("bad_line", "line 2", "d.jsonl", lines(ROW) + b"{]\n"),
    table_case("array_line", "not an object", "d.jsonl", lines(ROW, [1])),
    table_case("deep_json", "cannot be read", "d.json", b"[" * 100_000),
    table_case("json_object_of_lists", "", "d.json", json.dumps({"data": [ROW]}).encode()),
    table_case("half_character", "lone surrogate", "d.jsonl", b'{"text": "\\ud800"}\n'),
    table_case("csv_columns", "two columns 'text'", "d.csv", b"text,text\na,b\n"),
    table_case("csv_cells", "cells in line 2", "d.csv", b"text,domain\na,b,c\n"),
    table_case("csv_quote", "cannot be read", "d.csv", b'text\n"a\n'),
    table_case("csv_latin1", "not UTF-8", "d.csv", "text\nä\n".encode("latin-1")),
    table_case("arrow_dataset", "", "d/dataset_info.json", b"{}", then=lambda f: (f / "d" / "state.json").touch()),
    tokenizer_case("empty", "cannot be read", b""),
    tokenizer_case("list", "cannot be read", b"[1]"),
    tokenizer_case("binary", "cannot be read", b"\xff\xfe\0\0"),
    tokenizer_case("no_model", "cannot be read", b'{"version": "1.0"}'),
    tokenizer_case("unknown_model", "cannot be read", tokenizer(type="Neural")),
    tokenizer_case("huge_id", "has the id 1000000000", tokenizer(vocab={"moe": 0, "[UNK]": 1_000_000_000})),
    tokenizer_case("negative_id", "cannot be read", tokenizer(vocab={"moe": -1})),
    tokenizer_case("empty_vocabulary", "has no tokens", tokenizer(vocab={})),
    tokenizer_case("no_unknown", "cannot encode", tokenizer(vocab={"moe": 0})),
    tokenizer_case("text_ids", "cannot be read", tokenizer(vocab={"moe": "x"})),
    tokenizer_case("merges", "cannot be read", tokenizer(type="BPE", merges=["x y z"])),
)
