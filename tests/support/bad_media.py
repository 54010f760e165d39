"""Images and sounds that no task can train on, each written by a function."""

import io
import os
import struct
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from support.bad_data import BadData, damage, parquet
from support.sounds import encode_wav, tone


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


def image_case(name: str, expected: str, bad: bytes, file: str = "a/bad.png", **rest: Any) -> BadData:
    return BadData(name=f"image_{name}", task="vision", expected=expected, files=pictures(bad, file), **rest)


def sound_case(name: str, expected: str, bad: bytes, file: str = "a/bad.wav", **rest: Any) -> BadData:
    return BadData(name=f"sound_{name}", task="keyword", expected=expected, files=sounds(bad, file), **rest)


MEDIA_CASES: tuple[BadData, ...] = (
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
