"""Tasks generated from the test split of a text: nothing is downloaded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from moebench.errors import UsageError
from moebench.seeds import make_generator
from moebench.tasks.text.pack import make_mixing_key
from moebench.tasks.text.windows import PreparedText

CLOZE, TEXT = "moebench_cloze", "moebench_text"
NUM_CHOICES = 4
CLOZE_ITEMS = 100
"""Items of a domain, at most."""
CONTEXT_CHARACTERS, CONTINUATION_CHARACTERS = 160, 32
TEXT_ITEMS, TEXT_CHARACTERS = 20, 1024
"""Passages of a domain, at most, and their length."""
MAX_DOCUMENTS = 2000
"""Documents of a domain that passages are taken from."""
MAX_TOKENS = 1 << 22
"""Tokens of a domain that are read for them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TestPassages:
    """Passages of the test split of a text, by domain; the same for every tokenizer that decodes the text."""

    __test__ = False  # not for pytest

    text: PreparedText

    @cached_property
    def documents(self) -> dict[str, list[str]]:
        """Domain -> its documents, in an order that does not depend on the tokenizer."""
        split, text = self.text.test, self.text
        documents: dict[str, list[str]] = {}
        for domain, start, end in split.list_domains():
            token_N = split.tokens.read(start, min(end, start + MAX_TOKENS))
            parts = np.split(token_N, np.flatnonzero(token_N == text.separator))[: MAX_DOCUMENTS + 1]
            contents = (text.tokenizer.decode_bytes(part[part != text.separator]) for part in parts)
            decoded = (content.decode(errors="replace") for content in contents)
            documents[text.domains[domain]] = sorted((each for each in decoded if each.strip()), key=make_mixing_key)
        return documents

    def build_cloze(self) -> list[dict[str, Any]]:
        """Return items: a context, and its true continuation among those of other passages of its domain."""
        items = []
        for domain, documents in self.documents.items():
            pairs = _cut_pairs(documents)
            generator = make_generator("moebench_cloze", domain)
            for number, (context, continuation) in enumerate(pairs):
                others = list(dict.fromkeys(other for _, other in pairs if other != continuation))
                if len(others) < NUM_CHOICES - 1:
                    break
                drawn = torch.randperm(len(others), generator=generator)[: NUM_CHOICES - 1].tolist()
                answer = int(torch.randint(NUM_CHOICES, (1,), generator=generator))
                choices = [others[index] for index in drawn]
                choices.insert(answer, continuation)
                item = {"domain": domain, "number": number, "context": context}
                items.append({**item, "choices": choices, "answer": answer})
        return _require_items(items, CLOZE)

    def build_text(self) -> list[dict[str, Any]]:
        """Return items: passages from the beginning of documents."""
        items = [
            {"domain": domain, "text": document[:TEXT_CHARACTERS]}
            for domain, documents in self.documents.items()
            for document in documents[:TEXT_ITEMS]
        ]
        return _require_items(items, TEXT)


def _cut_pairs(documents: list[str]) -> list[tuple[str, str]]:
    """Return contexts and continuations of about equal length, cut at spaces: documents take turns."""
    pieces = [_iter_pairs(document) for document in documents]
    pairs: list[tuple[str, str]] = []
    while pieces and len(pairs) < CLOZE_ITEMS:
        remaining = []
        for piece in pieces:
            pair = next(piece, None)
            if pair is not None and len(pairs) < CLOZE_ITEMS:
                pairs.append(pair)
                remaining.append(piece)
        pieces = remaining
    return pairs


def _iter_pairs(document: str) -> Iterator[tuple[str, str]]:
    start = 0
    while True:
        middle = document.find(" ", start + CONTEXT_CHARACTERS)
        end = document.find(" ", middle + CONTINUATION_CHARACTERS) if middle > 0 else -1
        if end < 0 or end - middle > 2 * CONTINUATION_CHARACTERS or middle - start > 2 * CONTEXT_CHARACTERS:
            return
        yield document[start:middle], document[middle:end]  # a continuation begins with its space
        start = end + 1


def _require_items(items: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    if not items:
        raise UsageError(f"{task}: the test split has no passage that is long enough")
    return items


PASSAGE_TASKS: Mapping[str, tuple[Mapping[str, Any], Callable[[TestPassages], list[dict[str, Any]]]]] = {
    CLOZE: (
        {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc_norm", "acc")
            ],
        },
        TestPassages.build_cloze,
    ),
    TEXT: (
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            ],
        },
        TestPassages.build_text,
    ),
}
"""Name -> settings in lm-eval's form, and the function that makes its items."""
