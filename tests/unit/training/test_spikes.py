"""The rule for spikes by hand, and what each policy does to a real training."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, Watched, assert_same_runs, assert_same_tree, tiny_config, write_text

from moebench.config import cell_id
from moebench.registry import load_plugin
from moebench.runs.result import RunResult
from moebench.schema import TrainConfig
from moebench.training.batches import count_train_tokens
from moebench.training.divergence import SpikeError
from moebench.training.model import prepare_task
from moebench.training.rewinds import MAX_REWINDS, Rewind, Rewinds
from moebench.training.spikes import BatchName, RecentValues, Spike, SpikeGuard

SPIKED = {"steps": 24, "spike_window": 8, "checkpoint_every": 4, "eval_every": 12}
AT = 11
"""The step that is spoiled, from 1: its loss is about four times those before."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def build_run(folder: Path, text: Path, policy: str, name: str = "run", at: int | None = AT, **options: Any) -> Run:
    """Return a run of a cell whose loss is four times too large in the batch of step `at`."""
    config = tiny_config(text, train=SPIKED | {"spike_policy": policy} | options.pop("train", {}), **options)
    task = Watched(prepare_task(config, folder), None if at is None else quadruple, at or 0)
    return Run(config, folder / name, task=task)


@pytest.fixture
def start(text: Path, tmp_path: Path) -> Callable[..., Run]:
    return partial(build_run, tmp_path, text)


@pytest.fixture(scope="module")
def rewound(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, RunResult]]:
    """Return the run of an optimizer that rewinds and is not interrupted, trained once."""

    @cache
    def train(optimizer: str) -> tuple[Run, RunResult]:
        run = build_run(tmp_path_factory.mktemp("rewound"), text, "rewind", train={"optimizer": optimizer})
        result = run()
        assert result is not None
        return run, result

    return train


def quadruple(loss: torch.Tensor) -> torch.Tensor:
    return 4 * loss


def make_name() -> BatchName:
    return BatchName(seed=0, number=0)


def test_limit_by_hand() -> None:
    values = RecentValues(window=8, threshold=6.0)
    for value in (4.0, 2.0, 3.0):
        values.values.append(value)
        assert values.limit() == float("inf")  # less than half of the window
    values.values.append(5.0)
    # median of 2 3 4 5: 3.5; distances .5 .5 1.5 1.5, their median 1
    assert values.limit() == pytest.approx(3.5 + 6 * 1.4826 * 1)


def test_a_spike_in_the_window_does_not_raise_the_limit() -> None:
    # 9 values 1 ... 9: median 5, deviations 0 1 1 2 2 3 3 4 4, median 2. With 9 replaced by 1000: the same.
    calm, spiked = (RecentValues(window=9, threshold=2.0) for _ in range(2))
    calm.values.extend(range(1, 10))
    spiked.values.extend([*range(1, 9), 1000])
    assert calm.limit() == spiked.limit() == pytest.approx(5 + 2 * 1.4826 * 2)


def test_equal_values_leave_one_percent() -> None:
    values = RecentValues(window=4, threshold=6.0)
    values.values.extend([2.0] * 4)
    assert values.limit() == pytest.approx(2.0 + 6 * 0.01 * 2.0)


def test_a_level_that_has_risen_for_good_is_no_spike_after_half_a_window() -> None:
    guard = SpikeGuard(TrainConfig(spike_window=8))
    levels = [1.0] * 8 + [2.0] * 8
    spikes = [guard.check(step, loss, 1.0, make_name) for step, loss in enumerate(levels, start=1)]
    # With k values of 2 among 8: at k = 4 the median is 1.5 and the deviation 1.48 * .5, so 2 is below 1.5 + 6 * .74.
    assert [spike.step for spike in spikes if spike] == [9, 10, 11, 12]


@pytest.mark.parametrize(("policy", "steps"), [("record", []), ("skip", [9])])
def test_the_gradient_norm_counts_where_updates_are_skipped(policy: str, steps: list[int]) -> None:
    guard = SpikeGuard(TrainConfig(spike_window=8, spike_policy=policy))
    norms = [1.0] * 8 + [1.1]  # limit: 1 + 6 * .01
    spikes = [guard.check(step, 1.0, norm, make_name) for step, norm in enumerate(norms, start=1)]
    assert [spike.step for spike in spikes if spike] == steps
    assert all(not spike.is_of_loss for spike in spikes if spike)


def test_batches_after_rewinds_by_hand() -> None:
    def spike(step: int) -> Spike:
        return Spike(
            step=step, loss=2.0, loss_limit=1.0, grad_norm=1.0, grad_norm_limit=2.0, batch=BatchName(seed=0, number=0)
        )

    # A spike at step 7 (update 6), checkpoints every 4: back to 4, batches 4 5 6 are left out.
    once = Rewinds().after(spike(7), 4)
    assert once.entries[0].to_step == 4
    assert [once.batch_number(step) for step in range(8)] == [0, 1, 2, 3, 7, 8, 9, 10]
    # Again at step 5 (update 4, batch 7): back to 4, batch 7 is left out too.
    twice = once.after(spike(5), 4)
    assert [twice.batch_number(step) for step in range(6)] == [0, 1, 2, 3, 8, 9]
    # At step 8, which has a checkpoint only after its update: back to 4, not to 8.
    assert Rewinds().after(spike(8), 4).entries == (Rewind(to_step=4, spike=spike(8)),)
    assert Rewinds().after(spike(3), 4).entries[0].to_step == 0


def test_id_depends_on_the_policy_alone() -> None:
    def make_id(**train: Any) -> str:
        return cell_id(tiny_config(Path("text"), train=train), "data")

    assert make_id() == make_id(spike_window=64, spike_threshold=4) == make_id(checkpoint_every=7)
    ids = {make_id(), *(make_id(spike_policy=policy) for policy in ("stop", "skip", "rewind"))}
    assert len(ids) == 4
    assert make_id(spike_policy="skip") != make_id(spike_policy="skip", spike_threshold=4)
    assert make_id(spike_policy="skip") == make_id(spike_policy="skip", checkpoint_every=7)
    assert make_id(spike_policy="rewind") != make_id(spike_policy="rewind", checkpoint_every=7)


def test_id_does_not_depend_on_options_of_another_optimizer_or_schedule() -> None:
    def make_id(**train: Any) -> str:
        return cell_id(tiny_config(Path("text"), train=train), "data")

    assert make_id() == make_id(muon_momentum=0.9, muon_learning_rate=0.1, decay_fraction=0.5, decay_shape="linear")
    assert make_id(optimizer="muon") != make_id(optimizer="muon", muon_momentum=0.9)
    assert make_id(schedule="wsd") != make_id(schedule="wsd", decay_fraction=0.5)
    assert len({make_id(), make_id(optimizer="muon"), make_id(schedule="wsd"), make_id(router_learning_rate=0.0)}) == 4


def test_record_leaves_the_numbers_and_names_the_batch(start, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # The spike is in the loss that is returned, so that the update is made with it: compare with no rule at all.
    run, unwatched = start("record"), start("record", "unwatched", train={"spike_threshold": 1e6})
    result, other = run(), unwatched()
    assert_same_tree(run.checkpoint(24)["state_dict"], unwatched.checkpoint(24)["state_dict"])
    assert result.metrics == other.metrics
    assert other.spikes == []
    (spike,) = result.spikes
    assert (spike["step"], spike["seed"], spike["number"], spike["action"]) == (AT, 0, AT - 1, "recorded")
    assert spike["samples"] == run.task.list_train_samples(4, 0, AT - 1)
    assert spike["loss"] > spike["loss_limit"]
    (point,) = [(step, metrics) for step, metrics in run.points() if "spike/loss" in metrics]
    assert point == (
        AT,
        {f"spike/{name}": spike[name] for name in ("loss", "loss_limit", "grad_norm", "grad_norm_limit")}
        | {"spike/batch": AT - 1},
    )
    logged = [line for line in capfd.readouterr().out.splitlines() if line.startswith("spike at")]
    assert len(logged) == 1
    assert f"batch {AT - 1} of seed 0 (windows {spike['samples'][0]}, " in logged[0]


def test_stop_ends_the_run_before_the_update(start) -> None:
    run = start("stop")
    with pytest.raises(SpikeError, match=rf"^spike at step {AT}: loss .*batch {AT - 1} of seed 0 .*no update was made"):
        run()
    assert max(step for step, _ in run.points()) == AT - 1


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_skip_leaves_parameters_moments_and_router_as_they_were(start, optimizer: str) -> None:
    train = {"steps": AT + 1, "checkpoint_every": 1, "optimizer": optimizer}
    run = start("skip", train=train, router="loss_free")
    states = {}

    def keep(message: dict[str, Any]) -> None:
        if message["step"] in (AT - 1, AT):
            states[message["step"]] = run.checkpoint(message["step"])

    run.progress = keep
    result = run()
    skipped = [spike["step"] for spike in result.spikes]
    assert AT in skipped
    assert all(spike["action"] == "skipped" for spike in result.spikes)
    for key in ("state_dict", "optimizer"):
        assert_same_tree(states[AT - 1][key], states[AT][key], key)
    assert states[AT]["global_step"] == AT


@pytest.mark.parametrize("policy", [pytest.param("record", marks=pytest.mark.slow), "skip"])
def test_spikes_are_the_same_in_a_resumed_run(start, policy: str) -> None:
    full, parts = start(policy, "full"), start(policy, "parts")
    result = full()
    assert parts(stop_at=AT - 2) is None
    assert parts(stop_at=AT + 1) is None
    assert parts().spikes == result.spikes
    assert result.spikes
    assert_same_runs(full, parts)


def test_rewind_goes_back_and_leaves_out_the_batches_of_the_spike(rewound) -> None:
    run, result = rewound("adamw")
    (spike,) = result.spikes
    assert (spike["step"], spike["action"], spike["to_step"]) == (AT, "rewound", 8)
    # Batches 0 ... 10, where 10 spikes and 11 is made in advance; then steps 8 ... 23 with batches 11 ... 26.
    assert run.task.numbers == [*range(12), *range(11, 27)]
    steps = [step for step, metrics in run.points() if "loss/task" in metrics]
    assert steps == [*range(1, 25)]
    (point,) = [(step, metrics) for step, metrics in run.points() if "rewind/1/loss" in metrics]
    assert point[0] == 8
    assert point[1]["rewind/1/from_step"] == AT
    assert point[1]["rewind/1/loss"] == spike["loss"]
    assert result.cost["train_tokens"] == count_train_tokens(run.config, run.task)  # windows have one length


class KilledError(Exception):
    pass


def kill_at(step: int) -> Callable[[dict[str, Any]], None]:
    def kill(message: dict[str, Any]) -> None:
        if message["step"] == step:
            raise KilledError

    return kill


@pytest.mark.parametrize(
    ("killed_at", "optimizer"),
    [
        (AT - 1, "adamw"),
        pytest.param(AT - 2, "adamw", marks=pytest.mark.slow),
        pytest.param(AT - 1, "muon", marks=pytest.mark.slow),
        pytest.param(AT + 5, "adamw", marks=pytest.mark.slow),
    ],
)
def test_rewinding_run_that_is_killed_ends_the_same(start, rewound, killed_at: int, optimizer: str) -> None:
    full, result = rewound(optimizer)
    parts = start("rewind", train={"optimizer": optimizer})
    parts.progress = kill_at(killed_at)
    with pytest.raises(KilledError):
        parts()
    parts.progress = lambda message: None
    assert parts(stop_at=AT + 8) is None  # a stop between checkpoints
    assert parts().spikes == result.spikes
    assert_same_runs(full, parts)


def test_rewind_that_is_killed_before_training_goes_on_ends_the_same(
    start, rewound, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, parts = rewound("adamw")[0], start("rewind")
    with monkeypatch.context() as patch:
        patch.setattr("moebench.training.train._add_rewind", _write_and_die)
        with pytest.raises(KilledError):
            parts()
    parts()
    assert_same_runs(full, parts)


def _write_and_die(rewinds: Rewinds, request: Any, context: Any, mesh: Any, train: TrainConfig) -> Rewinds:
    rewinds.after(request.spike, train.checkpoint_every).write(context.checkpoints)
    raise KilledError


def test_rewind_with_a_damaged_checkpoint_ends_the_same(start, rewound) -> None:
    full, parts = rewound("adamw")[0], start("rewind")
    parts.progress = kill_at(AT - 2)  # after step 9 was rewound to 8 ...
    with pytest.raises(KilledError):
        parts()
    (parts.checkpoints / "step_0000008.ckpt" / "rest.pt").write_bytes(b"damaged")  # ... which is lost
    parts.progress = lambda message: None
    parts()
    assert_same_runs(full, parts)


def test_rewind_gives_up(start) -> None:
    run = start("rewind", at=None)
    run.task.spoil = quadruple
    run.task.is_spoiled = lambda number: number >= AT - 1
    with pytest.raises(SpikeError, match=f"{MAX_REWINDS} rewinds have not helped"):
        run()


def test_router_of_a_plugin_that_has_collapsed_spikes_too(start, plugin) -> None:
    load_plugin(str(Path(__file__).parents[2] / "support" / "collapsed_router.py"))
    result = start("record", router="collapsed")()
    assert [spike["step"] for spike in result.spikes] == [AT]
    assert result.metrics["load/max_violation"] == pytest.approx(3.0)  # one of 4 experts has all tokens
