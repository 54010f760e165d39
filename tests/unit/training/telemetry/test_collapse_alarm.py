"""The alarm of a collapse: planted in real trainings, and its rule by hand."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.planted_collapse import FACTS, PlantedCollapse
from support.training_cases import Run, tiny_config, write_text

from moebench.experts.layer import MoELayer
from moebench.routing.router import ROUTERS
from moebench.runs.journal import read_journal
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.telemetry.collapse import (
    WINDOW_STEPS,
    Collapse,
    CollapseAlarm,
    can_collapse,
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    before = {entry.name: entry for entry in ROUTERS.entries()}
    ROUTERS.register(FACTS)(PlantedCollapse)
    yield
    ROUTERS._entries.clear()
    ROUTERS._entries.update(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def planted(text: Path, first_step: int, **options: object) -> Run:
    config = tiny_config(
        text,
        router={"name": "planted_collapse", "first_step": first_step, **options.pop("router", {})},
        model={"num_layers": 8, "ffn_width": 8} | options.pop("model", {}),
        layout={"n": 1, "num_experts": 8, "expert_width": 4},
        train={"steps": 41, "log_every": 100, "eval_every": 100, **options.pop("train", {})},
    )
    return Run(config, Path(str(options["folder"])))


def list_alarms(run: Run) -> list[tuple[int, dict[str, float]]]:
    points, _ = read_journal(run.folder / "journal.jsonl")
    return [
        (point.step, dict(point.metrics)) for point in points if any(n.startswith("collapse/") for n in point.metrics)
    ]


def test_one_layer_of_eight_is_named_within_20_steps(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first_step = 22  # within a window
    run = planted(text, first_step, folder=tmp_path)
    progress: dict[int, int] = {}
    run.progress = lambda message: progress.update({message["step"]: message["num_collapsed"]})
    run()
    ((step, metrics),) = list_alarms(run)
    assert first_step <= step < first_step + 20
    assert metrics == {
        "collapse/layers": 1.0,
        "collapse/5/expert": 3.0,
        "collapse/5/num_experts": 1.0,
        "collapse/5/share": 1.0,
    }
    line = f"collapse at step {step}: in layer 5 expert 3 takes 100% of the assignments (8 experts, steps"
    assert line in capsys.readouterr().out
    assert [progress[step - 1], progress[step], progress[41]] == [0, 1, 1]


def test_an_alarm_that_is_checked_later_keeps_the_journal_in_order(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebench.training.module.can_defer_checks", lambda config, mesh, optimizer: True)
    train = {"steps": 14, "log_every": 1}
    run = planted(text, 0, folder=tmp_path, router={"layer": 1}, train=train, model={"num_layers": 2})
    run()
    steps = [point.step for point in read_journal(run.folder / "journal.jsonl")[0]]
    assert steps == sorted(steps)
    assert [step for step, _ in list_alarms(run)] == [10]


def test_a_layer_recovers(text: Path, tmp_path: Path) -> None:
    router, train = {"layer": 1, "last_step": 15}, {"steps": 25}
    run = planted(text, 6, folder=tmp_path, router=router, train=train, model={"num_layers": 2})
    run()
    (_, begin), (step, end) = list_alarms(run)
    assert begin["collapse/layers"] == 1.0
    assert end == {"collapse/layers": 0.0, "collapse/1/recovered": pytest.approx(1 / 8)}
    assert step == 15 + 2 * WINDOW_STEPS


def test_a_resumed_run_has_the_same_alarms_and_series(text: Path, tmp_path: Path) -> None:
    # Collapsed from the first step on: a resumed router counts its steps anew.
    options = {"router": {"layer": 1}, "train": {"log_every": 3, "steps": 12}, "model": {"num_layers": 2}}
    full, parts = (planted(text, 0, folder=tmp_path / name, **copy.deepcopy(options)) for name in ("full", "parts"))
    full()
    parts(stop_at=7)  # within the second window, whose first steps are in the checkpoint
    parts()
    assert list_alarms(full) == list_alarms(parts) != []
    assert (full.folder / "layers.jsonl").read_bytes() == (parts.folder / "layers.jsonl").read_bytes()


def test_training_is_the_same_without_telemetry(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(text, router="switch", train={"steps": 11})
    runs = [Run(config, tmp_path / name) for name in ("with", "without")]
    runs[0]()
    monkeypatch.setattr("moebench.training.module.CellModule.has_telemetry", property(lambda _: False, lambda *_: None),
                        raising=False)  # fmt: skip
    runs[1]()
    states = [run.checkpoint(11)["state_dict"] for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert runs[0].points() == runs[1].points()
    assert [(run.folder / "layers.jsonl").exists() for run in runs] == [True, False]


def layers_of(text: Path, tmp_path: Path, **options: object) -> list[MoELayer]:
    config = tiny_config(text, allow_noncausal=True, **options)
    return build_initialised_model(config, prepare_task(config, tmp_path)).backbone.moe_layers()


@pytest.mark.parametrize(
    ("router", "watched"),
    [
        ("switch", True),
        ({"name": "top_k", "top_k": 2}, True),
        ({"name": "top_k", "top_k": 3}, False),  # of four experts
        ("hash", False),
        ("random", False),
        ("soft_moe", False),
        ("act", False),
        ("mixture_of_depths", True),
        ("expert_choice", True),
    ],
)
def test_routers_that_choose_are_watched(text: Path, tmp_path: Path, router: object, watched: bool) -> None:
    layers = layers_of(text, tmp_path, router=router)
    assert [can_collapse(layer) for layer in layers] == [watched, watched]


def alarm_of(text: Path, tmp_path: Path, k: int) -> CollapseAlarm:
    router = {"name": "top_k", "top_k": k, "renormalise": False, "softmax": "before"}
    return CollapseAlarm(layers_of(text, tmp_path, router=router)[:1])


@pytest.mark.parametrize(
    ("k", "loads", "is_collapsed"),
    [
        (1, [93, 4, 2, 1], True),  # (0.93 - 1/4) / (3/4) = 0.907
        (1, [92, 4, 2, 2], False),  # 0.893
        (2, [50, 46, 4, 0], True),  # (0.96 - 1/2) / (1/2) = 0.92
        (2, [46, 46, 4, 4], False),  # 0.84, of one 0.84
        (1, [0, 0, 0, 0], False),
    ],
)
def test_the_busiest_experts_have_nearly_all(
    text: Path, tmp_path: Path, k: int, loads: list[float], is_collapsed: bool
) -> None:
    alarm = alarm_of(text, tmp_path, k)
    assert alarm.check(5, [*loads, sum(loads) / k]) == []  # the first of two windows
    events = alarm.check(10, [*loads, sum(loads) / k])
    assert len(events) == is_collapsed
    assert alarm.num_collapsed == is_collapsed
    for event in events:
        assert event.experts == tuple(range(k))
        assert math.isclose(event.share, sum(loads[:k]) / 100)
    assert alarm.check(15, [*loads, sum(loads) / k]) == []  # once


@pytest.mark.parametrize(
    ("top_k", "num_tokens", "loads", "experts", "leaves_others"),
    [
        (2, 512, [0, 0, 0, 512, 161, 0, 0, 351], (3,), True),  # the second choice varies over two others
        (2, 512, [0, 0, 0, 500, 100, 100, 162, 162], (3,), True),  # (500 - 128) / (512 - 128) = 0.97
        (2, 512, [0, 0, 0, 470, 100, 100, 177, 177], None, True),  # 0.89
        (2, 512, [0, 0, 0, 512, 500, 12, 0, 0], (3, 4), False),
        (2, 512, [0, 0, 512, 0, 0, 0, 0, 0], (2,), False),  # tokens use fewer experts than they may
        (2, 512, [0, 0, 256, 100, 156, 0, 0, 0], None, False),
        (3, 512, [512, 510, 100, 100, 100, 100, 114, 0], (0, 1), True),
        (2, 512, [512, 500, 400, 400, 300, 100, 100, 100], None, True),  # one of many experts
        (2, 512, [512, 500, 20, 10, 0, 0, 0, 0], (0, 1), False),  # a few tokens use more than two
        (2, 512, [256, 128, 128, 128, 96, 96, 96, 96], None, True),
    ],
)
def test_fewer_experts_than_a_token_uses_may_have_all_tokens(
    text: Path,
    tmp_path: Path,
    top_k: int,
    num_tokens: int,
    loads: list[int],
    experts: tuple[int, ...] | None,
    leaves_others: bool,
) -> None:
    layout = {"num_experts": 8, "expert_width": 4}
    alarm = CollapseAlarm(layers_of(text, tmp_path, router={"name": "top_k", "top_k": top_k}, layout=layout)[:1])
    events = [event for step in (5, 10) for event in alarm.check(step, [*loads, num_tokens])]
    assert [(event.experts, event.leaves_others) for event in events] == ([(experts, leaves_others)] if experts else [])


def test_one_expert_of_two_collapses_and_recovers(text: Path, tmp_path: Path) -> None:
    alarm = alarm_of(text, tmp_path, 2)
    windows = [[0, 512, 161, 351, 512]] * 2 + [[200, 400, 200, 224, 512]] * 2 + [[256, 300, 256, 212, 512]] * 2
    events = [event for number, loads in enumerate(windows, start=1) for event in alarm.check(5 * number, loads)]
    assert [(event.step, event.has_recovered) for event in events] == [(10, False), (30, True)]  # 0.56 is between
    assert str(events[0]).startswith("collapse at step 10: in layer 0 expert 1 takes 100% of the tokens (4 experts")
    assert events[0].metrics == {"collapse/0/expert": 1.0, "collapse/0/num_experts": 1.0, "collapse/0/share": 1.0}


@pytest.mark.parametrize("first_step", range(21, 26))
def test_the_alarm_comes_within_three_windows(text: Path, tmp_path: Path, first_step: int) -> None:
    alarm, first_alarm = alarm_of(text, tmp_path, 1), 0
    for end in range(WINDOW_STEPS, 100, WINDOW_STEPS):
        collapsed = max(min(end - first_step + 1, WINDOW_STEPS), 0)  # steps of the window
        loads = [12.0 * collapsed + 3.0 * (WINDOW_STEPS - collapsed), *[3.0 * (WINDOW_STEPS - collapsed)] * 3]
        events = alarm.check(end, [*loads, sum(loads)])
        first_alarm = first_alarm or (events[0].step if events else 0)
    assert first_alarm < first_step + 3 * WINDOW_STEPS


def test_two_collapsed_windows_must_follow_each_other(text: Path, tmp_path: Path) -> None:
    alarm = alarm_of(text, tmp_path, 1)
    for step in range(5, 50, 10):
        assert alarm.check(step, [100, 0, 0, 0, 100]) == []
        assert alarm.check(step + 5, [25, 25, 25, 25, 100]) == []


def test_the_event_in_words() -> None:
    event = Collapse(step=30, layer="2", experts=(4, 6), share=0.987, num_experts=8)
    assert str(event) == (
        "collapse at step 30: in layer 2 experts 4, 6 take 99% of the assignments (8 experts, steps 21 to 30)"
    )
