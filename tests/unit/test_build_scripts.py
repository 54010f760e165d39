"""The scripts that make the embedded images and recordings, on small files in the formats of their sources."""

import gzip
import io
import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
ONE_S = (3000 * np.sin(np.arange(8000) / 5)).astype(np.int16)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what runs a script with arguments."""

    def call(name: str, *arguments: object) -> None:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    return call


def write_idx(file: Path, array: np.ndarray) -> None:
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_images(folder: Path, suffix: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write a set of 30 and 20 images of two classes; return pixels and labels by the beginning of the name."""
    draw, sets = np.random.default_rng(0), {}
    for stem, number in (("train", 30), ("t10k", 20)):
        pixels, labels = draw.integers(0, 256, (number, 3, 4)), np.arange(number) % 2
        write_idx(folder / "deep" / f"{stem}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / "deep" / f"{stem}-labels-idx1-ubyte{suffix}", labels)
        sets[stem] = pixels, labels
    return sets


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_are_chosen_by_class_and_kept_in_order(tmp_path: Path, run: Any, suffix: str) -> None:
    sets = write_images(tmp_path / "source", suffix)
    run("build_images.py", "--mnist", tmp_path / "source", "--out", tmp_path / "out", "--per-class", 5, 3)
    for part, stem, number in (("train", "train", 5), ("test", "t10k", 3)):
        rows = pq.read_table(tmp_path / "out" / f"mnist_{part}.parquet").to_pylist()
        assert sorted(row["label"] for row in rows) == [0] * number + [1] * number
        pixels, labels = sets[stem]
        at = []
        for row in rows:
            seen = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            at.append(next(i for i, known in enumerate(pixels) if np.array_equal(known, seen)))
            assert labels[at[-1]] == row["label"]
        assert at == sorted(set(at))
    assert not (tmp_path / "out" / "fashion_train.parquet").exists()


def test_a_comparison_of_images_finds_a_changed_one(
    tmp_path: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = write_images(tmp_path / "source", "")
    arguments = ("build_images.py", "--fashion", tmp_path / "source", "--per-class", 15, 10, "--out")
    run(*arguments, tmp_path / "one")
    run(*arguments, tmp_path / "two", "--compare", tmp_path / "one")
    assert "fashion_train.parquet: 30 rows, 30 of them equal to the 30 rebuilt ones" in capsys.readouterr().out
    sets["train"][0][7, 0, 0] ^= 1
    write_idx(tmp_path / "source" / "deep" / "train-images-idx3-ubyte", sets["train"][0])
    with pytest.raises(SystemExit, match="not the same"):
        run(*arguments, tmp_path / "three", "--compare", tmp_path / "one")
    assert "fashion_train.parquet: 30 rows, 29 of them" in capsys.readouterr().out


def test_a_missing_or_foreign_file_of_images_is_named(tmp_path: Path, run: Any) -> None:
    write_images(tmp_path / "source", "")
    file = tmp_path / "source" / "deep" / "t10k-labels-idx1-ubyte"
    file.write_bytes(b"no IDX")
    arguments = ("build_images.py", "--mnist", tmp_path / "source", "--out", tmp_path / "out", "--per-class", 5, 3)
    with pytest.raises(SystemExit, match="t10k-labels-idx1-ubyte: not an IDX file"):
        run(*arguments)
    file.unlink()
    with pytest.raises(SystemExit, match="needs one file named t10k-labels-idx1-ubyte"):
        run(*arguments)


def write_prompts(folder: Path) -> None:
    """Write two languages; in each a prompt for every rule."""
    lines = ["; heading: of the file", "", "later: Once more: later.", "beep: [a beep]", "short: Oh", "long: So long"]
    lines += ["sub/first: Primero", "none:", "twice: one", "twice: two", "no-file: Nobody speaks."]
    for language, voice in (("it", "it_IT_m_Carlo"), ("en", "en_US_f_Allison")):
        text = folder / f"a-{language}" / "usr" / f"core-sounds-{language}.txt.gz"
        text.parent.mkdir(parents=True)
        text.write_bytes(gzip.compress(("\ufeff" + "\n".join(lines)).encode()))
        root = folder / f"a-{language}-wav" / "usr" / "sounds" / voice
        (root / "sub").mkdir(parents=True)
        for name in ("later", "beep", "sub/first", "none", "twice", "untold"):
            soundfile.write(root / f"{name}.wav", ONE_S, 8000)
        soundfile.write(root / "short.wav", ONE_S[:1900], 8000)
        soundfile.write(root / "long.wav", np.tile(ONE_S, 7), 8000)


def test_prompts_are_spoken_and_neither_short_nor_long(tmp_path: Path, run: Any) -> None:
    write_prompts(tmp_path / "source")
    run("build_speech.py", tmp_path / "source", "--out", tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    metadata = [(row["language"], row["prompt"], row["text"], row["license"]) for row in rows]
    assert metadata == [
        ("en", "later", "Once more: later.", "CC-BY-SA-3.0"),
        ("en", "sub/first", "Primero", "CC-BY-SA-3.0"),
        ("en", "twice", "two", "CC-BY-SA-3.0"),
        ("it", "later", "Once more: later.", "CC-BY-3.0"),
        ("it", "sub/first", "Primero", "CC-BY-3.0"),
        ("it", "twice", "two", "CC-BY-3.0"),
    ]
    assert rows[1]["audio"]["path"] == "en_sub_first.wav"
    assert rows[1]["speaker"] == "en_US_f_Allison"
    assert rows[1]["duration"] == 1.0
    heard, rate = soundfile.read(io.BytesIO(rows[1]["audio"]["bytes"]), dtype="int16")
    assert rate == 8000
    # GSM 06.10 is lossy, and fills its last block.
    assert np.corrcoef(heard[:8000], ONE_S)[0, 1] > 0.95


def test_a_comparison_of_prompts_finds_a_changed_one(
    tmp_path: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "source")
    run("build_speech.py", tmp_path / "source", "--out", tmp_path / "one.parquet")
    arguments = ("build_speech.py", tmp_path / "source", "--out", tmp_path / "two.parquet", "--compare")
    run(*arguments, tmp_path / "one.parquet")
    assert "6 rows, 6 of them equal to the 6 rebuilt ones" in capsys.readouterr().out
    soundfile.write(next((tmp_path / "source").rglob("it_IT_m_Carlo")) / "later.wav", ONE_S // 2, 8000)
    with pytest.raises(SystemExit, match="not the same"):
        run(*arguments, tmp_path / "one.parquet")
    assert "6 rows, 5 of them" in capsys.readouterr().out


def test_a_folder_without_packages_is_refused(tmp_path: Path, run: Any) -> None:
    with pytest.raises(SystemExit, match="no transcripts"):
        run("build_speech.py", tmp_path, "--out", tmp_path / "out.parquet")
    write_prompts(tmp_path / "source")
    voice = next((tmp_path / "source").rglob("it_IT_m_Carlo"))
    voice.rename(voice.with_name("xx_IT_m_Carlo"))
    with pytest.raises(SystemExit, match="one folder sounds/it_"):
        run("build_speech.py", tmp_path / "source", "--out", tmp_path / "out.parquet")


def test_shakespeare_is_divided_as_by_nanogpt(run: Any, tmp_path: Path) -> None:
    text = "".join(f"Line {number}: é\n" for number in range(100))
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    run("build_shakespeare.py", tmp_path / "input.txt", "--out", tmp_path / "out")
    parts = {file.stem: file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir()}
    assert parts["train"] + parts["test"] == text
    assert len(parts["train"]) == int(0.9 * len(text))
    assert parts["validation"] == parts["test"]
