"""Images from every source become the same entries and arrays; what is broken is named or counted."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moebench.errors import UsageError
from moebench.tasks.images.prepared import decode_entries, decode_image, prepare, split_images
from moebench.tasks.images.sources import ImageDataConfig, class_names, read_entries, source_digest


def png(value: int, size: tuple[int, int] = (4, 4), mode: str = "L") -> bytes:
    """Return a PNG of one grey."""
    file = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, number: int = 10) -> str:
    """Two classes: `cat` is dark, `dog` is bright."""
    for name, value in (("cat", 10), ("dog", 200)):
        (root / name).mkdir(parents=True)
        for index in range(number):
            (root / name / f"{index}.png").write_bytes(png(value + index))
    return str(root)


def test_the_embedded_sets_keep_their_test_split_and_have_their_own_classes(tmp_path: Path) -> None:
    entries = read_entries(ImageDataConfig(sources=["fashion", "mnist"]))
    assert Counter((entry.domain, entry.part) for entry in entries) == {
        ("fashion", "train"): 20000, ("fashion", "test"): 4000, ("mnist", "train"): 20000, ("mnist", "test"): 4000,
    }  # fmt: skip
    names = class_names(entries, ImageDataConfig(sources=["fashion", "mnist"]))
    assert len(names) == 20
    assert (names[0], names[7], names[12]) == ("fashion/t-shirt", "fashion/sneaker", "mnist/2")
    assert set(Counter(entry.label for entry in entries).values()) == {2400}


def test_folder_parquet_and_csv_give_the_same_arrays(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    files = sorted(Path(folder).rglob("*.png"))
    labels = [file.parent.name for file in files]
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    pq.write_table(pa.table({"picture": cells, "what": labels}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"picture": [c["bytes"] for c in cells], "what": labels}), tmp_path / "plain.parquet")
    lines = ["picture,what", *(f"folder/{file.relative_to(folder)},{file.parent.name}" for file in files)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    expected = prepare(ImageDataConfig(path=folder, size=4), tmp_path / "cache")
    assert expected.classes == ("cat", "dog")
    for name in ("a.parquet", "plain.parquet", "a.csv"):
        config = ImageDataConfig(path=str(tmp_path / name), size=4, image_column="picture", label_column="what")
        images = prepare(config, tmp_path / "cache")
        assert images.digest == expected.digest
        assert np.array_equal(images.train.pixel_NHWC, expected.train.pixel_NHWC)


def test_a_folder_with_train_and_test_keeps_them_apart(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "train")
    write_folder(tmp_path / "set" / "test", number=3)
    images = prepare(ImageDataConfig(path=str(tmp_path / "set"), size=4), tmp_path / "cache")
    assert images.classes == ("cat", "dog")
    assert [len(split.label_N) for split in (images.train, images.validation, images.test)] == [18, 2, 6]


def test_tables_called_train_and_test_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, number in (("train-0", 20), ("train-1", 20), ("test", 10)):
        table = pa.table({"image": [png(i) for i in range(number)], "label": [i % 2 for i in range(number)]})
        pq.write_table(table, tmp_path / "set" / f"{name}.parquet")
    images = prepare(ImageDataConfig(path=str(tmp_path / "set"), size=4), tmp_path / "cache")
    assert images.classes == ("0", "1")
    assert [len(split.label_N) for split in (images.train, images.validation, images.test)] == [36, 4, 10]


@pytest.mark.parametrize(
    ("colour", "size", "shape"), [("grey", 4, (4, 4, 1)), ("rgb", 4, (4, 4, 3)), ("rgb", 7, (7, 7, 3))]
)
def test_colour_and_size(colour: str, size: int, shape: tuple[int, ...]) -> None:
    assert decode_image(png(80, (9, 5)), size, colour).shape == shape
    red = decode_image(png(100, (9, 5), "RGB"), size, colour)
    # ITU-R 601: red counts 0.299 of its value in grey.
    assert (red[0, 0] == ([30] if colour == "grey" else [100, 0, 0])).all()


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).save(file, "PNG")
    with Image.open(io.BytesIO(file.getvalue())) as picture:
        assert picture.size == (3, 1)
    square = io.BytesIO()
    Image.fromarray(np.full((2, 2), 25600, dtype=np.uint16)).save(square, "PNG")
    assert decode_image(square.getvalue(), 2, "grey").tolist() == [[[100], [100]], [[100], [100]]]  # 25600 / 256


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("torn.png", png(3, (64, 64))[:60], "torn.png"),
        ("empty.png", b"", "it is empty"),
        ("text.png", b"no picture at all", "cannot identify"),
    ],
)
def test_a_broken_file_is_named_or_counted(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    folder = write_folder(tmp_path / "set")
    (tmp_path / "set" / "cat" / name).write_bytes(content)
    with pytest.raises(
        UsageError, match=rf"^task\.data\.path: 'cat/{name}' cannot be read .*skip_broken=true$"
    ) as caught:
        prepare(ImageDataConfig(path=folder, size=4), tmp_path / "cache")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    images = prepare(ImageDataConfig(path=folder, size=4, skip_broken=True), tmp_path / "cache")
    assert images.num_skipped == 1
    assert sum(len(split.label_N) for split in (images.train, images.validation, images.test)) == 20


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    table = pa.table({"image": [png(1), b"x", png(2)] * 4, "label": [0, 0, 1] * 4})
    pq.write_table(table, tmp_path / "a.parquet")
    config = ImageDataConfig(path=str(tmp_path / "a.parquet"), size=4)
    with pytest.raises(UsageError, match=r"'a\.parquet, row 1' cannot be read as an image"):
        decode_entries(read_entries(config), config)
    config = ImageDataConfig(path=str(tmp_path / "a.parquet"), size=4, skip_broken=True)
    broken = read_entries(config)[1:2]
    with pytest.raises(UsageError, match="none of the 1 images"):
        decode_entries(broken, config)


def test_empty_folders_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    (tmp_path / "set" / "bird").mkdir()
    with pytest.raises(UsageError, match=r"task\.data\.path: folder 'bird' has no images"):
        read_entries(ImageDataConfig(path=folder))
    assert len(read_entries(ImageDataConfig(path=folder, skip_broken=True))) == 20
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"'.*empty' has no images"):
        read_entries(ImageDataConfig(path=str(tmp_path / "empty")))
    with pytest.raises(UsageError, match=r"sett' does not exist\. Did you mean 'set'"):
        read_entries(ImageDataConfig(path=str(tmp_path / "sett")))
    (tmp_path / "set" / "loose.png").write_bytes(png(1))
    with pytest.raises(UsageError, match=r"'loose\.png' is in no class folder"):
        read_entries(ImageDataConfig(path=folder))
    with pytest.raises(UsageError, match=r"must be a folder of images, or end in \.parquet, \.csv"):
        read_entries(ImageDataConfig(path=str(tmp_path / "set" / "loose.png")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"image_column": "imag"},
            ["task.data.image_column", "'imag'", "'image'", "columns of a.parquet: image, label, kind"],
        ),
        ({"label_column": "lable"}, ["task.data.label_column", "'label'"]),
        ({"domain_column": "kinds"}, ["task.data.domain_column", "'kind'"]),
        ({"label_column": "kind"}, ["task.data.label_column", "a.parquet, row 1", "null"]),
    ],
)
def test_wrong_columns_are_refused_with_the_existing_ones(tmp_path: Path, options: dict, words: list[str]) -> None:
    table = pa.table({"image": [png(1), png(2)], "label": [0, 1], "kind": ["x", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError) as caught:
        read_entries(ImageDataConfig(path=str(tmp_path / "a.parquet"), **options))
    assert all(word in str(caught.value) for word in words), caught.value


def test_files_that_are_not_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match=r"task\.data\.path: .*bad\.parquet' cannot be read \(.*give .* with"):
        read_entries(ImageDataConfig(path=str(tmp_path / "bad.parquet")))
    (tmp_path / "mixed.csv").write_text("image,label\na.png,1\nb.png,x\n")
    pq.write_table(pa.table({"image": [png(1)], "label": [1.5]}), tmp_path / "float.parquet")
    with pytest.raises(UsageError, match=r"row 0 is float, not a whole number or name"):
        read_entries(ImageDataConfig(path=str(tmp_path / "float.parquet")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "a", "dataset": "b"}, ["task.data.path", "task.data.dataset"]),
        ({"test_split": "test"}, ["task.data.test_split", "task.data.dataset"]),
        ({"sources": ["fashon"]}, ["task.data.sources", "'fashon'", "Did you mean 'fashion'?"]),
        ({"sources": []}, ["task.data.sources"]),
        ({"sources": ["mnist", "mnist"]}, ["task.data.sources", "once"]),
        ({"size": 0}, ["task.data.size", "at least 1"]),
        ({"held_out_classes": [1, 1]}, ["task.data.held_out_classes"]),
    ],
)
def test_meaningless_configurations_are_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        ImageDataConfig(**options)
    assert all(word in str(caught.value) for word in words)


def test_a_named_data_set_is_read_like_a_file(hub: Path) -> None:
    for split, number in (("train", 20), ("test", 4)):
        cells = [{"bytes": png(i), "path": None} for i in range(number)]
        table = pa.table({"image": cells, "label": [i % 2 for i in range(number)]})
        pq.write_table(table, hub / f"{split}.parquet")
    config = ImageDataConfig(dataset="on/hub", test_split="test", size=4)
    assert Counter(entry.part for entry in read_entries(config)) == {"train": 20, "test": 4}
    _, pixel_NHWC = decode_entries(read_entries(config), config)
    assert pixel_NHWC[:20, 0, 0, 0].tolist() == list(range(20))
    with pytest.raises(
        UsageError, match=r"task\.data\.image_column: there is no column 'picture'\. columns of on/hub/train: image"
    ):
        read_entries(ImageDataConfig(dataset="on/hub", image_column="picture"))


def test_digest_is_of_the_content_and_not_of_the_location(tmp_path: Path) -> None:
    first, second = (write_folder(tmp_path / name) for name in ("a", "b"))
    digest = source_digest(ImageDataConfig(path=first))
    assert digest == source_digest(ImageDataConfig(path=second))
    assert digest != source_digest(ImageDataConfig(path=first, size=4))
    assert digest != source_digest(ImageDataConfig(path=first, colour="rgb"))
    assert digest == source_digest(ImageDataConfig(path=first, held_out_classes=[1]))
    (tmp_path / "b" / "cat" / "0.png").write_bytes(png(99))
    assert digest != source_digest(ImageDataConfig(path=second))


def test_digest_of_a_table_sees_the_images_that_it_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    (tmp_path / "a.csv").write_text("image,label\nset/cat/0.png,1\n")
    config = ImageDataConfig(path=str(tmp_path / "a.csv"))
    digest = source_digest(config)
    (tmp_path / "set" / "cat" / "0.png").write_bytes(png(99))
    assert source_digest(config) != digest
    (tmp_path / "set" / "cat" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"'a\.csv, row 0' cannot be read as an image \(.*No such file"):
        decode_entries(read_entries(config), config)


def test_splits_are_stratified_disjoint_and_complete() -> None:
    label_N = np.array([0] * 50 + [1] * 30 + [2] * 4)
    index_of = split_images(label_N, ["train"] * 84, ["a", "b", "c"], np.arange(84))
    assert sorted(np.concatenate([*index_of.values()]).tolist()) == list(range(84))
    counts = {name: np.bincount(label_N[index_N]).tolist() for name, index_N in index_of.items()}
    assert counts == {"train": [40, 24, 2], "validation": [5, 3, 1], "test": [5, 3, 1]}
    again = split_images(label_N, ["train"] * 84, ["a", "b", "c"], np.arange(84))
    assert all(np.array_equal(index_of[name], again[name]) for name in index_of)
    # With a test set of its own, none of it is trained on and nothing else is tested on.
    part_N = ["test" if index % 5 == 0 else "train" for index in range(84)]
    kept = split_images(label_N, part_N, ["a", "b", "c"], np.arange(84))
    assert sorted(kept["test"].tolist()) == list(range(0, 84, 5))
    assert np.bincount(label_N[kept["validation"]]).tolist() == [4, 2, 1]  # a tenth of 40, 24 and 3
    assert len(np.unique(np.concatenate([*kept.values()]))) == 84


def test_a_class_with_too_few_images_is_named() -> None:
    with pytest.raises(UsageError, match=r"class 'b' has 2 different images .* at least 3"):
        split_images(np.array([0] * 9 + [1] * 2), ["train"] * 11, ["a", "b"], np.arange(11))
