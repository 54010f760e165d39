"""Two-sided choice: tokens shortlist experts, and experts choose among the tokens that shortlisted them.

Proposed in arXiv:2209.01667 (section 4.1) and not tried there: expert choice, restricted to each token's m best
experts.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.ranking import log_scores
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.routers.expert_choice import EXCLUDED, ExpertChoice, keep_best_experts


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="S = softmax(X W);  M_t = the m best experts of t;  I_e = the T·c/E best tokens of e with e ∈ M_t;  "
        "y_t = Σ_{e: t∈I_e} S_te E_e(x_t)",
        paper="arXiv:2209.01667, section 4.1 (proposed there, not tried)",
        use="For expert choice that respects the tokens' own preferences, in encoders.",
        beware="It is not causal. Loads are bounded but not even, and tokens that no expert prefers get none. There "
        "are no published results.",
        causality=Causality(
            causal=False,
            reason="whether an expert takes a token depends on later tokens of the same sequence",
            batch_dependent=True,
        ),
        variable_k=True,
    )
)
class TwoSided(ExpertChoice):
    """Expert choice among shortlists: no token goes to an expert outside its m best, no expert exceeds its share.

    With m = E it is expert choice. With small m popular experts turn tokens away, and experts on few shortlists get
    fewer tokens than their share: loads are bounded from above, not balanced. No token has more than m experts.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ExpertChoice.Config):
        """Options of two-sided choice."""

        name: str = "two_sided"
        shortlist: int | None = None
        """Number m of experts that a token shortlists; null: twice average_experts."""

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.shortlist = config.shortlist or 2 * config.average_experts

    @classmethod
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        super().check(config, num_experts)
        shortlist, average = config.shortlist, config.average_experts
        allowed = f"null or at least average_experts={average}"
        require(shortlist is None or shortlist >= average, "router.shortlist", shortlist, allowed)

    @property
    @override
    def _fills_capacity(self) -> bool:
        return False

    @override
    def _rank_tokens(self, scores_GTE: Tensor, capacity_G: Tensor, valid_T: Tensor | None, token_GT: Tensor) -> Tensor:
        shortlisted_GTE = keep_best_experts(log_scores(scores_GTE), self.shortlist)
        ranked_GTE = super()._rank_tokens(scores_GTE, capacity_G, valid_T, token_GT)
        return ranked_GTE.masked_fill(shortlisted_GTE == EXCLUDED, EXCLUDED)
