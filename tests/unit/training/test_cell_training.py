"""Training whole cells: the result and the journal of a run."""

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_soft_routing_is_trained_and_evaluated_like_other_routers(text, tmp_path) -> None:
    layout = {"capacity_factor_train": 0.5, "capacity_factor_eval": 0.5, "expert_dropout": 0.1}
    run = Run(tiny_config(text, router="soft_moe", layout=layout, allow_noncausal=True), tmp_path)
    result = run()
    assert result is not None
    assert result.marks == ("non-causal",)
    for name in ("max_violation", "cv", "dead_experts", "drop_rate", "reroute_rate", "unserved"):
        assert result.metrics[f"load/{name}"] == 0, name
    assert result.metrics["load/entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize("overflow", ["drop", "reroute", "pass"])
def test_every_overflow_option_is_trained_and_counted(text, tmp_path, overflow: str) -> None:
    layout = {"capacity_factor_train": 0.75, "capacity_factor_eval": 0.75, "overflow": overflow}
    run = Run(tiny_config(text, router="switch", layout=layout, allow_noncausal=True), tmp_path)
    result = run()
    assert result is not None
    assert (result.metrics["load/reroute_rate"] > 0) is (overflow == "reroute")
    # 32 tokens on 4 experts with 6 slots each: a quarter is dropped if every slot is taken, else more.
    assert result.metrics["load/drop_rate"] >= 0.25
    assert result.metrics["load/unserved"] == result.metrics["load/drop_rate"]  # k = 1


def test_result_has_everything_that_tables_show(text, tmp_path) -> None:
    config = tiny_config(text, router="expert_choice", allow_noncausal=True)
    run = Run(config, tmp_path)
    result = run()
    assert result is not None
    assert result.status == "done"
    assert result.marks == ("non-causal",)
    assert result.step == 12
    assert result.cost["train_tokens"] == 12 * 4 * 8
    assert set(result.metrics) == {
        "bits_per_byte", "bits_per_byte/ab", "bits_per_byte/xyz", "load/max_violation", "load/cv", "load/entropy",
        "load/dead_experts", "load/drop_rate", "load/reroute_rate", "load/unserved", "load/information/domain",
        "load/information/position", "load/information/token", "load/experts_per_token", "load/flops_per_token",
        "load/train_drop_rate", "load/train_unserved",
    }  # fmt: skip
    # Expert choice has even loads by construction.
    assert result.metrics["load/max_violation"] == 0
    assert type(result).from_dict(result.to_dict()) == result
    assert [step for step, _ in run.loads] == [5, 10, 12]
    assert all(set(layers) == {"0", "1"} for _, layers in run.loads)


def test_dense_result_has_no_load(text, tmp_path) -> None:
    run = Run(tiny_config(text, router="dense"), tmp_path)
    result = run()
    assert result is not None
    assert not [name for name in result.metrics if name.startswith("load/")]
    assert run.loads == []


def test_metric_names_of_the_journal(text, tmp_path) -> None:
    run = Run(tiny_config(text, router="switch"), tmp_path)
    run()
    names = {name for _, metrics in run.points() for name in metrics}
    assert {
        "loss/task", "loss/total", "loss/load_balance", "balance/load_balance", "train/learning_rate",
        "train/grad_norm", "eval/bits_per_byte", "eval/bits_per_byte/ab", "eval/load/max_violation",
    } <= names  # fmt: skip


def test_training_reduces_the_loss(text, tmp_path) -> None:
    run = Run(tiny_config(text, train={"steps": 60, "learning_rate": 0.02, "eval_every": 60}), tmp_path)
    run()
    losses = [metrics["loss/task"] for _, metrics in run.points() if "loss/task" in metrics]
    assert losses[0] == pytest.approx(torch.tensor(257.0).log().item(), rel=1e-4)
    assert losses[-1] < 0.6 * losses[0]
