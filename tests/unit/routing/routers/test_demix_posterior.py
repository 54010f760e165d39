"""DEMix with unknown domains: the posterior, its training, and evaluation without labels."""

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


def route_domains(router: Router, tokens: Tokens, domain_T: Tensor | None, *, training: bool = False) -> Routing:
    """Route tokens of the given domains; None: unknown."""
    router.train(training)
    return router(tokens.x_TD, dataclasses.replace(tokens.context(training=training), domain_T=domain_T))


def test_training_routes_by_the_label() -> None:
    tokens, domain_T = Tokens.draw(12, length=4), torch.tensor([0, 1, 2]).repeat_interleave(4)
    ours = route_domains(Case("domain_posterior", 2).router(), tokens, domain_T, training=True)
    theirs = route_domains(Case("domain", 2).router(), tokens, domain_T, training=True)
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert torch.equal(ours.weight_N, theirs.weight_N)


def test_evaluation_weights_experts_by_the_posterior() -> None:
    router, tokens = Case("domain_posterior", 3).router(), Tokens.draw(10, length=5)
    table_TE = tabulate_weights(route_domains(router, tokens, None))
    for token in range(10):
        mean_D = tokens.x_TD[token // 5 * 5 : token + 1].mean(0)
        expected_E = (router.gate.weight_ED @ mean_D).softmax(0)
        torch.testing.assert_close(table_TE[token], expected_E)
    assert torch.equal(tabulate_weights(route_domains(router, tokens, torch.zeros(10, dtype=torch.int64))), table_TE)


def test_layer_output_is_the_weighted_sum_of_experts() -> None:
    layer, tokens = Case("domain_posterior", 2).layer(), Tokens.draw(6)
    layer.eval()
    y_TD, record = layer(tokens.x_TD, dataclasses.replace(tokens.context(training=False), domain_T=None))
    table_TE = tabulate_weights(record.kept)
    expected_TD = sum(table_TE[:, e : e + 1] * layer.bank.expert(tokens.x_TD, e) for e in (0, 1))
    torch.testing.assert_close(y_TD, expected_TD)
    assert layer.router.losses(record)["domain"] == 0  # without labels there is no target


def test_mixes_outputs_not_probabilities() -> None:
    # Outputs (4, 0) and (0, 0) with equal weights: (2, 0), a probability of .881. DEMix's mixture of predictions would
    # be (.982 + .5) / 2 = .741.
    router, tokens = Case("domain_posterior", 2, {"prior": "even"}).router(), Tokens.draw(1)
    with torch.no_grad():
        router.gate.weight_ED.zero_()
    output_E2 = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    weight_TE = tabulate_weights(route_domains(router, tokens, None))
    assert (weight_TE @ output_E2).softmax(-1)[0, 0].item() == pytest.approx(0.881, abs=5e-4)
    assert (weight_TE @ output_E2.softmax(-1))[0, 0].item() == pytest.approx(0.741, abs=5e-4)


def test_zero_classifier_gives_the_prior() -> None:
    tokens = Tokens.draw(4)
    for prior, expected in (("counted", [7 / 10, 3 / 10]), ("even", [0.5, 0.5])):
        router = Case("domain_posterior", 2, {"prior": prior}).router()
        with torch.no_grad():
            router.gate.weight_ED.zero_()
        router.after_step(torch.tensor([6, 2]), {})
        torch.testing.assert_close(tabulate_weights(route_domains(router, tokens, None)), torch.tensor([expected] * 4))


def test_domain_loss_by_hand() -> None:
    router, tokens = Case("domain_posterior", 4).router(), Tokens.draw(4)
    with torch.no_grad():
        router.gate.weight_ED.zero_()
    domain_T = torch.tensor([0, 0, 0, 1])
    first = router.losses(record_of(route_domains(router, tokens, domain_T, training=True)))["domain"].detach()
    assert float(first) == pytest.approx(1)
    router.after_step(torch.tensor([12, 0, 0, 0]), {})  # the prior is now 13/16 and 1/16
    nats = -(3 * math.log(13 / 16) + math.log(1 / 16)) / 4
    loss = router.losses(record_of(route_domains(router, tokens, domain_T, training=True)))["domain"].detach()
    assert float(loss) == pytest.approx(nats / math.log(4), rel=1e-5)


def test_loss_trains_the_classifier_only() -> None:
    layer, tokens = Case("domain_posterior", 2).layer(), Tokens.draw(8)
    tokens.x_TD.requires_grad_()
    y_TD, record = layer.train()(tokens.x_TD, tokens.context(training=True))
    layer.router.losses(record)["domain"].backward(retain_graph=True)
    assert tokens.x_TD.grad is None
    assert layer.router.gate.weight_ED.grad.norm() > 1e-3
    layer.router.gate.weight_ED.grad = None
    y_TD.sum().backward()
    assert layer.router.gate.weight_ED.grad is None


def test_posterior_sharpens_over_the_sequence() -> None:
    # Tokens of a domain have mean ±1 in one direction under unit noise: one token is ambiguous, 32 are not.
    router = Case("domain_posterior", 2).fresh_router()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)

    def sample(seed: int) -> tuple[Tokens, Tensor]:
        tokens = Tokens.draw(32 * 16, seed=seed, length=32)
        domain_T = torch.tensor([0, 1]).repeat(8).repeat_interleave(32)
        x_TD = tokens.x_TD.clone()
        x_TD[:, 0] += 2.0 * domain_T - 1
        return dataclasses.replace(tokens, x_TD=x_TD), domain_T

    for step in range(60):
        loss = router.losses(record_of(route_domains(router, *sample(step), training=True)))["domain"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, domain_T = sample(1000)
    probability_T = tabulate_weights(route_domains(router, tokens, None))[
        torch.arange(len(domain_T)), domain_T
    ].detach()
    first, last = probability_T.view(16, 32)[:, 0].mean(), probability_T.view(16, 32)[:, -1].mean()
    assert last > 0.95
    assert first < last - 0.1


def test_a_task_without_domains_is_refused() -> None:
    router_class = ROUTERS.get("domain_posterior").item
    with pytest.raises(
        UsageError, match=r"^router.name: 'domain_posterior' routes by domain, which this task does not"
    ):
        router_class(router_class.Config(), build_context(8, num_domains=None))


def test_held_out_domains_are_mixed_and_have_no_loss() -> None:
    router, tokens = Case("domain_posterior", 3).router(), Tokens.draw(10, length=5)
    routing = route_domains(router, tokens, torch.tensor([3, 0]).repeat_interleave(5))
    assert torch.equal(tabulate_weights(routing), tabulate_weights(route_domains(router, tokens, None)))
    nats_T = routing.token_extras["nats_T"]
    assert not nats_T[:5].any()  # no expert is the target
    torch.testing.assert_close(nats_T[5:], -tabulate_weights(routing)[5:, 0].log())
