"""Who goes where when every expert must take the same share: balanced assignment of tokens to experts.

max Σ_t a_{t,e(t)}  subject to no expert having more than ceil(T/E) tokens. A problem on numbers alone: no gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from moebench.routing.ranking import QUANTUM, SCORE_QUANTUM, rank_top_k, rounded

Solver = Literal["auction", "exact", "sinkhorn"]

STEP_SHARE = 1 / 200
"""A bid goes above the second best by this share of the range of affinities: the loss per token is no more."""
TEMPERATURE_SHARE = 1 / 50
"""Temperature of the Sinkhorn iterations that find the first prices, as a share of that range."""
SINKHORN_ITERATIONS = 20
MAX_ROUNDS = 20_000
"""Affinities that are no numbers would keep the auction going for ever."""


@torch.no_grad()
def balanced_assignment(affinity_TE: Tensor, solver: Solver) -> Tensor:
    """Return expert_T, the expert of each token, at most ceil(T/E) tokens for each.

    exact: the best there is (SciPy on the CPU). auction: within T·range/200 of it. sinkhorn: the same bound in fewer
    rounds, since the auction begins at the prices that entropic transport finds. All of them solve the problem of
    affinities in whole numbers of range/16384: the noise of their last bits would decide between tokens that are
    alike, and move one more token with each that it decides. Tokens that are alike get places in their order.
    """
    num_tokens, num_experts = affinity_TE.shape
    if num_experts == 1 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=affinity_TE.device)
    spread = (affinity_TE.max() - affinity_TE.min()).clamp(min=1e-30)
    # In 0 ... 1: the step and the temperature are shares.
    scaled_TE = rounded((affinity_TE - affinity_TE.min()) / spread) * QUANTUM
    if solver == "exact":
        return exact(scaled_TE)
    # Places that no token needs go to tokens that do not care, so that in the end every place is taken: then, and
    # only then, the prices prove the bound whatever they began with.
    seats = -(-num_tokens // num_experts)
    scaled_RE = torch.nn.functional.pad(scaled_TE, (0, 0, 0, seats * num_experts - num_tokens))
    price_E = torch.zeros(num_experts, device=affinity_TE.device)
    if solver == "sinkhorn":
        price_E = entropic_prices(scaled_RE, TEMPERATURE_SHARE, SINKHORN_ITERATIONS)
    return auction(scaled_RE, seats, price_E, STEP_SHARE)[:num_tokens]


def exact(affinity_TE: Tensor) -> Tensor:
    """Solve the linear assignment problem with one column for each place of each expert."""
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_experts = affinity_TE.shape
    seats = -(-num_tokens // num_experts)
    cost_TS = -affinity_TE.double().repeat_interleave(seats, dim=1)
    _, seat_T = linear_sum_assignment(cost_TS.cpu().numpy())
    return torch.as_tensor(seat_T, device=affinity_TE.device) // seats


def entropic_prices(affinity_RE: Tensor, temperature: float, iterations: int) -> Tensor:
    """Return the price of each expert at which rows that spread by softmax((a - price) / temperature) load it evenly.

    The duals of entropic transport, by Sinkhorn's alternating scaling in logarithms: nothing can overflow.
    """
    scaled_RE = affinity_RE / temperature
    price_E = torch.zeros_like(scaled_RE[0])
    for _ in range(iterations):
        log_share_RE = (scaled_RE - price_E).log_softmax(1)
        price_E = price_E + log_share_RE.logsumexp(0)
        price_E = price_E - price_E.min()
    return temperature * price_E


def auction(affinity_RE: Tensor, seats: int, price_E: Tensor, step: float) -> Tensor:
    """Return the expert of each row when E experts with `seats` places each sell them to E·seats rows.

    All rows without a place bid at once (Bertsekas): for the expert with the most value at its price, as much as it
    may cost before the second best is better, and a step more. An expert keeps its highest bids; once it is full, its
    price is the lowest of them. Then nobody could gain more than a step elsewhere.
    """
    nobody = -torch.inf
    bid_RE = torch.full_like(affinity_RE, nobody)
    for _ in range(MAX_ROUNDS):
        homeless_R = (bid_RE.amax(1) == nobody).nonzero().squeeze(1)
        if homeless_R.numel() == 0:
            return bid_RE.argmax(1)
        value_RE = affinity_RE[homeless_R] - price_E
        value_RK, best_R = value_RE.topk(2, dim=1).values, value_RE.argmax(1)  # of equals, the first
        bid_RE[homeless_R, best_R] = price_E[best_R] + value_RK[:, 0] - value_RK[:, 1] + step
        row_SE = rank_top_k(bid_RE, seats, dim=0, quantum=SCORE_QUANTUM)
        kept_SE = bid_RE.gather(0, row_SE)
        price_E = torch.where(kept_SE[-1] == nobody, price_E, kept_SE[-1])
        bid_RE = torch.full_like(bid_RE, nobody).scatter(0, row_SE, kept_SE)
    raise ArithmeticError("the auction does not end: affinities that are not numbers")


@torch.no_grad()
def capped_plan(
    score_GTE: Tensor, seats_G: Tensor, cap: int, valid_GT1: Tensor | None, weight: float = 0.02, iterations: int = 100
) -> Tensor:
    """Return log A_GTE, A = argmax <S, A> + weight · H(A), columns of `seats`, rows at most `cap`, entries at most 1.

    Dykstra's algorithm: projections on the three sets in turn, each after what it took off the last time is put back
    (arXiv:2202.09368, section 4.1), in logarithms. The paper's weight of 1e-3 is far from converged after its 100
    iterations when scores are as large as those of a few experts; 0.02 is not, and fills more places. Where A is cut
    to 1 the logarithm before the cut is returned, so that nothing ties.
    """
    log_GTE = score_GTE / weight
    if valid_GT1 is not None:
        log_GTE = log_GTE.masked_fill(~valid_GT1, -1e30)
    log_seats_G11 = seats_G.clamp(min=1).log().view(-1, 1, 1)
    cap_log = torch.tensor(float(cap), device=score_GTE.device).log()
    over_GT1, over_GTE = torch.zeros_like(log_GTE[..., :1]), torch.zeros_like(log_GTE)
    for _ in range(iterations):
        log_GTE = log_GTE - log_GTE.logsumexp(1, keepdim=True) + log_seats_G11
        log_GTE = log_GTE + over_GT1
        over_GT1 = (log_GTE.logsumexp(2, keepdim=True) - cap_log).clamp(min=0)
        log_GTE = log_GTE - over_GT1 + over_GTE
        over_GTE = log_GTE.clamp(min=0)
        log_GTE = log_GTE - over_GTE
    return log_GTE + over_GTE
