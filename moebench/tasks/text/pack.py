"""The embedded texts and the groups of their documents."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebench.errors import UsageError

_DATA = Path(__file__).parent.parent / "data"
PACKS = {"domains": _DATA / "text_domains.parquet", "corpus": _DATA / "text_corpus.parquet"}
"""Name in `task.data.pack` -> file of the embedded text."""
GROUP_COLUMN = {"domains": "doc_id", "corpus": "group"}
"""Column from which the group of a document is determined."""
SCRIPTURE = {
    **dict.fromkeys(("Samuel", "Kings", "Chronicles", "Isaiah"), "Samuel+Kings+Chronicles+Isaiah"),
    **dict.fromkeys(("Matthew", "Mark", "Luke"), "Matthew+Mark+Luke"),
    **dict.fromkeys(("Ezra", "Nehemiah"), "Ezra+Nehemiah"),
}
"""Book -> group of books that share long passages."""


def check_pack(pack: str, path: str | None, dataset: str | None) -> None:
    """Raise UsageError if an embedded text was chosen together with another source."""
    given = "path" if path is not None else "dataset"
    if pack != "domains" and (path, dataset) != (None, None):
        raise UsageError(f"task.data.pack: '{pack}' was given with task.data.{given}; set {given} to null")


def make_mixing_key(text: str) -> bytes:
    """Return a key that sorts documents into a fixed random order: the first rows of the corpus are of one package."""
    return hashlib.sha256(text.encode()).digest()


def find_embedded_group(pack: str, row: Mapping[str, Any]) -> str:
    """Return the group of a row of an embedded text."""
    return str(row["group"]) if pack == "corpus" else pack_group(row["domain"], row["doc_id"])


def pack_group(domain: str, doc_id: str) -> str:
    """Return the group of an embedded document: documents that would leak text if they were in different splits."""
    if domain in ("code", "docs"):  # the documentation of a module quotes the module
        name = doc_id.split("/")[0] if domain == "code" else doc_id.rsplit("/", 1)[-1]
        module = re.match(r"[A-Za-z_]\w*", name)
        return f"python/{module.group() if module else name}"
    if domain == "speeches":  # 1995_william_j_clinton_d -> william_j_clinton
        return f"speeches/{'_'.join(doc_id.split('_')[1:-1])}"
    if domain == "novels":  # austen-Emma-011 -> austen-Emma, moby-chapter_36 -> moby
        return f"novels/{'moby' if doc_id.startswith('moby') else doc_id.rpartition('-')[0]}"
    if domain == "scripture":  # kjv-2Kings -> Kings
        book = doc_id.removeprefix("kjv-")
        return f"scripture/{SCRIPTURE.get(book.lstrip('123'), book)}"
    return f"{domain}/{doc_id}"  # drama: one play; dictionary: one block of entries
