"""What the host waits for in a training step, and steps that are checked after their update, here forced on a CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.case_selection import combine_axes
from support.host_waits import HostWaits, waits_of_steps
from support.training_cases import Run, Watched, assert_same_tree, tiny_config, write_text

from moebench.training.divergence import NonFiniteError
from moebench.training.model import prepare_task
from moebench.training.optimizer.clipping import clip_in_update

ON_A_CPU = "experts/grouped.py"
"""Products of groups, which read the loads on a CPU alone."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs check their steps later, as on a GPU."""
    monkeypatch.setattr("moebench.training.module.can_defer_checks", lambda config, mesh, optimizer: True)


@pytest.fixture
def waits() -> Iterator[HostWaits]:
    """Those of the fifth to the eighth step of a run."""
    with waits_of_steps(4, 7) as counter:
        yield counter
    for place in list(counter.places):
        assert place.split()[-1].startswith(("training/", ON_A_CPU)), counter.places


def quiet(text: Path, **options: Any) -> Any:
    """Return a cell whose middle steps are not logged."""
    train = {"log_every": 100, "eval_every": 100, **options.pop("train", {})}
    return tiny_config(text, train=train, allow_noncausal=True, **options)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lists of assignments keep their length."""
    for module in ("routing.selection", "experts.bank_pass"):
        monkeypatch.setattr(f"moebench.{module}.can_read_without_waiting", lambda device: False)


ONE_OF_EACH_KIND = ("top_k", "expert_choice", "soft_moe", "dynmoe", "mixture_of_depths", "ponder_net")
OTHERS = (
    *("dense", "switch", "loss_free", "gshard"),
    *("expert_threshold", "moe_plus_plus", "null_experts", "top_p"),
    {"name": "expert_choice", "max_per_token": 3},
    {"name": "routing_networks", "agents": "single", "pass_through": True},
)


@pytest.mark.parametrize(
    "router", [*ONE_OF_EACH_KIND, *(pytest.param(router, marks=pytest.mark.slow) for router in OTHERS)], ids=str
)
def test_the_host_waits_once_in_a_step_that_is_not_logged(
    router: Any, text: Path, tmp_path: Path, waits: HostWaits, as_on_a_gpu: None
) -> None:
    Run(quiet(text, router=router), tmp_path)()
    assert_one_wait_in_each_step(waits)


@pytest.mark.parametrize("router", [pytest.param("dynmoe", marks=pytest.mark.slow), "top_p"])
def test_a_budget_of_measured_flops_waits_no_more(
    router: str, text: Path, tmp_path: Path, waits: HostWaits, as_on_a_gpu: None
) -> None:
    Run(quiet(text, router=router, layout={"match": "measured_flops", "expert_width": None}), tmp_path)()
    assert_one_wait_in_each_step(waits)


@pytest.mark.parametrize(
    ("overflow", "router"),
    combine_axes(["drop", "pass", "reroute"], ["switch", "top_p"], quick=[("pass", "switch"), ("reroute", "top_p")]),
)
def test_capacity_waits_no_more(
    overflow: str, router: str, text: Path, tmp_path: Path, waits: HostWaits, as_on_a_gpu: None
) -> None:
    layout = {"capacity_factor_train": 0.5, "overflow": overflow}
    Run(quiet(text, router=router, layout=layout), tmp_path)()
    assert_one_wait_in_each_step(waits)


def assert_one_wait_in_each_step(waits: HostWaits) -> None:
    counted = {place: number for place, number in waits.places.items() if ON_A_CPU not in place}
    assert sum(counted.values()) == 4, counted  # four steps


@pytest.mark.parametrize("policy", ["skip", "rewind", pytest.param("stop", marks=pytest.mark.slow)])
def test_policies_that_decide_before_the_update_wait_no_more(
    policy: str, text: Path, tmp_path: Path, waits: HostWaits
) -> None:
    Run(quiet(text, router="dense", train={"spike_policy": policy}), tmp_path)()
    assert waits.total == 4, waits.places


def test_the_one_wait_is_for_the_step_before(text: Path, tmp_path: Path, later: None, waits: HostWaits) -> None:
    Run(quiet(text, router="dense"), tmp_path)()
    assert waits.total == 4
    assert {place.split(":")[0] for place in waits.places} == {"tolist at training/step_values.py"}


def parameters_with_gradients(scale: float) -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=source)) for shape in ((3, 4), (5,))]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=source)
    return parameters


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clipping_in_the_update_is_clipping_before_it(scale: float) -> None:
    ended = []
    for in_update in (True, False):
        parameters = parameters_with_gradients(scale)
        optimizer = torch.optim.AdamW(parameters, fused=True, eps=0.1)  # with eps the size of gradients matters
        if in_update:
            norm = clip_in_update(optimizer, parameters, 1.0, torch.tensor(1.0))
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ended.append([norm, *parameters, *(state["exp_avg"] for state in optimizer.state.values())])
    for ours, theirs in zip(*ended, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_changes_nothing(where: str, value: float) -> None:
    parameters = parameters_with_gradients(1.0)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    clip_in_update(optimizer, parameters, 1.0, torch.tensor(1.0))
    optimizer.step()
    before = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    before += [parameter.detach().clone() for parameter in parameters]
    grad = parameters[0].grad
    assert grad is not None
    if where == "gradient":
        grad[1, 2] = value
    clip_in_update(optimizer, parameters, 1.0, torch.tensor(value if where == "loss" else 1.0))
    optimizer.step()
    after = [tensor for state in optimizer.state.values() for tensor in state.values()]
    for ours, theirs in zip([*after, *parameters], before, strict=True):
        assert torch.equal(ours, theirs)
    clip_in_update(optimizer, parameters_with_gradients(1.0), 1.0, torch.tensor(1.0))
    grad.fill_(1.0)
    optimizer.step()
    assert not torch.equal(parameters[0], before[-2])  # the next one counts again


class SpoiledLater(Watched):
    """Spoils the loss of a batch; the trainer has made the next one already."""

    def find_number(self, batch: Any) -> int:
        return next(number for number, seen in zip(self.numbers, self.seen, strict=True) if seen is batch.input_BL)


def test_a_run_that_is_checked_later_is_the_same(text: Path, tmp_path: Path, later: None) -> None:
    config = tiny_config(text, router="loss_free", train={"log_every": 5})
    late = Run(config, tmp_path / "late")
    assert late() is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebench.training.module.can_defer_checks", lambda config, mesh, optimizer: False)
        early = Run(config, tmp_path / "early")
        assert early() is not None
    for (step, ours), (same_step, theirs) in zip(late.points(), early.points(), strict=True):
        assert step == same_step
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("at", [4, 5, pytest.param(6, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_is_found_in_its_step(at: int, text: Path, tmp_path: Path, later: None) -> None:
    """Step 5 is logged, so its values are read at its end; those of the others in the next step."""
    config = tiny_config(text, router="loss_free", train={"log_every": 5, "eval_every": 100, "checkpoint_every": 2})
    task = SpoiledLater(prepare_task(config, tmp_path), lambda loss_BP: loss_BP * float("nan"), at=at)
    run = Run(config, tmp_path, task=task)
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step {at}; no update was made; batch {at - 1} of seed"):
        run()
    assert max(step for step, _ in run.points()) < at
    last = run.checkpoint((at - 1) // 2 * 2)
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_step_is_repeated_with_the_routers_of_before_it(
    text: Path, tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(text, router="loss_free", train={"log_every": 100, "eval_every": 100})
    states: list[list[torch.Tensor]] = []

    def trace(module: Any, step: int) -> str:
        states.append([buffer.clone() for layer in module.layers for buffer in layer.router.buffers()])
        return "traced"

    monkeypatch.setattr("moebench.training.module.trace_step", trace)
    task = SpoiledLater(prepare_task(config, tmp_path), lambda loss_BP: loss_BP * float("nan"), at=6)
    with pytest.raises(NonFiniteError, match="traced"):
        Run(config, tmp_path / "late", task=task)()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebench.training.module.can_defer_checks", lambda config, mesh, optimizer: False)
        task = SpoiledLater(prepare_task(config, tmp_path), lambda loss_BP: loss_BP * float("nan"), at=6)
        with pytest.raises(NonFiniteError, match="traced"):
            Run(config, tmp_path / "early", task=task)()
    assert_same_tree(*states)
    assert any(state.abs().max() > 0 for state in states[0])


def test_spikes_are_recorded_at_their_steps(text: Path, tmp_path: Path, later: None) -> None:
    train = {"steps": 24, "spike_window": 8, "spike_threshold": 3.0, "log_every": 4, "eval_every": 100}
    config = tiny_config(text, router="dense", train=train)
    ended = []
    for name, is_late in (("late", True), ("early", False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moebench.training.module.can_defer_checks", lambda *_, is_late=is_late: is_late)
            task = SpoiledLater(prepare_task(config, tmp_path), lambda loss_BP: 50 * loss_BP, at=14)
            run = Run(config, tmp_path / name, task=task)
            result = run()
            assert result is not None
            assert [spike["step"] for spike in result.spikes] == [14]
            assert [step for step, metrics in run.points() if "spike/loss" in metrics] == [14]
            ended.append([step for step, _ in run.points()])
    assert ended[0] == ended[1] == sorted(ended[0])


def test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit(text: Path, tmp_path: Path, later: None) -> None:
    config = tiny_config(text, router="loss_free", train={"log_every": 6, "eval_every": 100})
    complete, parts = Run(config, tmp_path / "whole"), Run(config, tmp_path / "parts")
    assert complete() is not None
    assert parts(stop_at=4) is None
    assert parts.checkpoints.joinpath("step_0000005.ckpt").exists()  # the step after the request
    assert parts() is not None
    assert_same_tree(complete.checkpoint(12)["state_dict"], parts.checkpoint(12)["state_dict"])
    assert complete.points() == parts.points()
