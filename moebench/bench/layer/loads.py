"""Inputs for which every softmax top-k gate sends a given number of tokens to each expert."""

import torch
from torch import Generator, Tensor

from moebench.errors import UsageError

MARGIN = 1.0
"""Distance of the logits of the intended experts above all others: no library's rounding changes the choice."""


def expert_counts(load: str, num_tokens: int, num_experts: int, top_k: int) -> list[int]:
    """Return the number of assignments of each expert, T·k in total and at most T for each.

    balanced: equal, to within one where E does not divide T·k. zipf: in proportion to 1/e.
    """
    shares = [1.0 if load == "balanced" else 1.0 / (expert + 1) for expert in range(num_experts)]
    return _apportion(shares, num_tokens * top_k, limit=num_tokens)


def _apportion(shares: list[float], total: int, limit: int) -> list[int]:
    """Divide `total` by largest remainder; what exceeds `limit` goes to the other experts in proportion."""
    full: set[int] = set()
    while True:
        left = total - limit * len(full)
        open_sum = sum(share for index, share in enumerate(shares) if index not in full)
        exact = {i: left * share / open_sum for i, share in enumerate(shares) if i not in full}
        over = {index for index, value in exact.items() if value > limit}
        if not over:
            break
        full |= over
    counts = [limit if index in full else int(exact[index]) for index in range(len(shares))]
    by_remainder = sorted(exact, key=lambda index: (int(exact[index]) - exact[index], index))
    room = [index for index in by_remainder if counts[index] < limit]
    for index in room[: total - sum(counts)]:
        counts[index] += 1
    return counts


def assign_experts(counts: list[int], num_tokens: int, generator: Generator) -> Tensor:
    """Return expert_TK (int64): K different experts for each token, expert e exactly counts[e] times."""
    expert_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    # Column-major: a run of at most T equal experts has no token twice.
    expert_TK = expert_N.view(-1, num_tokens).t()
    return expert_TK[torch.randperm(num_tokens, generator=generator)].contiguous()


def build_input_for_loads(gate_ED: Tensor, expert_TK: Tensor, generator: Generator) -> Tensor:
    """Return x_TD: noise, moved so that the k highest logits of the gate are those of the intended experts.

    Raises UsageError when the gate cannot separate its experts (more experts than dimensions).
    """
    noise_TD = torch.randn(expert_TK.shape[0], gate_ED.shape[1], generator=generator, dtype=torch.float64)
    gate_ED = gate_ED.detach().cpu().double()
    logits_TE = noise_TD @ gate_ED.t()
    intended_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, expert_TK, True)
    highest_T = logits_TE.masked_fill(intended_TE, -torch.inf).amax(-1, keepdim=True)
    lowest_T = logits_TE.masked_fill(~intended_TE, torch.inf).amin(-1, keepdim=True)
    lift_T = (highest_T - lowest_T + MARGIN).clamp(min=0).nan_to_num(posinf=0.0, neginf=0.0)
    moved_TE = intended_TE * lift_T
    x_TD = noise_TD + moved_TE @ torch.linalg.pinv(gate_ED).t()
    chosen_TK = (x_TD @ gate_ED.t()).topk(expert_TK.shape[1], dim=-1).indices
    if not torch.equal(chosen_TK.sort(-1).values, expert_TK.sort(-1).values):
        experts, width = gate_ED.shape
        raise UsageError(
            f"--load: cannot be forced on E={experts} experts from inputs of d={width} (allowed: router, or d >= E)"
        )
    crafted_TD: Tensor = x_TD.float()
    return crafted_TD


def make_input(load: str, gate_ED: Tensor, num_tokens: int, top_k: int, generator: Generator) -> Tensor:
    """Return x_TD (fp32, on the CPU) for one kind of load; `router` is plain noise."""
    if load == "router":
        return torch.randn(num_tokens, gate_ED.shape[1], generator=generator)
    counts = expert_counts(load, num_tokens, gate_ED.shape[0], top_k)
    return build_input_for_loads(gate_ED, assign_experts(counts, num_tokens, generator), generator)
