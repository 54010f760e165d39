"""StableMoE: learn to route first, then freeze the routing, so that no token changes its expert again."""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.errors import UsageError, require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="y = σ(w_i·x) E_i(x),  i = argmax_e w_e·x, taught to a student of the id;  later i = student(id)",
        paper="arXiv:2204.08396",
        use="Routing that does not change any more while experts still learn: a table of token ids that the "
        "text has taught.",
        beware="Blind to context once it is frozen. Evaluation before that is by a student that may know "
        "little. Needs token ids.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector, later by its own id", batch_dependent=False
        ),
        trained_by_own_loss=("embedding_VD", "student"),
        own_losses=("balance", "distillation"),
    )
)
class StableMoE(Router["StableMoE.Config"]):
    """StableMoE (Dai et al. 2022): in stage 2 the routing is a frozen table of token ids that the text has taught.

    Evaluation is always by the student, in stage 1 too, where it may not have learned much yet. Balance is
    mean_t |n_i/n̄ - 1| · (σ_ti where i has too many tokens, 1 - σ_ti where it has too few): the paper's loss plus what
    has no gradient and makes it 0 at even loads, and not negative else. Distillation is the cross-entropy of student
    and choice in nats, 0 where they agree. Both are means over tokens, as the paper's sums divided by their number;
    in stage 2 both are 0. The paper's gates start orthogonal, here like those of other routers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of StableMoE."""

        name: str = "stable_moe"
        stage_1_steps: int = 180
        """Steps until the routing is frozen: a tenth of a run of 1800, as the paper's 6,000 of 60,000."""
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
        """Draw embeddings of the size of normalised tokens."""
        nn.init.normal_(self.embedding_VD, generator=generator)

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse a negative number of steps and a student without width."""
        require(config.stage_1_steps >= 0, "router.stage_1_steps", config.stage_1_steps, "at least 0")
        require(config.student_width >= 1, "router.student_width", config.student_width, "at least 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Choose by the token in stage 1 of training, else by its id; weigh by the token."""
        assert ctx.token_id_T is not None
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        student_TE = self.student(self.embedding_VD[ctx.token_id_T])
        learns = ctx.training and ctx.step < self.options.stage_1_steps
        expert_TK = rank_top_k(logits_TE if learns else student_TE, 1)
        return Routing.from_top_k(
            expert_TK,
            scores_TE.gather(-1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            token_extras={"student_T": student_TE, "choice_T": expert_TK.squeeze(-1)} if learns else {},
        )

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return both losses of stage 1; afterwards zeros without a gradient, so that nothing moves the student."""
        extras, scores_TE = record.routing.token_extras, record.routing.scores_TE
        assert scores_TE is not None
        if not extras:
            return {"balance": scores_TE.new_zeros(()), "distillation": scores_TE.new_zeros(())}
        choice_T = extras["choice_T"]
        load_E = record.load_E.to(scores_TE.dtype)
        excess_T = (load_E / load_E.mean().clamp(min=1e-20) - 1)[choice_T]
        share_T = scores_TE.gather(-1, choice_T.unsqueeze(-1)).squeeze(-1)
        return {
            "balance": record.mean(excess_T.abs() * torch.where(excess_T > 0, share_T, 1 - share_T)),
            "distillation": record.mean(functional.cross_entropy(extras["student_T"], choice_T, reduction="none")),
        }

    def flops_per_token(self) -> int:
        """Forward FLOPs for one token: both gates; the embedding is only looked up."""
        return 2 * (self.gate.weight_ED.numel() + self.student.weight_ED.numel())
