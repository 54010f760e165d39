"""Division of documents into training, validation and test splits, such that no group is in two of them."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moebench.errors import UsageError
from moebench.tasks.text.document import Document

SPLITS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
MIN_GROUPS = len(SPLITS)


def split_documents(
    documents: Sequence[Document], *, shares: tuple[float, float, float] = SHARES
) -> dict[str, list[Document]]:
    """Divide documents into train, validation and test by group; documents with equal texts are one group.

    Splits that the source has are kept, and missing ones are taken from train. A domain with fewer than three groups,
    each a single document (one text file, for example), is divided inside each document instead: the first 80 % are
    train, the next 10 % validation, the last 10 % test. Raises UsageError for a domain with fewer than three groups,
    one of several documents.
    """
    result: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        result[document.part].append(document)
    lacking = [name for name in SPLITS[1:] if not result[name]]
    if lacking:
        for name, members in _divide(result.pop("train"), shares).items():
            # The share of a split that the source has already is trained on.
            result.setdefault(name if name in lacking else "train", []).extend(members)
    return result


def _divide(documents: Sequence[Document], shares: tuple[float, float, float]) -> dict[str, list[Document]]:
    keys = [hashlib.sha256(document.text.encode()).hexdigest() for document in documents]
    names = merge_groups([(d.group, key) for d, key in zip(documents, keys, strict=True)])
    few = _few_groups(names, [document.domain for document in documents])
    result: dict[str, list[Document]] = {name: [] for name in SPLITS}
    grouped = [(d, name) for d, name in zip(documents, names, strict=True) if d.domain not in few]
    sizes = [len(document.text.encode()) for document, _ in grouped]
    assigned = iter(assign_splits([name for _, name in grouped], [d.domain for d, _ in grouped], sizes, shares=shares))
    for document in documents:
        if document.domain in few:
            for name, part in zip(SPLITS, cut(document.text, shares), strict=True):
                result[name].append(replace(document, text=part))
        else:
            result[next(assigned)].append(document)
    return result


def merge_groups(members: Sequence[tuple[str, str]]) -> list[str]:
    """Return a group name for each (group, content), equal for all that share either, directly or through others.

    A group that is not merged keeps its name.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for group, text in members:
        first, second = sorted((root(("group", group)), root(("text", text))))
        parent[second] = first
    return [root(("group", group))[1] for group, _ in members]


def assign_splits(
    groups: Sequence[str],
    domains: Sequence[str],
    sizes: Sequence[int],
    *,
    shares: tuple[float, float, float] = SHARES,
) -> list[str]:
    """Return "train", "validation" or "test" for each document, the same for every document of a group.

    Groups are assigned, largest first, to the split that lacks most of its share; the order of documents does not
    matter. Every domain gets a group in every split. Raises UsageError if that is impossible, as with fewer than three
    groups. Shares must be positive and add up to 1.
    """
    size = _sizes(groups, domains, sizes)
    totals = Counter[str]()
    for parts in size.values():
        totals.update(parts)
    waiting = Counter(domain for parts in size.values() for domain in parts)
    _require_groups(waiting)
    lacking = {(domain, i): share for domain in totals for i, share in enumerate(shares)}
    empty = {domain: set(range(len(SPLITS))) for domain in totals}
    split_of: dict[str, int] = {}
    for group in sorted(size, key=lambda g: (-sum(size[g].values()), _hash(g))):
        share = {domain: part / max(1, totals[domain]) for domain, part in size[group].items()}
        split = _choose_split(share, lacking, empty, waiting, shares)
        split_of[group] = split
        for domain, part in share.items():
            lacking[domain, split] -= part
            empty[domain].discard(split)
            waiting[domain] -= 1
    for domain, missing in sorted(empty.items()):
        if missing:
            raise UsageError(
                f"task.data.group_column: domain '{domain}' shares its groups with other domains, so "
                f"that {SPLITS[min(missing)]} has none; try finer groups or task.data.domain_column=null"
            )
    return [SPLITS[split_of[group]] for group in groups]


def cut(text: str, shares: tuple[float, float, float] = SHARES) -> tuple[str, str, str]:
    """Cut a text into three contiguous parts, at white space if some is near."""
    first = _near_space(text, round(len(text) * shares[0]))
    second = max(first, _near_space(text, round(len(text) * (shares[0] + shares[1]))))
    return text[:first], text[first:second], text[second:]


def _choose_split(
    share: Mapping[str, float],
    lacking: Mapping[tuple[str, int], float],
    empty: Mapping[str, set[int]],
    waiting: Mapping[str, int],
    shares: tuple[float, float, float],
) -> int:
    # The last groups of a domain must go to the splits that have none of its groups yet.
    required = [empty[d] for d in sorted(share) if empty[d] and waiting[d] <= len(empty[d])]
    allowed = set.intersection(*required) if required else set(range(len(SPLITS)))
    allowed = allowed or set.union(*required)

    def priority(split: int) -> tuple[bool, float]:
        fits = all(lacking[domain, split] > part - 1e-9 for domain, part in share.items())
        # If it fits, relative to the share, so that every split gets large and small groups.
        scale = shares[split] if fits else 1.0
        return fits, sum(part * lacking[domain, split] / scale for domain, part in sorted(share.items()))

    return max(sorted(allowed), key=priority)


def _sizes(groups: Sequence[str], domains: Sequence[str], sizes: Sequence[int]) -> dict[str, Counter[str]]:
    result: dict[str, Counter[str]] = defaultdict(Counter)
    for group, domain, size in zip(groups, domains, sizes, strict=True):
        result[group][domain] += size
    return result


def _few_groups(names: Sequence[str], domains: Sequence[str]) -> set[str]:
    members = Counter(names)
    groups = defaultdict(set)
    for name, domain in zip(names, domains, strict=True):
        groups[domain].add(name)
    few = {domain for domain, names_of in groups.items() if len(names_of) < MIN_GROUPS}
    # A group of several documents may not be divided: its domain is refused instead of cut.
    return {domain for domain in few if all(members[name] == 1 for name in groups[domain])}


def _require_groups(num_groups: Mapping[str, int]) -> None:
    for domain, count in sorted(num_groups.items()):
        if count < MIN_GROUPS:
            raise UsageError(
                f"task.data.group_column: domain '{domain}' has {count} group(s); train, validation and test "
                f"need {MIN_GROUPS} (equal ones count once). Use finer or more groups, a larger task.data.max_bytes, or"
                " task.data.domain_column=null"
            )


def _near_space(text: str, position: int) -> int:
    space = re.compile(r"\s").search(text, position, position + 200)
    return space.end() if space and space.end() < len(text) else position


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
