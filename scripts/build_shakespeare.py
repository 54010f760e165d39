"""Divide a text as nanoGPT divides Shakespeare's works: the first 90 % of the characters, and the rest.

    python scripts/build_shakespeare.py input.txt --out shakespeare
    moebench run experiments/shakespeare.yaml task.data.path=shakespeare

The published losses (github.com/karpathy/nanoGPT, README) are those of the last 10 % of tinyshakespeare, 1,115,394
characters, which is data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn; moebench does not contain it.
Nothing is selected by the last part, which is therefore both the validation and the test split.
"""

import argparse
from pathlib import Path

TRAINING_SHARE = 0.9


def divide(source: Path, folder: Path) -> None:
    """Write train.txt, validation.txt and test.txt into a folder."""
    text = source.read_text(encoding="utf-8")
    end = int(TRAINING_SHARE * len(text))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", text[:end]), ("validation", text[end:]), ("test", text[end:])):
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the text, UTF-8")
    parser.add_argument("--out", type=Path, default=Path("shakespeare"), help="folder to write (default: shakespeare)")
    arguments = parser.parse_args()
    divide(arguments.source, arguments.out)
