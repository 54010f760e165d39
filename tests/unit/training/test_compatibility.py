import pytest
import torch
from moebench.compatibility import check_cell, list_marks
from support.training_cases import Run, tiny_config, write_text

from moebench.config import resolve
from moebench.errors import UsageError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("router", "layout", "causal"),
    [
        ("switch", {}, True),
        ("switch", {"capacity_factor_train": 1.0}, True),
        ("switch", {"capacity_factor_train": 1.0, "drop_order": "position"}, True),
        ("switch", {"capacity_factor_train": 1.0, "drop_order": "score"}, False),
        ("switch", {"capacity_factor_train": 1.0, "drop_order": "priority"}, False),
        ("switch", {"capacity_factor_train": 1.0, "drop_order": "random"}, False),
        ("switch", {"drop_order": "score"}, True),  # dropless: the order decides nothing
        ("switch", {"capacity_factor_train": float("inf"), "drop_order": "score"}, True),
        ("switch", {"capacity_factor_train": 1.0, "overflow": "pass"}, True),
        ("switch", {"capacity_factor_train": 1.0, "overflow": "reroute"}, False),
        ("switch", {"capacity_factor_eval": 1.0, "overflow": "reroute", "drop_order": "position"}, False),
        ("switch", {"overflow": "reroute"}, True),  # dropless: nothing to send on
        ("gshard", {}, True),
        ("gshard", {"capacity_factor_train": 1.0}, False),
        ("gshard", {"capacity_factor_eval": 1.0}, False),
        ("gshard", {"capacity_factor_eval": 1.0, "drop_order": "position"}, True),
        ("expert_choice", {}, False),
        ("expert_choice", {"capacity_factor_train": 1.0, "drop_order": "position"}, False),
        ("soft_moe", {}, False),
        ("dense", {}, True),
        ("dense", {"capacity_factor_train": 1.0, "overflow": "reroute", "drop_order": "score"}, True),
    ],
)
def test_router_that_sees_the_future_is_refused_or_marked(router: str, layout: dict, causal: bool) -> None:
    config = resolve({"router": router, "layout": layout})
    assert list_marks(config) == (() if causal else ("non-causal",))
    if causal:
        check_cell(config)
        return
    with pytest.raises(
        UsageError, match=r"^(router.name: .* is not causal|layout.(drop_order|overflow): ).*allow_noncausal=true"
    ):
        check_cell(config)
    check_cell(resolve({"router": router, "layout": layout, "allow_noncausal": True}))


def test_refusal_names_what_is_not_causal() -> None:
    config = resolve({"router": "switch", "layout": {"capacity_factor_train": 1.0, "drop_order": "score"}})
    with pytest.raises(UsageError) as caught:
        check_cell(config)
    # Not the router's fault: its own reason ("routed by its own vector") would contradict the refusal.
    assert "drop_order" in str(caught.value)


@pytest.mark.parametrize("router", ["hash", "random"])
def test_rerouting_without_scores_is_refused(router: str) -> None:
    layout = {"overflow": "reroute", "capacity_factor_train": 1.0}
    with pytest.raises(
        UsageError, match=rf"^layout\.overflow: 'reroute' needs scores, which router '{router}' does not"
    ):
        check_cell(resolve({"router": router, "layout": layout, "allow_noncausal": True}))
    check_cell(resolve({"router": router, "layout": layout | {"overflow": "pass"}}))
    check_cell(resolve({"router": router, "layout": {"overflow": "reroute"}}))  # dropless: nothing to send on


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_expert_dropout_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match=rf"layout\.expert_dropout must be at least 0 and below 1, got {rate}"):
        resolve({"layout": {"expert_dropout": rate}})


def test_soft_routing_is_trained_and_evaluated_like_the_others(text, tmp_path) -> None:
    layout = {"capacity_factor_train": 0.5, "capacity_factor_eval": 0.5, "expert_dropout": 0.1}
    run = Run(tiny_config(text, router="soft_moe", layout=layout, allow_noncausal=True), tmp_path)
    result = run()
    assert result is not None
    assert result.marks == ("non-causal",)
    for name in ("max_violation", "cv", "dead_experts", "drop_rate", "reroute_rate", "unserved"):
        assert result.metrics[f"load/{name}"] == 0, name
    assert result.metrics["load/entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize("overflow", ["drop", "reroute", "pass"])
def test_every_overflow_is_trained_and_counted(text, tmp_path, overflow: str) -> None:
    layout = {"capacity_factor_train": 0.75, "capacity_factor_eval": 0.75, "overflow": overflow}
    run = Run(tiny_config(text, router="switch", layout=layout, allow_noncausal=True), tmp_path)
    result = run()
    assert result is not None
    assert (result.metrics["load/reroute_rate"] > 0) is (overflow == "reroute")
    # 32 tokens on 4 experts with 6 slots each: with every slot taken a quarter is left over, else more.
    assert result.metrics["load/drop_rate"] >= 0.25
    assert result.metrics["load/unserved"] == result.metrics["load/drop_rate"]  # k = 1


def test_result_says_all_that_a_table_needs(text, tmp_path) -> None:
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
    # Expert choice is even by construction, whatever it has learned.
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


def test_journal_names(text, tmp_path) -> None:
    run = Run(tiny_config(text, router="switch"), tmp_path)
    run()
    names = {name for _, metrics in run.points() for name in metrics}
    assert {
        "loss/task", "loss/total", "loss/load_balance", "balance/load_balance", "train/learning_rate",
        "train/grad_norm", "eval/bits_per_byte", "eval/bits_per_byte/ab", "eval/load/max_violation",
    } <= names  # fmt: skip


def test_training_learns(text, tmp_path) -> None:
    run = Run(tiny_config(text, train={"steps": 60, "learning_rate": 0.02, "eval_every": 60}), tmp_path)
    run()
    losses = [metrics["loss/task"] for _, metrics in run.points() if "loss/task" in metrics]
    assert losses[0] == pytest.approx(torch.tensor(257.0).log().item(), rel=1e-4)
    assert losses[-1] < 0.6 * losses[0]


def test_a_cuda_device_that_is_not_there_is_refused(text, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config(text, train={"device": "cuda"})
    with pytest.raises(UsageError, match=r"^train\.device: 'cuda' was asked for, but torch finds no CUDA device"):
        check_cell(config)
