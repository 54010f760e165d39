"""Words of `moebench compare`: experiments, routers, and mixtures of them."""

from pathlib import Path

import pytest

from moebench.cli.subjects import are_experiments, is_experiment
from moebench.errors import UsageError


def test_experiments_and_routers_are_told_apart():
    assert are_experiments(["quickstart"])
    assert are_experiments(["a.yaml", "folder/b.yml", "routers_language"])
    assert not are_experiments(["switch", "top_k"])
    assert not are_experiments(["my_router"], plugins=["my_plugin"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither an experiment nor a router"),
        (["quickstart", "switch"], r"got experiments \(quickstart\) and routers \(switch\); allowed: experiments only"),
        (["quickstrt", "vision"], "'quickstrt' is neither an experiment.* Did you mean 'quickstart'?"),
    ],
)
def test_mixtures_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        are_experiments(words)


def test_a_mistyped_experiment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/tiny.yaml").touch()
    with pytest.raises(UsageError, match=r"^report: 'tiny2' is neither an experiment .* Did you mean 'tiny'\?$"):
        is_experiment(["tiny2"], "report")
    Path("mine.yaml").touch()
    with pytest.raises(UsageError, match=r"Did you mean the file 'mine\.yaml'\?$"):
        is_experiment(["mine"], "report")
    assert not is_experiment(["swich"], "report")  # nearer to a router, whose error has the names
    assert not is_experiment(["tiny2"], "report", plugins=["my_plugin"])
