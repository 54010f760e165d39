"""Images of many kinds, decoded as a viewer shows them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moebench.errors import UsageError
from moebench.tasks.images.prepared import PreparedImages, decode_image, prepare, split_images
from moebench.tasks.images.sources import ImageDataConfig

HALF = np.array([[40, 200]], dtype=np.uint8).repeat(8, 0).repeat(4, 1)  # 8 x 8: dark on the left


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def grey() -> Image.Image:
    return Image.fromarray(HALF)


def rotated_by_exif() -> bytes:
    """Dark at the top in the file; its orientation tag puts the right side of the file at the top."""
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees, counter-clockwise: what is on top goes to the left
    return encode(grey().transpose(Image.Transpose.ROTATE_270), "JPEG", exif=exif, quality=95)


def palette() -> Image.Image:
    picture = Image.frombytes("P", (8, 8), (HALF > 100).astype(np.uint8).tobytes())
    picture.putpalette([40, 40, 40, 200, 200, 200])
    return picture


def with_alpha(mode: str) -> Image.Image:
    """Black everywhere; 0.84 and 0.22 opaque: on white 40 and 200."""
    picture = Image.new("LA", (8, 8))
    picture.putdata([(0, 255 - int(value)) for value in HALF.flat])
    return picture.convert(mode)


def animation() -> bytes:
    return encode(grey(), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 255)])


KINDS: dict[str, Callable[[], bytes]] = {
    "grey": lambda: encode(grey()),
    "rgb": lambda: encode(grey().convert("RGB")),
    "two colours": lambda: encode(Image.fromarray(HALF > 100)),
    "palette": lambda: encode(palette()),
    "rgba": lambda: encode(with_alpha("RGBA")),
    "grey with alpha": lambda: encode(with_alpha("LA")),
    "transparent index": lambda: encode(palette(), transparency=1),
    "16 bits png": lambda: encode(Image.fromarray(HALF.astype(np.uint16) * 256)),
    "16 bits tiff": lambda: encode(Image.fromarray(HALF.astype(np.uint16) * 256), "TIFF"),
    "16 bits pgm": lambda: b"P5 8 8 65535\n" + (HALF.astype(np.uint16) * 256).astype(">u2").tobytes(),
    "cmyk": lambda: encode(grey().convert("RGB").convert("CMYK"), "TIFF"),
    "cmyk jpeg": lambda: encode(grey().convert("RGB").convert("CMYK"), "JPEG", quality=95),
    "animation": animation,
    "webp": lambda: encode(grey().convert("RGB"), "WEBP", lossless=True),
    "bmp": lambda: encode(grey(), "BMP"),
    "turned by the camera": rotated_by_exif,
    "a text inside": lambda: encode(grey(), pnginfo=_text()),
}


def _text() -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", "x" * 1000)
    return info


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_format_decodes_to_the_same_pixels(kind: str) -> None:
    expected = HALF.astype(int)
    if kind == "two colours":
        expected = np.where(HALF > 100, 255, 0)
    if kind == "transparent index":
        expected = np.where(HALF > 100, 255, HALF).astype(int)  # the bright half is transparent: white
    for colour in ("grey", "rgb"):
        pixels = decode_image(KINDS[kind](), 8, colour).astype(int)
        assert np.abs(pixels - expected[:, :, None]).max() <= 4, pixels[:, :, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 4)])
def test_every_size_of_image(size: tuple[int, int]) -> None:
    assert (decode_image(encode(Image.new("L", size, 77)), 8, "grey") == 77).all()


def test_downscaling_averages_pixels() -> None:
    checks = (np.indices((256, 256)).sum(0) % 2 * 254).astype(np.uint8)
    assert np.abs(decode_image(encode(Image.fromarray(checks)), 8, "grey").astype(int) - 127).max() <= 2


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "32 bits"),
        (encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "32 bits"),
        (encode(grey(), "TIFF")[:-60], None),
        (encode(grey(), "GIF")[:12], None),
        (encode(grey().convert("RGB"), "WEBP")[:40], None),
        (b"", "empty"),
        (None, "empty"),
        ([1, 2, 3], "list"),
        (17, "int"),
    ],
)
def test_broken_images_are_named_or_counted(
    tmp_path: Path, image: Any, words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match=words):
        decode_image(image, 8, "grey")
    if isinstance(image, bytes):
        table = pa.table({"image": [png(i) for i in range(20)] + [image], "label": [i % 2 for i in range(21)]})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UsageError, match=r"'a\.parquet, row 20' cannot be read as an image .*skip_broken=true$"):
            of(tmp_path / "a.parquet")
        assert of(tmp_path / "a.parquet", skip_broken=True).num_skipped == 1
        assert capsys.readouterr().err == "task.data: 1 of 21 images cannot be read and are skipped\n"


def png(value: int) -> bytes:
    return encode(Image.new("L", (4, 4), value))


def of(path: Path, **options: Any) -> PreparedImages:
    cache = path.parent / "cache"
    return prepare(ImageDataConfig(path=str(path), size=4, **options), cache)


def write(root: Path, *names: str, value: int = 0) -> None:
    """Write pictures of one grey each, all different."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value + number))


def first_pixels(images: PreparedImages) -> dict[str, set[int]]:
    return {
        name: set(getattr(images, name).pixel_NHWC[:, 0, 0, 0].tolist()) for name in ("train", "validation", "test")
    }


@pytest.mark.parametrize("word", ["val", "validation", "valid", "dev"])
def test_three_splits_stay_as_given(tmp_path: Path, word: str) -> None:
    for place, part in enumerate(("train", word, "test")):
        write(tmp_path / "set" / part, "a/1.png", "a/2.png", "b/1.png", "b/2.png", value=10 * place)
    images = of(tmp_path / "set")
    assert images.classes == ("a", "b")
    assert first_pixels(images) == {"train": {0, 1, 2, 3}, "validation": {10, 11, 12, 13}, "test": {20, 21, 22, 23}}


def test_a_missing_part_is_taken_from_the_training_part(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train", *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    write(tmp_path / "set" / "val", "a/x.png", "b/x.png", value=100)
    splits = first_pixels(of(tmp_path / "set"))
    assert splits["validation"] == {100, 101}
    assert (len(splits["train"]), len(splits["test"])) == (18, 2)
    write(tmp_path / "one" / "train", *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    assert of(tmp_path / "one").classes == ("a", "b")  # a folder called train is no class


def test_tables_of_three_splits_keep_their_splits(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for place, part in enumerate(("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001")):
        table = pa.table({"image": [png(10 * place + i) for i in range(4)], "label": [0, 0, 1, 1]})
        pq.write_table(table, tmp_path / "set" / f"{part}.parquet")
    splits = first_pixels(of(tmp_path / "set"))
    assert splits == {"train": {0, 1, 2, 3}, "validation": {10, 11, 12, 13}, "test": {20, 21, 22, 23}}


def test_equal_images_are_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label, first in (("a", 0), ("b", 100)):
        for copy in range(4):
            write(tmp_path / "set", *(f"{label}/{i}-{copy}.png" for i in range(10)), value=first)
    images = of(tmp_path / "set")
    splits = first_pixels(images)
    assert not splits["train"] & splits["test"]
    assert not splits["train"] & splits["validation"]
    assert not splits["validation"] & splits["test"]
    assert [len(getattr(images, name).label_N) for name in splits] == [64, 8, 8]  # 4 of 40 are one picture, 4 times
    assert capsys.readouterr().err == ""


def test_a_test_set_that_is_trained_on_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "set" / "train", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    write(tmp_path / "set" / "val", "a/1.png", "b/1.png", value=50)
    write(tmp_path / "set" / "test", "a/1.png", "b/1.png", "b/2.png", value=3)  # 3 is b/2.png of the training part
    of(tmp_path / "set")
    assert capsys.readouterr().err == "task.data: 1 of 3 test images are also in the training split, pixel for pixel\n"


def test_few_different_images_leave_one_for_each_split() -> None:
    key_N = np.array([0] * 30 + [1, 2])
    index_of = split_images(np.zeros(32, int), ["train"] * 32, ["a"], key_N)
    assert sorted(len(set(key_N[index_N])) for index_N in index_of.values()) == [1, 1, 1]
    with pytest.raises(UsageError, match="class 'a' has 2 different images"):
        split_images(np.zeros(32, int), ["train"] * 32, ["a"], np.minimum(key_N, 1))


def test_classes_have_the_names_stored_in_the_file(tmp_path: Path) -> None:
    table = pa.table({"image": [png(i) for i in range(24)], "label": [2, 0, 1] * 8})
    features = {"label": {"_type": "ClassLabel", "names": ["zebra", "ant", "bee"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    images = of(tmp_path / "a.parquet")
    assert images.classes == ("ant", "bee", "zebra")
    pixel, label = images.train.pixel_NHWC[0, 0, 0, 0], images.train.label_N[0]
    assert images.classes[label] == ["bee", "zebra", "ant"][pixel % 3]


def test_classes_are_ordered_by_number_where_all_are(tmp_path: Path) -> None:
    write(tmp_path / "set", *(f"{c}/{i}.png" for c in range(11) for i in range(3)))
    assert of(tmp_path / "set").classes == tuple(str(c) for c in range(11))
    (tmp_path / "a.csv").write_text("image,label\n" + "".join(f"set/{c}/{i}.png,0{c}\n" for c in "12" for i in "012"))
    assert of(tmp_path / "a.csv").classes == ("01", "02")


def test_a_thousand_classes(tmp_path: Path) -> None:
    size = 3000
    pixels = [np.array([[i % 256, i // 256]], dtype=np.uint8) for i in range(size)]
    cells = [encode(Image.fromarray(pixel).resize((4, 4), Image.Resampling.NEAREST)) for pixel in pixels]
    pq.write_table(pa.table({"image": cells, "label": [i % 1000 for i in range(size)]}), tmp_path / "a.parquet")
    images = of(tmp_path / "a.parquet")
    assert [len(set(getattr(images, name).label_N)) for name in ("train", "validation", "test")] == [1000] * 3


def test_unusable_labels_are_explained(tmp_path: Path) -> None:
    write(tmp_path / "one", "a/1.png", "a/2.png", "a/3.png")
    with pytest.raises(UsageError, match="all images are of one class, 'a'; give one folder per class"):
        of(tmp_path / "one")
    write(tmp_path / "only" / "train", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    write(tmp_path / "only" / "test", "a/1.png", "c/1.png", value=9)
    with pytest.raises(UsageError, match="class 'c' has 0 different images to train on"):
        of(tmp_path / "only")
    table = {"image": [png(i) for i in range(9)], "label": [0, 1, 2] * 3, "kind": ["x"] * 8 + [None]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"task\.data\.domain_column: 'kind' of a\.parquet, row 8 is empty"):
        of(tmp_path / "a.parquet", domain_column="kind")


def test_a_broken_link_is_a_broken_image(tmp_path: Path) -> None:
    write(tmp_path / "set", *(f"{c}/{i}.png" for c in "ab" for i in range(5)))
    (tmp_path / "set" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"'a/gone\.png' cannot be read as an image"):
        of(tmp_path / "set")
    assert of(tmp_path / "set", skip_broken=True).num_skipped == 1
