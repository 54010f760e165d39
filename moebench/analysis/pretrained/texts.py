"""The texts that a model is probed on: the embedded test split, local files, or a prepared folder."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.text.document import Document
from moebench.tasks.text.pack import make_mixing_key
from moebench.tasks.text.prepared.reader import is_prepared, open_prepared
from moebench.tasks.text.sources import TextDataConfig, load_documents
from moebench.tasks.text.splits import split_documents
from moebench.tasks.text.windows import PreparedText

BYTES_PER_TOKEN = 32
"""More text than this for each token is not read: tokens have fewer bytes, and all domains get their share."""


def read_texts(data: str | None, max_tokens: int, cache: Path) -> list[Document]:
    """Return documents by domain, in a fixed random order, so that the first ones are a sample of each domain.

    None is the test split of the embedded text. Of a file or folder of text all is read, or its test split if it has
    one; of a folder of `moebench prepare` the test split, decoded. Raises UsageError for what cannot be read.
    """
    if data is None:
        documents = split_documents(load_documents(TextDataConfig()))["test"]
    else:
        try:
            documents = _read_data(data, max_tokens * BYTES_PER_TOKEN, cache)
        except UsageError as error:
            raise UsageError(str(error).replace("task.data.path:", "--data:", 1)) from error
    return sorted(documents, key=lambda document: (document.domain, make_mixing_key(document.text)))


def _read_data(data: str, max_bytes: int, cache: Path) -> list[Document]:
    config = TextDataConfig(path=data)
    if is_prepared(config):
        return list(_decode_test_split(open_prepared(config, cache, sequence_length=1), max_bytes))
    documents = load_documents(TextDataConfig(path=data, max_bytes=max_bytes))
    return [document for document in documents if document.part == "test"] or documents


def _decode_test_split(text: PreparedText, max_bytes: int) -> Iterator[Document]:
    """Yield the documents at the beginning of each domain, up to an equal share of the bytes."""
    stream, domains = text.test.tokens, text.test.list_domains()
    for domain, start, end in domains:
        last = min(end, start + max_bytes // BYTES_PER_TOKEN // len(domains) + 1)
        token_N = stream.read(start, last)
        for part_N in np.split(token_N, np.flatnonzero(token_N == text.separator)):
            content = text.tokenizer.decode(part_N[part_N != text.separator])
            if content.strip():
                name = text.domains[domain]
                yield Document(text=content, domain=name, group=name)
