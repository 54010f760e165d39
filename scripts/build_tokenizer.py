"""Rebuild the embedded tokenizer (moebench/tasks/data/bpe4096.json) from the embedded text.

    python scripts/build_tokenizer.py --out new.json --compare moebench/tasks/data/bpe4096.json

It is trained on the training split alone: validation and test text, and held-out domains of an experiment that names
some, had no part in it only where they are in those splits. The result is the same on every machine with the same
version of `tokenizers`. The script prints how many bytes a token covers in the validation split of each domain; --path
measures the given text instead, such as the parquet file of another corpus with a column `domain`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from moebench.tasks.text.document import Document
from moebench.tasks.text.embedded_tokenizer import VOCAB_SIZE, train_bpe
from moebench.tasks.text.sources import TextDataConfig, load_documents
from moebench.tasks.text.splits import split_documents
from moebench.tasks.text.tokens import SubwordTokenizer


def train() -> str:
    """Return the file of the embedded tokenizer, as text."""
    documents = split_documents(load_documents(TextDataConfig(tokenizer="bytes")))["train"]
    return str(train_bpe((document.text for document in documents), VOCAB_SIZE).to_str()) + "\n"


def measure_bytes_per_token(text: str, documents: list[Document]) -> dict[str, tuple[int, int]]:
    """Return the bytes and tokens of each domain."""
    from tokenizers import Tokenizer

    tokenizer = SubwordTokenizer(Tokenizer.from_str(text))
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for document in documents:
        token_N, _ = tokenizer.encode(document.text)
        sizes[document.domain][0] += len(document.text.encode())
        sizes[document.domain][1] += len(token_N)
    return {domain: (size, count) for domain, (size, count) in sorted(sizes.items())}


def main() -> None:
    """Train, write, compare and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--compare", type=Path, help="file that must be the same")
    parser.add_argument("--path", help="text to measure, instead of the embedded one")
    options = parser.parse_args()
    text = train()
    options.out.write_text(text, encoding="utf-8")
    if options.compare and options.compare.read_text("utf-8") != text:
        raise SystemExit(f"{options.out} is not {options.compare}: another version of tokenizers, or other text")
    documents = split_documents(load_documents(TextDataConfig(path=options.path, tokenizer="bytes")))["validation"]
    for domain, (size, count) in measure_bytes_per_token(text, documents).items():
        print(f"{domain:16} {size / 1e6:8.2f} MB  {size / count:.2f} bytes per token")


if __name__ == "__main__":
    main()
