"""A researcher's own data from the command line: odd names and kinds train, mistakes cost one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results
from support.tiny_experiment import tiny

CLASSES = ("C++", "日本", "a b")


def write_images(root: Path) -> None:
    """Three parts in folders, kinds and names mixed, a link to a folder, and a file that is no picture."""
    draw = np.random.default_rng(0)
    for part, number in (("train", 6), ("val", 2), ("test", 2)):
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                picture = Image.fromarray(draw.integers(0, 255, (9 + i, 12, 3), dtype=np.uint8))
                picture.save(folder / f"picture {i}.{('png', 'JPG', 'webp')[i % 3]}")
    (root / "train" / CLASSES[0] / "notes.doc").write_text("x")
    (root / "train" / CLASSES[0] / "torn.png").write_bytes(b"\x89PNG")


def write_others(root: Path) -> None:
    (root / "texts").mkdir()
    (root / "texts" / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (root / "blank").mkdir()
    (root / "blank" / "x.txt").write_text(" \n")
    (root / "one" / "cat").mkdir(parents=True)
    Image.new("L", (4, 4)).save(root / "one" / "cat" / "1.png")
    (root / "semicolons.csv").write_text("image;label\na.png;1\n")
    (root / "loose.wav").write_bytes(b"")
    (root / "words").mkdir()
    for i in range(3):
        soundfile.write(root / "words" / f"{i}.wav", np.sin(np.arange(900) / (i + 2)), 8000)
    pq.write_table(pa.table({"audio": [b"x"], "text": [["a"]]}), root / "list.parquet")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    cli = CommandLine(tmp_path_factory.mktemp("own"))
    write_images(cli.folder / "images")
    write_others(cli.folder)
    data = {"vision": {"size": 4, "path": "images"}, "speech": {}, "keyword": {}, "language": {}}
    for name, options in data.items():
        content: dict[str, Any] = tiny(seeds=[0], grid={"router": ["dense", "switch"]})
        content["base"]["task"] = {"name": name, "data": options} | ({"patch": 2} if name == "vision" else {})
        content["base"]["train"] |= {"steps": 3, "eval_every": 3}
        (cli.folder / f"{name}.yaml").write_text(json.dumps(content))
    yield cli
    cli.kill_leftovers()


def test_images_with_odd_names_train_and_omissions_are_reported(work: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm.train(work, "task.data.skip_broken=true", name="./vision.yaml")
    assert ended.code == 0, ended.err
    assert "task.data: 1 of 31 images cannot be read and are skipped" in ended.err
    assert "has 1 file(s) of other kinds, which are not read (1 .doc)" in ended.err
    result = Results(work.folder / "results").result("switch", 0)["metrics"]
    assert {name for name in result if name.startswith("class_")} == {
        f"class_accuracy/{c}" for c in ("C__", "__", "a b")
    }
    assert result["skipped_images"] == 1


MISTAKES = {
    "vision task.data.dataset=mnist task.data.path=null": ["task.data.dataset: 'mnist'", "task.data.path=..."],
    "vision": ["'train/C++/torn.png'", "skip_broken=true"],
    "vision task.data.path=one": ["all images are of one class, 'cat'"],
    "vision task.data.path=one/cat": ["'1.png' is in no class folder"],
    "vision task.data.path=semicolons.csv": ["no column 'image'", "columns of semicolons.csv: image;label"],
    "vision task.data.path=texts": ["has no images"],
    "language task.data.path=texts": ["'latin.txt'", "not UTF-8", "iconv"],
    "language task.data.path=blank": ["has no text"],
    "language task.data.path=loose.wav": ["must end in .parquet"],
    "language task.data.dataset=./texts": ["task.data.dataset", "'./texts' is a local path", "task.data.path=./texts"],
    "speech task.data.dataset=words": ["task.data.dataset", "'words' is a local path", "task.data.path=words"],
    "vision task.data.dataset=images task.data.path=null": ["'images' is a local path", "task.data.path=images"],
    "language task.data.dataset=a/b": ["task.data.dataset: 'a/b' cannot be read", "task.data.path=..."],
    "speech task.data.path=list.parquet": ["'text' of list.parquet, row 0 is list"],
    "speech task.data.path=loose.wav": ["'loose.wav' has no transcript"],
    "speech task.data.dataset=a/b": ["task.data.dataset: 'a/b' cannot be read", "task.data.path=..."],
    "keyword task.data.path=words": ["is in no folder that names its class"],
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_reported_in_one_line_and_leaves_no_files(
    work: CommandLine, warm: WarmCommandLine, command: str
) -> None:
    name, *overrides = command.split()
    ended = warm(work, "run", f"./{name}.yaml", *overrides, "--results", "refused", "--tracker", "none", timeout=60)
    assert ended.code == 2, ended.err[-1500:]
    assert ended.out == ""
    errors = [line for line in ended.err.splitlines() if not line.startswith(("task.data: ", "note: "))]
    assert len(errors) == 1, ended.err
    assert errors[0].startswith("error: ")
    assert all(word in errors[0] for word in MISTAKES[command]), ended.err
    left = [path.name for path in (work.folder / "refused").rglob("*") if not path.is_dir()]
    assert all(name.endswith(".lock") for name in left), left
