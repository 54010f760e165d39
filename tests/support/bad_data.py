"""Data that no task can train on: text, tables, tokenizers, images and sounds, each written by a function."""

import gzip
import io
import json
import os
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image
from support.sounds import encode_wav, tone

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


def picture(size: int = 8, mode: str = "L", kind: str = "PNG") -> bytes:
    """Return an encoded image of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, kind)
    return file.getvalue()


def pictures(bad: bytes, name: str = "a/bad.png") -> dict[str, bytes]:
    """Return two classes of good images, and `bad` among them."""
    good = {f"{label}/{index}.png": picture(8 + index) for label in "ab" for index in range(8)}
    return good | {name: bad}


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG whose header announces more pixels than its data have."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


WAV = encode_wav(tone(400))


def sounds(bad: bytes, name: str = "a/bad.wav") -> dict[str, bytes]:
    """Return two classes of good recordings, and `bad` among them."""
    good = {f"{label}/{i}.wav": encode_wav(tone(300 + 70 * i)) for label in "ab" for i in range(6)}
    return good | {name: bad}


def float_wav(value: float) -> bytes:
    """Return a recording of floats, of which one is `value`."""
    samples = tone(400)
    samples[100] = value
    return encode_wav(samples, subtype="DOUBLE" if abs(value) > 1e38 else "FLOAT")


def flac() -> bytes:
    """Return a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, tone(400), 8000, format="FLAC")
    return file.getvalue()


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


def image_case(name: str, expected: str, bad: bytes, file: str = "a/bad.png", **rest: Any) -> BadData:
    return BadData(name=f"image_{name}", task="vision", expected=expected, files=pictures(bad, file), **rest)


def sound_case(name: str, expected: str, bad: bytes, file: str = "a/bad.wav", **rest: Any) -> BadData:
    return BadData(name=f"sound_{name}", task="keyword", expected=expected, files=sounds(bad, file), **rest)


CASES: tuple[BadData, ...] = (
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
    image_case("empty", "is empty", b""),
    image_case("text", "cannot be read as an image", b"hello"),
    image_case("cut", "cannot be read as an image", picture()[:60]),
    image_case("damaged", "cannot be read as an image", damage(picture(), 30, 20)),
    image_case("bomb", "cannot be read as an image", huge_png(60_000, 60_000)),
    image_case("no_pixels", "cannot be read as an image", huge_png(0, 5)),
    image_case("few_pixels", "cannot be read as an image", huge_png(2000, 2000)),
    image_case("svg", "cannot be read as an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    image_case("postscript", "cannot be read as an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nquit\n"),
    image_case("no_class", "is in no class folder", picture(), "bad.png"),
    image_case("empty_class", "has no images", picture(), then=lambda f: (f / "empty").mkdir()),
    image_case("one_image", "", picture(), "c/1.png"),
    BadData(name="image_one_class", task="vision", expected="of one class", files={"a/1.png": picture()}),
    BadData(name="image_none", task="vision", expected="has no images", files={"a/readme.md": b"x"}),
    BadData(
        name="image_table_number",
        task="vision",
        expected="",
        path="t.parquet",
        files={"t.parquet": parquet(image=[1, 2], label=[0, 1])},
    ),
    BadData(
        name="image_table_label",
        task="vision",
        expected="label_column",
        path="t.parquet",
        files={"t.parquet": parquet(image=[picture()], label=[1.5])},
    ),
    BadData(
        name="image_table_device",
        task="vision",
        expected="not a plain file",
        path="t.csv",
        files={"t.csv": b"image,label\n/dev/zero,0\n/dev/zero,1\n"},
    ),
    BadData(
        name="image_table_pipe",
        task="vision",
        expected="not a plain file",
        path="t.csv",
        files={"t.csv": b"image,label\npipe,0\npipe,1\n"},
        then=lambda f: os.mkfifo(f / "pipe"),
    ),
    BadData(
        name="image_table_missing",
        task="vision",
        expected="",
        path="t.csv",
        files={"t.csv": b"image,label\nx.png,0\ny.png,1\n"},
    ),
    sound_case("empty", "cannot be used", b""),
    sound_case("text", "cannot be used", b"hello"),
    sound_case("cut_header", "cannot be used", WAV[:30]),
    sound_case("no_samples", "cannot be used", encode_wav(np.zeros(0))),
    sound_case("nan", "bad.wav", float_wav(float("nan"))),
    sound_case("infinite", "bad.wav", float_wav(float("inf"))),
    sound_case("too_loud", "bad.wav", float_wav(1e30)),
    sound_case("far_too_loud", "bad.wav", float_wav(1e300)),
    sound_case("rate_0", "cannot be used", WAV[:24] + struct.pack("<I", 0) + WAV[28:]),
    sound_case("channels_0", "cannot be used", WAV[:22] + struct.pack("<H", 0) + WAV[24:]),
    sound_case("cut_flac", "cannot be used", flac()[:200], "a/bad.flac"),
    sound_case("damaged_flac", "cannot be used", damage(flac(), 4, 30), "a/bad.flac"),
    sound_case("ogg_text", "cannot be used", b"OggS" + b"\0" * 40, "a/bad.ogg"),
    sound_case("mp3_text", "cannot be used", b"ID3" + b"\0" * 40, "a/bad.mp3"),
    sound_case("no_class", "is in no folder", WAV, "bad.wav"),
    sound_case("one_recording", "group(s) of different clips", WAV, "c/1.wav"),
    BadData(name="sound_no_transcript", task="speech", expected="has no transcript", files={"a.wav": WAV}),
    BadData(name="sound_latin1", task="speech", expected="not UTF-8", files={"a.wav": WAV, "a.txt": b"\xe4"}),
    BadData(name="sound_no_clips", task="speech", expected="has no clips", files={"a.wav": WAV, "a.txt": b" "}),
    BadData(
        name="sound_duration",
        task="speech",
        expected="not a number of seconds",
        path="m.csv",
        files={"a.wav": WAV, "m.csv": b"audio,text,duration\na.wav,x,minus\n"},
    ),
    BadData(
        name="sound_device",
        task="speech",
        expected="not a plain file",
        path="m.csv",
        files={"m.csv": b"audio,text\n/dev/zero,x\n"},
    ),
    BadData(
        name="sound_missing",
        task="speech",
        expected="cannot be used",
        path="m.csv",
        files={"m.csv": b"audio,text\nx.wav,x\n"},
    ),
)
