"""The worked example of `show --plot`: the panels agree with what the layer computes."""

import pytest
import torch

from moebench.catalogue.figure import Example
from moebench.routing.router import ROUTERS


@pytest.mark.parametrize("name", ROUTERS.names())
def test_panels_of_every_router(name: str) -> None:
    example = Example(name, seed=0)
    panels = example.build_panels()
    router = example.layer.router
    assert any(panel.slots is not None for panel in panels) is not (router.form.is_mixture or router.form.is_chain)
    for panel in panels:
        assert panel.weight_TE.shape[0] == 16
        assert torch.isfinite(panel.weight_TE).all()
        assert not panel.weight_TE[~panel.chosen_TE].any()
        if panel.dropped_TE is not None:
            assert panel.load_E == panel.chosen_TE.sum(0).tolist()
            kept_E = (panel.chosen_TE & ~panel.dropped_TE).sum(0)
            assert panel.slots is None or kept_E.max() <= panel.slots
    assert example.num_experts >= example.layer.experts_per_token


def test_the_example_of_switch_drops_and_that_of_base_does_not() -> None:
    # 16 tokens for 4 experts: room for 4 each. Base is even, so nothing is over.
    trained = {name: Example(name, seed=0).build_panels()[1] for name in ("switch", "base")}
    assert trained["switch"].slots == trained["base"].slots == 4
    assert trained["switch"].dropped_TE.any()
    assert trained["switch"].unserved_T.tolist() == trained["switch"].dropped_TE.any(1).tolist()  # k=1
    assert trained["base"].load_E == [4, 4, 4, 4]
    assert not trained["base"].dropped_TE.any()


def test_slots_of_soft_routing_hold_one_sentence_each() -> None:
    dispatch, combine = Example("soft_moe", seed=0).build_panels()
    torch.testing.assert_close(dispatch.weight_TE.view(2, 8, 8).sum(1), torch.ones(2, 8))
    torch.testing.assert_close(combine.weight_TE.sum(1), torch.ones(16))
