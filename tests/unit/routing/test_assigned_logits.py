"""Routers of the whole batch: processes gather their logits, so gradients must stay with the token's own."""

from typing import Any

import pytest
import torch
from support.cases import Case, Tokens
from torch import Tensor

from moebench.routing.contract import RouterContractError, check_router_class
from moebench.routing.logit_router import LogitRouter
from moebench.routing.router import ROUTERS, RouterConfig
from moebench.routing.routers.expert_choice import ExpertChoice


def needs_whole_batch(name: str) -> bool:
    router = Case(name).router()
    router.train()
    return router.traits.needs_whole_batch


NAMES = [name for name in ROUTERS.names() if needs_whole_batch(name)]


def test_the_built_in_ones_define_their_logits() -> None:
    assert {"expert_choice", "expert_choice_by_position", "two_sided", "base", "sinkhorn"} <= {*NAMES}
    assert all(Case(name).router().needs_logits_only for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_own_logits_alone(name: str) -> None:
    router, tokens = Case(name).router(), Tokens.draw(16, length=4)
    router.train()
    ctx = tokens.context(training=True, seed=0)
    logits_TE = router.score_tokens(tokens.x_TD, ctx).detach().requires_grad_()
    routing: Any = router.assign(logits_TE, ctx)
    of_token_T = routing.token_N == int(routing.token_N[0])
    for value in (routing.weight_N[of_token_T].sum(), routing.scores_TE[routing.token_N[0]].square().sum()):
        (gradient_TE,) = torch.autograd.grad(value, logits_TE, retain_graph=True)
        reached_T = gradient_TE.abs().sum(1) > 0
        assert not reached_T[torch.arange(16) != routing.token_N[0]].any()


def test_a_subclass_with_its_own_forward_gets_vectors() -> None:
    class Shifted(ExpertChoice):
        def forward(self, x_TD: Tensor, ctx: Any) -> Any:
            return self.assign(self.score_tokens(x_TD + 1, ctx), ctx)

    router = object.__new__(Shifted)
    assert isinstance(router, LogitRouter)
    assert not router.needs_logits_only


def test_a_subclass_without_an_assignment_is_refused() -> None:
    class Unassigned(LogitRouter):
        pass

    with pytest.raises(
        RouterContractError, match=r"must define score_tokens\(x_TD, ctx\) and assign\(logits_TE, ctx\)"
    ):
        check_router_class(Unassigned, RouterConfig(name="unassigned"), num_experts=8)
