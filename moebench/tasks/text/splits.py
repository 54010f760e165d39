"""Which text is trained on and which is held back, so that nothing of a group is on both sides."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moebench.errors import UsageError
from moebench.tasks.text.documents import Document

SPLITS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
MIN_GROUPS = len(SPLITS)


def split_documents(
    documents: Sequence[Document], *, shares: tuple[float, float, float] = SHARES
) -> dict[str, list[Document]]:
    """Divide documents into train, validation and test, by group; documents with equal texts are one group.

    What the source keeps apart as validation or test stays so, and what it lacks is taken from the rest. A domain of
    fewer than three groups that are single documents (one text file, say) is divided inside each document instead:
    its first 80 % train, the next 10 % validate, the last 10 % test. Raises `UsageError` for a domain of fewer than
    three groups of several documents.
    """
    result: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        result[document.part].append(document)
    lacking = [name for name in SPLITS[1:] if not result[name]]
    if lacking:
        for name, found in _divided(result.pop("train"), shares).items():
            # A split that the source brings needs no share: that part is trained on too.
            result.setdefault(name if name in lacking else "train", []).extend(found)
    return result


def _divided(documents: Sequence[Document], shares: tuple[float, float, float]) -> dict[str, list[Document]]:
    keys = [hashlib.sha256(document.text.encode()).hexdigest() for document in documents]
    names = groups_of([(d.group, key) for d, key in zip(documents, keys, strict=True)])
    few = _few_groups(names, [document.domain for document in documents])
    result: dict[str, list[Document]] = {name: [] for name in SPLITS}
    whole = [(d, name) for d, name in zip(documents, names, strict=True) if d.domain not in few]
    sizes = [len(document.text.encode()) for document, _ in whole]
    assigned = iter(assign_splits([name for _, name in whole], [d.domain for d, _ in whole], sizes, shares=shares))
    for document in documents:
        if document.domain in few:
            for name, part in zip(SPLITS, cut(document.text, shares), strict=True):
                result[name].append(replace(document, text=part))
        else:
            result[next(assigned)].append(document)
    return result


def groups_of(members: Sequence[tuple[str, str]]) -> list[str]:
    """Return one name for each (group, content), the same for all that share either, directly or by others.

    A group alone keeps its name.
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

    Groups go, largest first, to the split that lacks the largest part of its share; the row order does not
    matter. Every domain has something in every split. Raises `UsageError` where that cannot be, as with fewer
    than three groups. Shares must be positive and add up to 1.
    """
    size = _sizes(groups, domains, sizes)
    totals = Counter[str]()
    for parts in size.values():
        totals.update(parts)
    waiting = Counter(domain for parts in size.values() for domain in parts)
    _refuse_few(waiting)
    lacking = {(domain, i): share for domain in totals for i, share in enumerate(shares)}
    empty = {domain: set(range(len(SPLITS))) for domain in totals}
    split_of: dict[str, int] = {}
    for group in sorted(size, key=lambda g: (-sum(size[g].values()), _hash(g))):
        share = {domain: part / max(1, totals[domain]) for domain, part in size[group].items()}
        chosen = _choose(share, lacking, empty, waiting, shares)
        split_of[group] = chosen
        for domain, part in share.items():
            lacking[domain, chosen] -= part
            empty[domain].discard(chosen)
            waiting[domain] -= 1
    for domain, missing in sorted(empty.items()):
        if missing:
            raise UsageError(
                f"task.data.group_column: domain '{domain}' shares its groups with other domains, so "
                f"that {SPLITS[min(missing)]} has none; try finer groups or task.data.domain_column=null"
            )
    return [SPLITS[split_of[group]] for group in groups]


def cut(text: str, shares: tuple[float, float, float] = SHARES) -> tuple[str, str, str]:
    """Cut a text into three contiguous parts, at white space where some is near; joined they are the text."""
    first = _near_space(text, round(len(text) * shares[0]))
    second = max(first, _near_space(text, round(len(text) * (shares[0] + shares[1]))))
    return text[:first], text[first:second], text[second:]


def _choose(
    share: Mapping[str, float],
    lacking: Mapping[tuple[str, int], float],
    empty: Mapping[str, set[int]],
    waiting: Mapping[str, int],
    shares: tuple[float, float, float],
) -> int:
    # The last groups of a domain must go to the splits that have none of it yet.
    bound = [empty[d] for d in sorted(share) if empty[d] and waiting[d] <= len(empty[d])]
    allowed = set.intersection(*bound) if bound else set(range(len(SPLITS)))
    allowed = allowed or set.union(*bound)

    def need(split: int) -> tuple[bool, float]:
        fits = all(lacking[domain, split] > part - 1e-9 for domain, part in share.items())
        # Where it fits: what lacks relative to the share, so that every split has large and small groups.
        scale = shares[split] if fits else 1.0
        return fits, sum(part * lacking[domain, split] / scale for domain, part in sorted(share.items()))

    return max(sorted(allowed), key=need)


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
    few = {domain for domain, own in groups.items() if len(own) < MIN_GROUPS}
    # A group of several documents was asked not to be parted: that domain is refused, not cut.
    return {domain for domain in few if all(members[name] == 1 for name in groups[domain])}


def _refuse_few(groups_of: Mapping[str, int]) -> None:
    for domain, count in sorted(groups_of.items()):
        if count < MIN_GROUPS:
            raise UsageError(
                f"task.data.group_column: domain '{domain}' has {count} group(s); train, validation and test "
                f"need {MIN_GROUPS} (equal ones count once). Use finer groups, more, or task.data.domain_column=null"
            )


def _near_space(text: str, position: int) -> int:
    space = re.compile(r"\s").search(text, position, position + 200)
    return space.end() if space and space.end() < len(text) else position


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
