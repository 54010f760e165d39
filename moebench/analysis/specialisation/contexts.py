"""Top contexts: the places of a text where the gate of each expert is highest, with the token marked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebench.analysis.specialisation.information import Ints
from moebench.analysis.specialisation.routed_tokens import RoutedLayer, RoutedTokens, route_batches, select_batches
from moebench.analysis.specialisation.token_labels import VISIBLE, format_piece, read_token_ids
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError, build_unknown_error
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table
from moebench.tasks.language import TextTask
from moebench.tasks.task import Batch

NUM_CONTEXTS = 5
"""Contexts of each expert, no two from the same window of text."""
NUM_TOKENS = 6
"""Tokens that an expert gets most often."""
BEFORE, AFTER = 32, 16
"""Characters around the token."""
OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True, kw_only=True)
class Context:
    """One token in its text."""

    gate: float
    domain: str
    text: str
    """Text around the token, which is in brackets."""


@dataclass(frozen=True, kw_only=True)
class ExpertContexts:
    """What one expert of a layer takes."""

    expert: int
    share: float
    """Share of the assignments of the layer."""
    tokens: tuple[tuple[str, float], ...]
    """The most frequent tokens, with their shares of the expert's assignments."""
    contexts: tuple[Context, ...]
    """Highest gate first."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "expert": self.expert,
            "share": self.share,
            "tokens": [{"token": token, "share": share} for token, share in self.tokens],
            "contexts": [{"gate": c.gate, "domain": c.domain, "text": c.text} for c in self.contexts],
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenText:
    """The probed tokens as text."""

    id_T: Ints
    sequence_T: Ints
    domain_S: Sequence[str]
    """Domain of each sequence."""
    pieces: Sequence[bytes]
    """Bytes of each id."""

    def mark(self, token: int) -> str:
        """Return the text around a token, which is in brackets.

        Of a token that is a part of a character the whole character is in brackets, with its bytes behind it.
        """
        members = np.flatnonzero(self.sequence_T == self.sequence_T[token])
        before = b"".join(self.pieces[index] for index in self.id_T[members[members < token]])
        after = b"".join(self.pieces[index] for index in self.id_T[members[members > token]])
        return mark_token(before, self.pieces[self.id_T[token]], after)


def mark_token(before: bytes, piece: bytes, after: bytes) -> str:
    """Return the end of `before`, the token in brackets, and the beginning of `after`, on one line."""
    start, end = len(before), len(before) + len(piece)
    content = before + piece + after
    first, last = _expand_to_characters(content, start, end)
    cut = f" byte {piece.hex(' ')}" if (first, last) != (start, end) else ""
    marked = format_piece(content[first:last]) or "end of text"
    head = _to_line(content[:first])[-BEFORE:]
    return f"{head}{OPEN}{marked}{cut}{CLOSE}{_to_line(content[last:])[:AFTER]}"


def _expand_to_characters(content: bytes, start: int, end: int) -> tuple[int, int]:
    """Return the smallest range of whole UTF-8 characters around a range of bytes, at most three more on each side."""

    def continues(position: int) -> bool:
        return position < len(content) and content[position] & 0xC0 == 0x80

    first, last = start, end
    while first > max(start - 3, 0) and end > start and continues(first):
        first -= 1
    while last < min(end + 3, len(content)) and end > start and continues(last):
        last += 1
    return first, last


def _to_line(content: bytes) -> str:
    text = content.decode(errors="replace")
    return "".join(VISIBLE.get(c, c) if c != " " else c for c in text)


def build_context_report(run: TrainedRun, layer: str | None, max_tokens: int) -> Report:
    """Return the contexts of every expert of one layer, by default the last; raise UsageError for other data."""
    if not isinstance(run.task, TextTask):
        raise UsageError(f"--show contexts: the task {run.config.task.name} has no text (allowed: labels, gallery)")
    tokens, text, name = _route_text(run, layer, max_tokens)
    experts = [
        describe_expert(expert, tokens.layers[name], text)
        for expert in range(tokens.layers[name].assignments.num_experts)
    ]
    return Report(
        tables=tuple(build_context_table(expert, name) for expert in experts),
        notes=(
            f"the {NUM_CONTEXTS} highest gates of each expert, at most one in a window; {OPEN}{CLOSE} the token;"
            " ␣ space, ↵ end of line, � a character that the window cuts; domain: of the text",
        ),
        values={"layer": name, "experts": [expert.to_dict() for expert in experts]},
    )


def _route_text(run: TrainedRun, layer: str | None, max_tokens: int) -> tuple[RoutedTokens, TokenText, str]:
    """Route a part of the test split; return the tokens of the layer's stack, their text, and the layer's name."""
    assert isinstance(run.task, TextTask)
    chosen = select_batches(run.task, run.config.train.batch_size, max_tokens)
    stacks, _ = route_batches(run.load_model(), chosen.batches, run.config)
    stack_of = {name: stack for stack, tokens in stacks.items() for name in tokens.layers}
    if not stack_of:
        raise UsageError(f"run {run.folder.path.name}: has no experts")
    name = layer if layer is not None else [*stack_of][-1]
    if name not in stack_of:
        raise build_unknown_error("--layer", name, stack_of)
    batches = [batch for _, batch in chosen.batches]
    views = [batch.decoder_batch if stack_of[name] == "decoder" else batch for batch in batches]
    tokens = stacks[stack_of[name]]
    return tokens, _read_text(run.task, views, tokens), name


def _read_text(task: TextTask, batches: Sequence[Batch], tokens: RoutedTokens) -> TokenText:
    read = read_token_ids(task, batches)
    assert read is not None
    pieces = task.text.tokenizer.pieces()
    extra = [b"<mask or sentinel>"] * (task.vocab_size - len(pieces))
    domains = [task.domains[index] for batch in batches for index in batch.domain_B.tolist()]
    return TokenText(id_T=read[0], sequence_T=tokens.sequence_T, domain_S=domains, pieces=[*pieces, *extra])


def describe_expert(expert: int, layer: RoutedLayer, text: TokenText) -> ExpertContexts:
    """Return the share, the most frequent tokens and the top contexts of an expert."""
    assignments = layer.assignments
    mine_N = np.flatnonzero(assignments.expert_N == expert)
    share_N = np.ones(len(assignments.expert_N)) if assignments.share_N is None else assignments.share_N
    total = float(share_N[mine_N].sum())
    counts: Counter[int] = Counter()
    for index, share in zip(text.id_T[assignments.token_N[mine_N]].tolist(), share_N[mine_N].tolist(), strict=True):
        counts[index] += share
    frequent = counts.most_common(NUM_TOKENS)
    return ExpertContexts(
        expert=expert,
        share=total / max(float(share_N.sum()), 1e-300),
        tokens=tuple((format_piece(text.pieces[index]) or "end of text", count / total) for index, count in frequent),
        contexts=tuple(_pick_contexts(layer, mine_N, text)),
    )


def _pick_contexts(layer: RoutedLayer, mine_N: Ints, text: TokenText) -> list[Context]:
    order_N = mine_N[np.argsort(-layer.gate_N[mine_N], kind="stable")]
    contexts: list[Context] = []
    used: set[int] = set()
    for index in order_N:
        token = int(layer.assignments.token_N[index])
        sequence = int(text.sequence_T[token])
        if sequence in used:
            continue
        used.add(sequence)
        gate = float(layer.gate_N[index])
        contexts.append(Context(gate=gate, domain=text.domain_S[sequence], text=text.mark(token)))
        if len(contexts) == NUM_CONTEXTS:
            break
    return contexts


def build_context_table(expert: ExpertContexts, layer: str) -> Table:
    """Return the contexts of an expert, under its share and its most frequent tokens."""
    tokens = ", ".join(f"{token} {100 * share:.0f} %" for token, share in expert.tokens)
    return Table(
        title=f"Expert {expert.expert} of layer {layer}: {100 * expert.share:.1f} % of assignments; {tokens or 'none'}",
        columns=(
            Column(header="gate"),
            Column(header="domain", align="left"),
            Column(header="context", align="left", wraps=True),
        ),
        rows=tuple((f"{context.gate:.3f}", context.domain, context.text) for context in expert.contexts),
    )
