"""StableMoE: learn routing first, then freeze it to a table of token ids (arXiv:2204.08396).

In stage 1 tokens are routed by a gate, which is distilled into a small student network of the token id. In stage 2 the
student routes and is no longer trained, so no token changes its expert while the experts keep learning.
"""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.errors import UsageError, require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="y = σ(w_i·x) E_i(x),  i = argmax_e w_e·x, distilled into a student of the id;  later i = student(id)",
        paper="arXiv:2204.08396",
        use="When routing should stay fixed while experts keep learning: it becomes a table of token ids, learned "
        "from the text.",
        beware="Routing does not depend on context in stage 2. Evaluation in stage 1 uses the student, which may not "
        "have learned much yet. It needs token ids.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector, later by its own id", batch_dependent=False
        ),
        trained_by_own_loss=("embedding_VD", "student"),
        own_losses=("balance", "distillation"),
    )
)
class StableMoE(Router["StableMoE.Config"]):
    """StableMoE (Dai et al. 2022): in stage 2 routing is a fixed function of the token id, distilled in stage 1.

    Evaluation always uses the student, in stage 1 too. `balance` is mean_t |n_i/n̄ - 1| · (σ_ti if expert i has too
    many tokens, 1 - σ_ti if too few): the paper's loss plus terms without gradient that make it 0 at even loads and
    never negative. `distillation` is the cross-entropy of the student with the gate's choice, in nats. Both are means
    over tokens, where the paper has sums; in stage 2 both are 0, without gradient. The paper initialises gates
    orthogonally; here they start like those of other routers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of StableMoE."""

        name: str = "stable_moe"
        stage_1_steps: int = 180
        """Number of steps before routing is frozen: a tenth of a run of 1800, as the paper's 6,000 of 60,000."""
        student_width: int = 50
        """Width of the student's embedding of token ids."""
        losses: dict[str, float] = field(default_factory=lambda: {"balance": 0.3, "distillation": 0.3})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        if context.data.vocab_size is None:
            raise UsageError(f"router.name: '{config.name}' routes by token id, which this task does not have")
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)
        self.embedding_VD = nn.Parameter(torch.empty(context.data.vocab_size, config.student_width))
        self.student = Gate(config.student_width, context.num_experts)

    def init_weights(self, generator: Generator) -> None:
        """Initialise embeddings at the scale of normalised tokens."""
        nn.init.normal_(self.embedding_VD, generator=generator)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        require(config.stage_1_steps >= 0, "router.stage_1_steps", config.stage_1_steps, "at least 0")
        require(config.student_width >= 1, "router.student_width", config.student_width, "at least 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.token_id_T is not None
        logits_TE = self.gate(x_TD)
        student_TE = self.student(self.embedding_VD[ctx.token_id_T])
        is_stage_1 = ctx.training and ctx.step < self.options.stage_1_steps
        rule = TopKRule(top_k=1, score="sigmoid")
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule, ranked_TE=None if is_stage_1 else student_TE)
        return Routing.from_top_k(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            token_extras={"student_T": student_TE, "choice_T": expert_TK.squeeze(-1)} if is_stage_1 else {},
        )

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        extras, scores_TE = record.routing.token_extras, record.routing.scores_TE
        assert scores_TE is not None
        if not extras:  # stage 2: no gradient may reach the student
            return {"balance": scores_TE.new_zeros(()), "distillation": scores_TE.new_zeros(())}
        choice_T = extras["choice_T"]
        score_T = scores_TE.gather(-1, choice_T.unsqueeze(-1)).squeeze(-1)

        def balance(load_E: Tensor) -> LossValue:
            excess_T = (load_E / load_E.mean().clamp(min=1e-20) - 1)[choice_T]
            penalty_T = excess_T.abs() * torch.where(excess_T > 0, score_T, 1 - score_T)
            return reduce_record(record, lambda mean: mean, means=[penalty_T])

        nats_T = functional.cross_entropy(extras["student_T"], choice_T, reduction="none")
        return {
            "balance": reduce_record(record, balance, totals=[record.routing.load_E.to(scores_TE.dtype)]),
            "distillation": reduce_record(record, lambda mean: mean, means=[nats_T]),
        }

    @override
    def flops_per_token(self) -> int:
        return 2 * (self.gate.weight_ED.numel() + self.student.weight_ED.numel())
