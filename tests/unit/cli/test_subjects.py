"""Words of `moebench compare`: experiments, routers, and mixtures of them."""

import pytest

from moebench.cli.subjects import are_experiments
from moebench.errors import UsageError


def test_experiments_and_routers_are_told_apart():
    assert are_experiments(["quickstart"])
    assert are_experiments(["a.yaml", "folder/b.yml", "routers_language"])
    assert not are_experiments(["switch", "top_k"])
    assert not are_experiments(["my_router"])  # of a plugin, or unknown: resolved later


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither an experiment nor a router"),
        (["quickstart", "switch"], r"got experiments \(quickstart\) and routers \(switch\); allowed: experiments only"),
        (["quickstrt", "vision"], "'quickstrt' is no experiment.* Did you mean 'quickstart'?"),
    ],
)
def test_mixtures_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        are_experiments(words)
