"""Balanced assignment of tokens to experts: solvers for the linear assignment problem and its entropic relaxation.

max Σ_t a_{t,e(t)}  subject to at most ceil(T/E) tokens per expert. Nothing here has a gradient.

Shape letters beside the usual ones: R rows, the tokens and the dummy rows that fill all E·C slots.
"""

from typing import Literal

import torch
from torch import Tensor

from moebench.routing.ranking import merge_near_ties

Solver = Literal["auction", "exact", "sinkhorn"]

HASH_FACTOR = 0x5851F42D4C957F2D
"""Knuth's 64-bit multiplier: its powers hash the tuple of levels of a token."""
MIN_GAIN = 1e-9
"""Smallest increase of a path length that counts, for affinities in [0, 1]: above the rounding of fp64."""
STEP_SHARE = 1 / 200
"""Bid increment as a share of the range of affinities: an upper bound of the loss per token."""
TEMPERATURE_SHARE = 1 / 50
"""Temperature of the Sinkhorn iterations for the initial prices, as a share of the range."""
SINKHORN_ITERATIONS = 20
MIN_RANGE = 0.1
"""Smallest range to which affinities are scaled; BASE's gate has five times this range before training."""
MAX_ROUNDS = 20_000
"""Limit of rounds; only affinities that are NaN or infinite reach it."""


@torch.no_grad()
def solve_balanced_assignment(affinity_TE: Tensor, solver: Solver) -> Tensor:
    """Return expert_T, the expert of each token in an optimal assignment of at most ceil(T/E) tokens per expert.

    The solvers differ in time only. exact: SciPy, on the CPU. auction: an auction to within T·range/200 of the optimum,
    then cancellation of positive cycles to reach it. sinkhorn: the same, with the auction started at the prices of
    entropic transport, which takes fewer rounds.

    The result must be the optimum, not an approximation, because the path of an auction depends on the last bits of the
    affinities: noise of 6e-8 moved tokens in 86 of 672 auctions of 512 tokens to 8 experts, and in none of the optima.
    Tokens with equal affinities are interchangeable in the optimum; the earlier one goes to the lower expert.
    """
    num_tokens, num_experts = affinity_TE.shape
    if num_experts == 1 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=affinity_TE.device)
    # Scaled to [0, 1], because step and temperature are shares; a range below MIN_RANGE may be noise.
    spread = (affinity_TE.max() - affinity_TE.min()).clamp(min=MIN_RANGE)
    scaled_TE = (affinity_TE - affinity_TE.min()) / spread
    scaled_TE, level_TE = merge_near_ties(scaled_TE, dim=0)
    return sort_ties(_solve(scaled_TE, solver), level_TE)


def _solve(scaled_TE: Tensor, solver: Solver) -> Tensor:
    """Solve the problem for affinities scaled to [0, 1]."""
    num_tokens, num_experts = scaled_TE.shape
    if solver == "exact":
        return solve_exactly(scaled_TE)
    # Dummy rows of affinity 0 fill the spare slots: only if every slot is taken do the prices bound the loss for any
    # initial prices.
    capacity = -(-num_tokens // num_experts)
    scaled_RE = torch.nn.functional.pad(scaled_TE, (0, 0, 0, capacity * num_experts - num_tokens))
    price_E = torch.zeros(num_experts, device=scaled_TE.device)
    if solver == "sinkhorn":
        price_E = compute_entropic_prices(scaled_RE, TEMPERATURE_SHARE, SINKHORN_ITERATIONS)
    expert_R = run_auction(scaled_RE, capacity, price_E, STEP_SHARE)
    return cancel_positive_cycles(scaled_RE.double(), expert_R)[:num_tokens]


def sort_ties(expert_T: Tensor, level_TE: Tensor) -> Tensor:
    """Reorder interchangeable tokens so that earlier ones have lower experts.

    Tokens are interchangeable when all their E levels (see `merge_near_ties`) are equal.
    """
    factor_E = HASH_FACTOR ** torch.arange(1, level_TE.shape[1] + 1, device=level_TE.device)  # modulo 2^64
    hash_T = (level_TE * factor_E).sum(1)
    by_expert_T = expert_T.argsort(stable=True)
    source_T = by_expert_T[hash_T[by_expert_T].argsort(stable=True)]
    return torch.empty_like(expert_T).scatter_(0, hash_T.argsort(stable=True), expert_T[source_T])


def solve_exactly(affinity_TE: Tensor) -> Tensor:
    """Solve the linear assignment problem with SciPy, with one column for each slot of each expert."""
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_experts = affinity_TE.shape
    capacity = -(-num_tokens // num_experts)
    cost_TS = -affinity_TE.double().repeat_interleave(capacity, dim=1)
    _, slot_T = linear_sum_assignment(cost_TS.cpu().numpy())
    return torch.as_tensor(slot_T, device=affinity_TE.device) // capacity


def compute_entropic_prices(affinity_RE: Tensor, temperature: float, iterations: int) -> Tensor:
    """Return the expert prices at which rows split by softmax((a - price) / temperature) load all experts evenly.

    These are the dual variables of entropic transport, found by Sinkhorn's alternating scaling in the log domain, which
    cannot overflow.
    """
    scaled_RE = affinity_RE / temperature
    price_E = torch.zeros_like(scaled_RE[0])
    for _ in range(iterations):
        log_share_RE = (scaled_RE - price_E).log_softmax(1)
        price_E = price_E + log_share_RE.logsumexp(0)
        price_E = price_E - price_E.min()
    return temperature * price_E


def run_auction(affinity_RE: Tensor, capacity: int, price_E: Tensor, step: float) -> Tensor:
    """Run Bertsekas' auction of E experts with C = `capacity` slots each among E·C rows; return the expert of each row.

    In each round all unassigned rows bid for the expert of highest value (affinity minus price): its price, plus the
    lead over the second best value, plus `step`. An expert keeps its C highest bids; once full, its price is the lowest
    of them. In the result no row could gain more than `step` by moving.
    """
    no_bid = -torch.inf
    bid_RE = torch.full_like(affinity_RE, no_bid)
    for _ in range(MAX_ROUNDS):
        unassigned_R = (bid_RE.amax(1) == no_bid).nonzero().squeeze(1)
        if unassigned_R.numel() == 0:
            return bid_RE.argmax(1)
        value_RK, expert_RK = (affinity_RE[unassigned_R] - price_E).topk(2, dim=1)
        best_R = expert_RK[:, 0]
        bid_RE[unassigned_R, best_R] = price_E[best_R] + value_RK[:, 0] - value_RK[:, 1] + step
        kept_CE, row_CE = bid_RE.topk(capacity, dim=0)
        price_E = torch.where(kept_CE[-1] == no_bid, price_E, kept_CE[-1])
        bid_RE = torch.full_like(bid_RE, no_bid).scatter(0, row_CE, kept_CE)
    raise ArithmeticError("the auction does not terminate: the affinities are not finite")


def cancel_positive_cycles(affinity_RE: Tensor, expert_R: Tensor) -> Tensor:
    """Improve an assignment to the optimum for the same loads by moving rows along cycles of positive gain.

    An assignment is optimal when no cycle of experts, each passing one row to the next, has a positive gain (Klein
    1967, "A primal method for minimal cost flows"). From expert e to f moves the row of e that loses least.
    """
    expert_R = expert_R.clone()
    for _ in range(MAX_ROUNDS):
        gain_RE = affinity_RE - affinity_RE.gather(1, expert_R.unsqueeze(1))
        best_EE = gain_RE.new_full((affinity_RE.shape[1],) * 2, -torch.inf)
        best_EE.scatter_reduce_(0, expert_R.unsqueeze(1).expand_as(gain_RE), gain_RE, "amax")
        cycle = find_positive_cycle(best_EE.cpu())
        if not cycle:
            return expert_R
        moves = zip(cycle, cycle[1:] + cycle[:1], strict=True)
        rows = [((expert_R == e) & (gain_RE[:, f] == best_EE[e, f])).int().argmax() for e, f in moves]
        expert_R[torch.stack(rows)] = torch.tensor(cycle[1:] + cycle[:1], device=expert_R.device)
    raise ArithmeticError("cycles of positive gain do not end: the affinities are not finite")


def find_positive_cycle(gain_EE: Tensor) -> list[int]:
    """Return the nodes of a cycle whose gains sum to more than 0, or [] if there is none (Bellman-Ford)."""
    num_nodes = len(gain_EE)
    gain_EE = gain_EE.clone().fill_diagonal_(-torch.inf)
    length_E = gain_EE.new_zeros(num_nodes)
    predecessors = []
    for _ in range(num_nodes):
        longer_E, from_E = (length_E.unsqueeze(1) + gain_EE).max(0)
        grows_E = longer_E > length_E + MIN_GAIN
        if not grows_E.any():
            return []
        length_E = longer_E.where(grows_E, length_E)
        predecessors.append(from_E.where(grows_E, torch.arange(num_nodes)).tolist())
    # A longest path with as many steps as nodes visits some node twice: the part between the visits has positive gain,
    # or the path would have been as long with fewer steps.
    path = [int(grows_E.int().argmax())]
    for from_E in reversed(predecessors):
        node = from_E[path[-1]]
        if node in path[:-1]:
            return [node, *path[: path.index(node) : -1]]
        if node != path[-1]:
            path.append(node)
    return []


@torch.no_grad()
def solve_capped_plan(
    score_GTE: Tensor,
    capacity_G: Tensor,
    cap: int,
    valid_GT1: Tensor | None,
    weight: float = 0.02,
    iterations: int = 100,
) -> Tensor:
    """Return log A_GTE, A = argmax <S, A> + weight · H(A) with column sums `capacity`, row sums ≤ `cap`, entries ≤ 1.

    Dykstra's algorithm: alternating projections onto the three constraint sets, each with its own correction term
    (arXiv:2202.09368, section 3.3), in the log domain. The paper's weight of 1e-3 is far from converged after its 100
    iterations if scores are as large as those of a few experts; 0.02 converges and fills more slots. Entries clipped to
    1 are returned as before clipping, so that they do not tie.
    """
    log_GTE = score_GTE / weight
    if valid_GT1 is not None:
        log_GTE = log_GTE.masked_fill(~valid_GT1, -1e30)
    log_capacity_G11 = capacity_G.clamp(min=1).log().view(-1, 1, 1)
    log_cap = torch.full((), float(cap), device=score_GTE.device).log()
    row_excess_GT1, entry_excess_GTE = torch.zeros_like(log_GTE[..., :1]), torch.zeros_like(log_GTE)
    for _ in range(iterations):
        log_GTE = log_GTE - log_GTE.logsumexp(1, keepdim=True) + log_capacity_G11
        log_GTE = log_GTE + row_excess_GT1
        row_excess_GT1 = (log_GTE.logsumexp(2, keepdim=True) - log_cap).clamp(min=0)
        log_GTE = log_GTE - row_excess_GT1 + entry_excess_GTE
        entry_excess_GTE = log_GTE.clamp(min=0)
        log_GTE = log_GTE - entry_excess_GTE
    return log_GTE + entry_excess_GTE
