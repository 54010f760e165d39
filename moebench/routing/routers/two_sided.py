"""Two-sided choice: tokens shortlist experts, then experts choose among the tokens that shortlisted them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moebench.errors import require
from moebench.routing.ranking import log_scores
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.routers.expert_choice import OUT, ExpertChoice, best_of_each_token


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="S = softmax(X W);  M_t = the m best experts of t;  I_e = the T·c/E best tokens of e with e ∈ M_t;  "
        "y_t = Σ_{e: t∈I_e} S_te E_e(x_t)",
        paper="arXiv:2209.01667, section 4.1 (proposed there, not tried)",
        use="Expert choice that respects tokens' own wishes, in encoders.",
        beware="It sees later tokens. Loads are bounded and not even, and unpopular tokens get no expert. Nobody "
        "has published results with it.",
        causality=Causality(
            causal=False,
            reason="whether an expert takes a token depends on later tokens of the same sequence",
            batch_dependent=True,
        ),
        variable_k=True,
    )
)
class TwoSided(ExpertChoice):
    """Both sides have a say: no token goes to an expert that it likes little, no expert has more than its share.

    With m = E it is expert choice. With m small a popular expert turns tokens away, and an expert that few tokens
    shortlist goes short: the load is bounded from above and not balanced. No token has more than m experts.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ExpertChoice.Config):
        """Options of two-sided choice."""

        name: str = "two_sided"
        shortlist: int | None = None
        """Experts that a token offers itself to (m); null: twice average_experts."""

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.shortlist = config.shortlist or 2 * config.average_experts

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse a shortlist that is shorter than the average number of experts."""
        super().check(config, num_experts)
        shortlist, least = config.shortlist, config.average_experts
        allowed = f"null or at least average_experts={least}"
        require(shortlist is None or shortlist >= least, "router.shortlist", shortlist, allowed)

    @property
    def _takes_all_places(self) -> bool:
        return False

    def _ranked(self, scores_GTE: Tensor, seats_G: Tensor, valid_T: Tensor | None, token_GT: Tensor) -> Tensor:
        shortlisted_GTE = best_of_each_token(log_scores(scores_GTE), self.shortlist)
        ranked_GTE = super()._ranked(scores_GTE, seats_G, valid_T, token_GT)
        return ranked_GTE.masked_fill(shortlisted_GTE == OUT, OUT)
