"""Routing by domain and by sequence: which tokens share a decision, values by hand."""

import dataclasses

import pytest
import torch
from support.cases import Case, Tokens, build_context, route, tabulate_weights

from moebench.errors import UsageError
from moebench.routing.router import ROUTERS, Router
from moebench.routing.values import LayerRecord, Routing

BY_DOMAIN = ("domain", "task_level", "multi_gate")


def route_domains(router: Router, tokens: Tokens, domains: list[int], *, training: bool = False) -> Routing:
    """Route sequences of the given domains."""
    router.train(training)
    domain_T = torch.tensor(domains).repeat_interleave(tokens.length)
    return router(tokens.x_TD, dataclasses.replace(tokens.context(training=training), domain_T=domain_T))


def test_domain_by_hand() -> None:
    router, tokens = Case("domain", 2, {"evaluation": "prior"}).router(), Tokens.draw(12, length=4)
    routing = route_domains(router, tokens, [0, 1, 2], training=True)
    assert routing.expert_N.tolist() == [0] * 4 + [1] * 4 + [0] * 4  # the third domain shares the first expert
    torch.testing.assert_close(tabulate_weights(route_domains(router, tokens, [0, 1, 2])), torch.full((12, 2), 0.5))
    router.after_step(routing.load_E, {})
    # 8 of 12 tokens went to expert 0: the prior is 2/3 and 1/3.
    torch.testing.assert_close(
        tabulate_weights(route_domains(router, tokens, [1, 1, 1])), torch.tensor([[2 / 3, 1 / 3]] * 12)
    )


def test_task_level_routes_all_tokens_of_a_domain_alike() -> None:
    router, tokens = Case("task_level").router(), Tokens.draw(24, length=8)
    table_BLE = tabulate_weights(route_domains(router, tokens, [0, 2, 0])).view(3, 8, 8)
    assert (table_BLE == table_BLE[:, :1]).all()
    assert torch.equal(table_BLE[0], table_BLE[2])
    assert not torch.equal(table_BLE[0], table_BLE[1])
    logits_E = router.gate(router.embedding_GD[2])
    best = logits_E.topk(2)
    torch.testing.assert_close(table_BLE[1, 0][best.indices], best.values.softmax(-1))


def test_sentence_level_routes_by_the_mean_of_valid_tokens() -> None:
    router, tokens = Case("sentence_level").router(), Tokens.draw(16, length=8)
    valid_T = torch.ones(16, dtype=torch.bool)
    valid_T[5:8] = False
    routing = route_domains(router, dataclasses.replace(tokens, valid_T=valid_T), [0, 0])
    means_BD = torch.stack([tokens.x_TD[:5].mean(0), tokens.x_TD[8:].mean(0)])
    torch.testing.assert_close(routing.logits_TE, router.gate(means_BD).repeat_interleave(8, 0))
    assert torch.equal(routing.expert_N.view(2, 8, 2), routing.expert_N.view(2, 8, 2)[:, :1].expand(2, 8, 2))


def test_multi_gate_uses_and_trains_the_gate_of_the_domain() -> None:
    router, tokens = Case("multi_gate", options={"top_k": 3}).router(), Tokens.draw(24, length=8)
    routing = route_domains(router, tokens, [0, 1, 0], training=True)
    for token, domain in ((0, 0), (10, 1), (20, 0)):
        expected_E = router.weight_EGD[:, domain] @ tokens.x_TD[token]
        torch.testing.assert_close(routing.logits_TE[token], expected_E)
    routing.weight_N.sum().backward()
    norm_G = router.weight_EGD.grad.norm(dim=(0, 2))
    assert (norm_G[:2] > 1e-3).all()
    assert norm_G[2] == 0


def test_multi_gate_with_equal_gates_is_all_experts() -> None:
    ours, theirs = Case("multi_gate").router(), Case("all_experts").router()
    with torch.no_grad():
        ours.weight_EGD.copy_(theirs.gate.weight_ED.unsqueeze(1).expand_as(ours.weight_EGD))
    tokens = Tokens.draw(24, length=8)
    both = (route_domains(router, tokens, [0, 1, 2]) for router in (ours, theirs))
    torch.testing.assert_close(*(tabulate_weights(routing) for routing in both))


@pytest.mark.parametrize("name", BY_DOMAIN)
def test_a_task_without_domains_is_refused(name: str) -> None:
    router_class = ROUTERS.get(name).item
    with pytest.raises(UsageError, match=f"^router.name: '{name}' routes by domain, which this task does not have$"):
        router_class(router_class.Config(), build_context(8, num_domains=None))


def test_held_out_domains_are_mixed_by_the_prior() -> None:
    # Three domains are trained on; the last of four experts has seen no token and gets none.
    router, tokens = Case("domain", 4).router(), Tokens.draw(12, length=4)
    router.after_step(torch.tensor([6, 3, 3, 0]), {})
    routing = route_domains(router, tokens, [3, 1, 7])
    prior = [1 / 2, 1 / 4, 1 / 4, 0]
    torch.testing.assert_close(
        tabulate_weights(routing), torch.tensor([prior, [0.0, 1, 0, 0], prior]).repeat_interleave(4, 0)
    )
    assert routing.load_E.tolist() == [8, 12, 8, 0]
    assert route_domains(router, tokens, [0, 1, 2]).load_E.tolist() == [4, 4, 4, 0]


def test_held_out_domains_use_the_mean_over_domains() -> None:
    tokens = Tokens.draw(24, length=8)
    gates = Case("multi_gate").router()
    logits_TE = route_domains(gates, tokens, [3, 0, 9]).logits_TE
    torch.testing.assert_close(logits_TE[:8], tokens.x_TD[:8] @ gates.weight_EGD.mean(1).T)
    torch.testing.assert_close(logits_TE[16:], tokens.x_TD[16:] @ gates.weight_EGD.mean(1).T)
    torch.testing.assert_close(logits_TE[8:16], tokens.x_TD[8:16] @ gates.weight_EGD[:, 0].T)
    tasks = Case("task_level").router()
    logits_TE = route_domains(tasks, tokens, [3, 3, 3]).logits_TE
    torch.testing.assert_close(logits_TE, tasks.gate(tasks.embedding_GD.mean(0)).expand(24, -1))
    tables = Case("routing_networks_wpl", 2).router()
    tables.policy_GA.copy_(torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]))  # on average 7/15 and 8/15
    assert route_domains(tables, tokens, [0, 1, 3]).expert_N.tolist() == [0] * 8 + [1] * 16
    agents = Case("routing_networks", 4).router()
    actions_TA = agents.gate(tokens.x_TD).view(24, 3, 4).mean(1)
    assert route_domains(agents, tokens, [3, 3, 3]).expert_N.tolist() == actions_TA.argmax(-1).tolist()


@pytest.mark.parametrize("detach_input", [True, False])
def test_policy_gradient_reaches_the_input_unless_detached(detach_input: bool) -> None:
    router = Case("routing_networks", options={"detach_input": detach_input, "baseline": "none"}).router()
    tokens = Tokens.draw(64)
    tokens.x_TD.requires_grad_()
    routing = route(router, tokens, training=True)
    record = LayerRecord(routing=routing, kept=routing, token_loss_T=torch.linspace(0, 2, 64))
    gate_ED, x_TD = torch.autograd.grad(
        router.objective(record).mean(), (router.gate.weight_ED, tokens.x_TD), allow_unused=True
    )
    assert gate_ED.norm() > 0.01
    assert (x_TD is None) is detach_input
    if not detach_input:
        assert x_TD.abs().max() > 1e-3


NAMES = {"domains": ("poems", "code", "news"), "num_domains": 1}
"""Data of which training has poems alone; the two others were those of a parent."""


@pytest.mark.parametrize("name", ["domain", "domain_posterior"])
def test_domains_keep_their_experts_by_name(name: str) -> None:
    case = Case(name, 3, {"domains": ["code", "news", "poems"]})
    router = case.router_class(case.config, build_context(3, **NAMES))
    tokens = Tokens.draw(12, length=4)
    routing = route_domains(router, tokens, [0, 0, 0], training=True)
    assert routing.expert_N.tolist() == [2] * 12  # poems are first in the data and last in the list
    if name == "domain":
        routing = route_domains(router, tokens, [0, 1, 2])
        assert routing.expert_N.tolist() == [2] * 4 + [0] * 4 + [1] * 4
        assert (routing.weight_N == 1).all()


def test_a_domain_that_is_not_listed_is_mixed_by_the_prior() -> None:
    case = Case("domain", 2, {"domains": ["code", "poems"]})
    router = case.router_class(case.config, build_context(2, **NAMES))
    weights_TE = tabulate_weights(route_domains(router, Tokens.draw(12, length=4), [0, 1, 2]))
    assert weights_TE.tolist() == [[0, 1]] * 4 + [[1, 0]] * 4 + [[0.5, 0.5]] * 4


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (["code", "poem"], r"router.domains: 'poem' is unknown. Did you mean 'poems'\?"),
        (["poems", "poems"], "names a domain twice"),
        (["code"], "router.domains: lacks poems, which training has"),
    ],
)
def test_wrong_lists_of_domains(domains: list[str], message: str) -> None:
    case = Case("domain", 2, {"domains": domains})
    with pytest.raises(UsageError, match=message):
        case.router_class(case.config, build_context(2, **NAMES))
