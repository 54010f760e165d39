"""The part of a source that `task.data.max_bytes` allows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from moebench.errors import UsageError
from moebench.tasks.text.document import Document


def limit_bytes(documents: Iterable[Document], max_bytes: int | None, *, is_stream: bool) -> list[Document]:
    """Return documents of at most `max_bytes` of text: the first ones, or unless `is_stream` as much of each domain."""
    if max_bytes is None:
        return list(documents)
    if is_stream:
        return list(_take(documents, max_bytes))
    documents_of: dict[str, list[Document]] = {}
    for document in documents:
        documents_of.setdefault(document.domain, []).append(document)
    share = max_bytes // max(1, len(documents_of))
    if documents_of and not share:
        given = f"{max_bytes} for {len(documents_of)} domains"
        raise UsageError(f"task.data.max_bytes: {given} is less than one byte each; give more")
    return [kept for members in documents_of.values() for kept in _take_from_parts(members, share)]


def _take_from_parts(members: Sequence[Document], budget: int) -> Iterator[Document]:
    """Yield documents up to `budget` bytes, with the same share of every part, so that each part keeps some."""
    size: Counter[str] = Counter()
    for document in members:
        size[document.part] += len(document.text.encode())
    for part, part_bytes in size.items():
        part_budget = budget * part_bytes // size.total()
        yield from _take((document for document in members if document.part == part), part_budget)


def _take(documents: Iterable[Document], budget: int) -> Iterator[Document]:
    for document in documents:
        data = document.text.encode()
        if len(data) >= budget:  # cut the last document between characters
            text = data[:budget].decode(errors="ignore")
            if text:
                yield replace(document, text=text)
            return
        budget -= len(data)
        yield document
