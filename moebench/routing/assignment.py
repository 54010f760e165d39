"""Who goes where when every expert must take the same share: balanced assignment of tokens to experts.

max Σ_t a_{t,e(t)}  subject to no expert having more than ceil(T/E) tokens. A problem on numbers alone: no gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from moebench.routing.ranking import merge_near_ties

Solver = Literal["auction", "exact", "sinkhorn"]

HASH_FACTOR = 0x5851F42D4C957F2D
"""Knuth's multiplier, of which the powers tell tuples of levels apart."""
LEAST_GAIN = 1e-9
"""What the lengths of paths grow by, at least, of affinities in 0 ... 1: more than fp64 rounds."""
STEP_SHARE = 1 / 200
"""A bid goes above the second best by this share of the range of affinities: the loss per token is no more."""
TEMPERATURE_SHARE = 1 / 50
"""Temperature of the Sinkhorn iterations that find the first prices, as a share of that range."""
SINKHORN_ITERATIONS = 20
LEAST_RANGE = 0.1
"""Of affinities: that of BASE's gate before training is five times as much."""
MAX_ROUNDS = 20_000
"""Affinities that are no numbers would keep the auction going for ever."""


@torch.no_grad()
def solve_balanced_assignment(affinity_TE: Tensor, solver: Solver) -> Tensor:
    """Return expert_T, the expert of each token, at most ceil(T/E) tokens for each: the best assignment there is.

    Solvers differ in time alone. exact: SciPy on the CPU. auction: an auction within T·range/200 of the optimum, then
    exchanges. sinkhorn: the same in fewer rounds, since the auction begins at the prices that entropic transport finds.

    The optimum and not something near it, because the path of an auction hangs on the last bits of the affinities:
    noise of 6e-8 moved tokens in 86 of 672 assignments of 512 tokens to 8 experts, and in none with the optimum. Which
    of several tokens that are alike goes where does not matter to the optimum: the earlier goes to the lower expert.
    """
    num_tokens, num_experts = affinity_TE.shape
    if num_experts == 1 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=affinity_TE.device)
    # In 0 ... 1, since the step and the temperature are shares; what is smaller than LEAST_RANGE may be noise alone.
    spread = (affinity_TE.max() - affinity_TE.min()).clamp(min=LEAST_RANGE)
    scaled_TE = (affinity_TE - affinity_TE.min()) / spread
    scaled_TE, level_TE = merge_near_ties(scaled_TE, dim=0)
    return in_order(_best(scaled_TE, solver), level_TE)


def _best(scaled_TE: Tensor, solver: Solver) -> Tensor:
    """Return the best assignment of affinities in 0 ... 1."""
    num_tokens, num_experts = scaled_TE.shape
    if solver == "exact":
        return exact(scaled_TE)
    # Places that no token needs go to tokens that do not care, so that in the end every place is taken: then, and
    # only then, the prices prove the bound whatever they began with.
    seats = -(-num_tokens // num_experts)
    scaled_RE = torch.nn.functional.pad(scaled_TE, (0, 0, 0, seats * num_experts - num_tokens))
    price_E = torch.zeros(num_experts, device=scaled_TE.device)
    if solver == "sinkhorn":
        price_E = entropic_prices(scaled_RE, TEMPERATURE_SHARE, SINKHORN_ITERATIONS)
    expert_R = auction(scaled_RE, seats, price_E, STEP_SHARE)
    return exchange(scaled_RE.double(), expert_R)[:num_tokens]


def in_order(expert_T: Tensor, level_TE: Tensor) -> Tensor:
    """Return the assignment with tokens that are alike (one level for each expert) in the order of their experts."""
    factor_E = HASH_FACTOR ** torch.arange(1, level_TE.shape[1] + 1, device=level_TE.device)  # modulo 2^64
    kind_T = (level_TE * factor_E).sum(1)
    by_expert_T = expert_T.argsort(stable=True)
    from_T = by_expert_T[kind_T[by_expert_T].argsort(stable=True)]
    return torch.empty_like(expert_T).scatter_(0, kind_T.argsort(stable=True), expert_T[from_T])


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
        value_RK, expert_RK = (affinity_RE[homeless_R] - price_E).topk(2, dim=1)
        best_R = expert_RK[:, 0]
        bid_RE[homeless_R, best_R] = price_E[best_R] + value_RK[:, 0] - value_RK[:, 1] + step
        kept_SE, row_SE = bid_RE.topk(seats, dim=0)
        price_E = torch.where(kept_SE[-1] == nobody, price_E, kept_SE[-1])
        bid_RE = torch.full_like(bid_RE, nobody).scatter(0, row_SE, kept_SE)
    raise ArithmeticError("the auction does not end: affinities that are not numbers")


def exchange(affinity_RE: Tensor, expert_R: Tensor) -> Tensor:
    """Return the best assignment with the same loads: rows change places in cycles while that gains anything.

    An assignment without a cycle of experts, each of which hands a row to the next, that gains is the optimum (Klein
    1967, "A primal method for minimal cost flows"). Of all rows of e the one that loses least goes to f.
    """
    expert_R = expert_R.clone()
    for _ in range(MAX_ROUNDS):
        gain_RE = affinity_RE - affinity_RE.gather(1, expert_R.unsqueeze(1))
        best_EE = gain_RE.new_full((affinity_RE.shape[1],) * 2, -torch.inf)
        best_EE.scatter_reduce_(0, expert_R.unsqueeze(1).expand_as(gain_RE), gain_RE, "amax")
        cycle = gaining_cycle(best_EE.cpu())
        if not cycle:
            return expert_R
        moves = zip(cycle, cycle[1:] + cycle[:1], strict=True)
        rows = [((expert_R == e) & (gain_RE[:, f] == best_EE[e, f])).int().argmax() for e, f in moves]
        expert_R[torch.stack(rows)] = torch.tensor(cycle[1:] + cycle[:1], device=expert_R.device)
    raise ArithmeticError("exchanges do not end: affinities that are not numbers")


def gaining_cycle(gain_EE: Tensor) -> list[int]:
    """Return nodes e, f, ... of a cycle whose gains sum to more than 0, or [] where there is none (Bellman-Ford)."""
    num = len(gain_EE)
    gain_EE = gain_EE.clone().fill_diagonal_(-torch.inf)
    length_E = gain_EE.new_zeros(num)
    before = []
    for _ in range(num):
        longer_E, from_E = (length_E.unsqueeze(1) + gain_EE).max(0)
        grows_E = longer_E > length_E + LEAST_GAIN
        if not grows_E.any():
            return []
        length_E = longer_E.where(grows_E, length_E)
        before.append(from_E.where(grows_E, torch.arange(num)).tolist())
    # A path that is longest with as many steps as there are nodes meets a node again, and without that cycle it would
    # have been found before.
    path = [int(grows_E.int().argmax())]
    for from_E in reversed(before):
        node = from_E[path[-1]]
        if node in path[:-1]:
            return [node, *path[: path.index(node) : -1]]
        if node != path[-1]:
            path.append(node)
    return []


@torch.no_grad()
def capped_plan(
    score_GTE: Tensor, seats_G: Tensor, cap: int, valid_GT1: Tensor | None, weight: float = 0.02, iterations: int = 100
) -> Tensor:
    """Return log A_GTE, A = argmax <S, A> + weight · H(A), columns of `seats`, rows at most `cap`, entries at most 1.

    Dykstra's algorithm: projections on the three sets in turn, each after what it took off the last time is put back
    (arXiv:2202.09368, section 3.3), in logarithms. The paper's weight of 1e-3 is far from converged after its 100
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
