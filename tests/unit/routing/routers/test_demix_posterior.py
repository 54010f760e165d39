"""DEMix with unknown domains: what the posterior is made of, what learns it, and that it needs no label."""

import dataclasses
import math

import pytest
import torch
from support.cases import Case, Tokens, build_context, tabulate_weights
from support.identity_gates import record_of
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.router import ROUTERS, Router
from moebench.routing.values import Routing


def routed(router: Router, tokens: Tokens, domain_T: Tensor | None, *, training: bool = False) -> Routing:
    """Route tokens of the given domains, or of unknown ones."""
    router.train(training)
    return router(tokens.x_TD, dataclasses.replace(tokens.context(training=training), domain_T=domain_T))


def test_training_is_that_of_known_domains() -> None:
    tokens, domain_T = Tokens.draw(12, length=4), torch.tensor([0, 1, 2]).repeat_interleave(4)
    ours = routed(Case("domain_posterior", 2).router(), tokens, domain_T, training=True)
    theirs = routed(Case("domain", 2).router(), tokens, domain_T, training=True)
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert torch.equal(ours.weight_N, theirs.weight_N)


def test_tokens_of_an_unknown_domain_are_served_by_the_posterior() -> None:
    router, tokens = Case("domain_posterior", 3).router(), Tokens.draw(10, length=5)
    table_TE = tabulate_weights(routed(router, tokens, None))
    for token in range(10):
        mean_D = tokens.x_TD[token // 5 * 5 : token + 1].mean(0)
        expected_E = (router.gate.weight_ED @ mean_D).softmax(0)
        torch.testing.assert_close(table_TE[token], expected_E)
    assert torch.equal(tabulate_weights(routed(router, tokens, torch.zeros(10, dtype=torch.int64))), table_TE)


def test_the_layer_serves_unknown_domains_as_the_sum_of_its_experts() -> None:
    layer, tokens = Case("domain_posterior", 2).layer(), Tokens.draw(6)
    layer.eval()
    y_TD, record = layer(tokens.x_TD, dataclasses.replace(tokens.context(training=False), domain_T=None))
    table_TE = tabulate_weights(record.kept)
    expected_TD = sum(table_TE[:, e : e + 1] * layer.bank.expert(tokens.x_TD, e) for e in (0, 1))
    torch.testing.assert_close(y_TD, expected_TD)
    assert layer.router.losses(record)["domain"] == 0  # nothing to compare with


def test_outputs_are_mixed_and_not_probabilities() -> None:
    # Experts that say (4, 0) and (0, 0), at even weights: (2, 0), a probability of .881. DEMix's mixture of the
    # predictions of whole passes would be (.982 + .5) / 2 = .741.
    router, tokens = Case("domain_posterior", 2, {"prior": "even"}).router(), Tokens.draw(1)
    with torch.no_grad():
        router.gate.weight_ED.zero_()
    says_E2 = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    weight_TE = tabulate_weights(routed(router, tokens, None))
    assert (weight_TE @ says_E2).softmax(-1)[0, 0].item() == pytest.approx(0.881, abs=5e-4)
    assert (weight_TE @ says_E2.softmax(-1))[0, 0].item() == pytest.approx(0.741, abs=5e-4)


def test_a_classifier_that_knows_nothing_leaves_the_prior() -> None:
    tokens = Tokens.draw(4)
    for prior, expected in (("counted", [7 / 10, 3 / 10]), ("even", [0.5, 0.5])):
        router = Case("domain_posterior", 2, {"prior": prior}).router()
        with torch.no_grad():
            router.gate.weight_ED.zero_()
        router.after_step(torch.tensor([6, 2]), {})
        torch.testing.assert_close(tabulate_weights(routed(router, tokens, None)), torch.tensor([expected] * 4))


def test_the_loss_by_hand() -> None:
    router, tokens = Case("domain_posterior", 4).router(), Tokens.draw(4)
    with torch.no_grad():
        router.gate.weight_ED.zero_()
    domain_T = torch.tensor([0, 0, 0, 1])
    first = router.losses(record_of(routed(router, tokens, domain_T, training=True)))["domain"].detach()
    assert float(first) == pytest.approx(1)
    router.after_step(torch.tensor([12, 0, 0, 0]), {})  # the prior is now 13/16 and 1/16
    nats = -(3 * math.log(13 / 16) + math.log(1 / 16)) / 4
    found = router.losses(record_of(routed(router, tokens, domain_T, training=True)))["domain"].detach()
    assert float(found) == pytest.approx(nats / math.log(4), rel=1e-5)


def test_the_loss_teaches_the_classifier_alone() -> None:
    layer, tokens = Case("domain_posterior", 2).layer(), Tokens.draw(8)
    tokens.x_TD.requires_grad_()
    y_TD, record = layer.train()(tokens.x_TD, tokens.context(training=True))
    layer.router.losses(record)["domain"].backward(retain_graph=True)
    assert tokens.x_TD.grad is None
    assert layer.router.gate.weight_ED.grad.norm() > 1e-3
    layer.router.gate.weight_ED.grad = None
    y_TD.sum().backward()
    assert layer.router.gate.weight_ED.grad is None


def test_domains_that_differ_are_told_apart_sooner_or_later() -> None:
    # Domain d's tokens have mean ±1 in one direction under unit noise: one token is unsure, 32 are not.
    router = Case("domain_posterior", 2).fresh_router()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)

    def drawn(seed: int) -> tuple[Tokens, Tensor]:
        tokens = Tokens.draw(32 * 16, seed=seed, length=32)
        domain_T = torch.tensor([0, 1]).repeat(8).repeat_interleave(32)
        x_TD = tokens.x_TD.clone()
        x_TD[:, 0] += 2.0 * domain_T - 1
        return dataclasses.replace(tokens, x_TD=x_TD), domain_T

    for step in range(60):
        loss = router.losses(record_of(routed(router, *drawn(step), training=True)))["domain"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, domain_T = drawn(1000)
    right_T = tabulate_weights(routed(router, tokens, None))[torch.arange(len(domain_T)), domain_T].detach()
    first, last = right_T.view(16, 32)[:, 0].mean(), right_T.view(16, 32)[:, -1].mean()
    assert last > 0.95
    assert first < last - 0.1


def test_a_task_without_domains_is_refused() -> None:
    router_class = ROUTERS.get("domain_posterior").item
    with pytest.raises(
        UsageError, match=r"^router.name: 'domain_posterior' routes by domain, which this task does not"
    ):
        router_class(router_class.Config(), build_context(8, num_domains=None))


def test_a_domain_that_was_held_out_is_served_and_judged_by_none() -> None:
    router, tokens = Case("domain_posterior", 3).router(), Tokens.draw(10, length=5)
    routing = routed(router, tokens, torch.tensor([3, 0]).repeat_interleave(5))
    assert torch.equal(tabulate_weights(routing), tabulate_weights(routed(router, tokens, None)))
    nats_T = routing.token_extras["nats_T"]
    assert not nats_T[:5].any()  # no expert is right, so none can be named
    torch.testing.assert_close(nats_T[5:], -tabulate_weights(routing)[5:, 0].log())
