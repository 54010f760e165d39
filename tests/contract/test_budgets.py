"""What routers declare for a budget: the attribute exists, and a larger setting means more compute."""

import pytest
from support.cases import Case, Tokens, default_cases, run

from moebench.experts.knobs import find_knobs, make_adjustable, set_options

with_budget = pytest.mark.parametrize("case", [case for case in default_cases() if case.facts.budget], ids=str)
SETTINGS = (-3.0, -1.0, 0.0, 1.0, 3.0)


def count_experts(case: Case, setting: float | None) -> float:
    """Return the experts per token in evaluation, with the knob at a setting; None: it is as built."""
    layer = case.layer(seed=0)
    if setting is not None:
        make_adjustable([layer])
        ((router, knob),) = find_knobs([layer])
        buffer = getattr(router, knob.attribute)
        buffer.fill_(knob.to_value(float(buffer), setting))
    _, record = run(layer, Tokens.draw(64, seed=0, length=16), training=False)
    return float(record.kept.experts_per_token_T.double().mean())


@with_budget
def test_more_of_it_means_more_experts(case: Case) -> None:
    assert case.facts.variable_k
    counts = [count_experts(case, setting) for setting in SETTINGS]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


@with_budget
def test_an_adjustable_router_routes_as_before(case: Case) -> None:
    assert count_experts(case, 0.0) == count_experts(case, None)


def test_a_named_option_replaces_what_training_has_set() -> None:
    case = Case("top_p")
    layer = case.layer()
    make_adjustable([layer])
    ((router, _),) = find_knobs([layer])
    router.top_p.fill_(0.7)
    set_options([layer], router.config, ["layout.capacity_factor_eval"])
    assert float(router.top_p) == pytest.approx(0.7)
    set_options([layer], router.config, ["top_p"])  # also where it is the value that training began with
    assert float(router.top_p) == pytest.approx(router.config.top_p)


def test_routers_without_it_have_no_knob() -> None:
    assert list(find_knobs([Case("switch").layer()])) == []
