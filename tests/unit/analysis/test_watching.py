"""The view of a run: what it shows, that it fits, and that it follows the files."""

import time
from pathlib import Path

import pytest
from filelock import FileLock
from support.run_folders import write_cell, write_result

from moebench.analysis.watching import run_history
from moebench.analysis.watching.frame import Screen, build_frame, build_line, describe_state
from moebench.analysis.watching.run_history import RunHistory, Series
from moebench.errors import UsageError
from moebench.runs.folder import RunFolder
from moebench.runs.layer_series import LayerValues
from moebench.runs.recorder import RunRecorder


def build_layer(load: tuple[int, ...], *, entropy: float | None = 0.5) -> LayerValues:
    logits = {"entropy": entropy, "logit_max": 2.5, "logit_std": 1.0} if entropy is not None else {}
    counts = {"tokens": 8, "dropped": 2, "rerouted": 0, "unserved": 1}
    return LayerValues(load=load, **counts, experts_per_token=1.0, flops_per_token=1e3, **logits)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of eight layers, the sixth of which has collapsed."""
    path = tmp_path / "runs" / "3fa9c1d2e07b"
    path.mkdir(parents=True)
    write_cell(path, config={"train": {"steps": 600}})
    record_steps(RunFolder(path), 1, 12)
    return RunFolder(path)


def record_steps(folder: RunFolder, first: int, last: int) -> None:
    with RunRecorder(folder) as recorder:
        for step in range(first, last + 1):
            recorder.append(step, {"loss/task": 6 - step / 10, "train/tokens_per_s": 3400.0})
            collapsed = step >= 9
            layers = {str(n): build_layer((8, 0, 0, 0) if collapsed and n == 5 else (2, 2, 3, 1)) for n in range(8)}
            recorder.record_layers(step, layers)
            if step == 10:
                recorder.append(step, {"eval/bits_per_byte": 3.1274})
                recorder.append(
                    step,
                    {
                        "collapse/layers": 1.0,
                        "collapse/5/expert": 3.0,
                        "collapse/5/num_experts": 1.0,
                        "collapse/5/share": 0.97,
                    },
                )


def test_values_that_are_no_numbers_are_shown(folder: RunFolder) -> None:
    with RunRecorder(folder) as recorder:
        for step, value in enumerate((float("nan"), float("inf"), -1.7e308, 1.7e308), start=13):
            recorder.append(step, {"loss/task": value, "eval/bits_per_byte": value, "collapse/6/expert": value})
    lines = build_frame(open_history(folder), Screen(width=80))
    assert [line for line in lines if line.startswith("! layer 5")]


def open_history(folder: RunFolder) -> RunHistory:
    history = RunHistory(folder)
    history.update()
    return history


def test_the_view_of_a_run(folder: RunFolder) -> None:
    lines = build_frame(open_history(folder), Screen(width=80))
    assert lines[:4] == [
        "switch, seed 0 (3fa9c1d2e07b)  not running, step 12/600",
        "3.40k tokens/s, validation bits per byte 3.127",
        "loss 4.8 ██▇▆▆▅▄▃▃▂▁▁",
        "! layer 5 collapsed at step 10 into expert 3 (97%)",
    ]
    assert lines[5].split() == ["layer", "MaxVio", "dead", "dropped"]
    assert lines[6].split() == ["0", "█" * 12, "0.5", "▁" * 12, "0", "█" * 12, "25.0%"]
    assert lines[11].split()[:5] == ["5", "▂" * 8 + "█" * 4, "3", "▁" * 8 + "█" * 4, "3"]
    assert lines[15].split() == ["layer", "entropy", "max", "logit"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 250])
@pytest.mark.parametrize("has_blocks", [True, False])
def test_every_line_fits(folder: RunFolder, width: int, has_blocks: bool) -> None:
    lines = build_frame(open_history(folder), Screen(width=width, has_blocks=has_blocks))
    assert max(map(len, lines)) <= width
    assert all(any(line.startswith(str(layer)) for line in lines) for layer in range(8))
    for quantity in run_history.QUANTITIES:
        assert any(quantity in line for line in lines)
    if not has_blocks:
        assert "\n".join(lines).isascii()


@pytest.mark.parametrize("height", [12, 24, 50])
def test_a_small_screen_shows_the_collapsed_layer(folder: RunFolder, height: int) -> None:
    lines = build_frame(open_history(folder), Screen(width=80, height=height))
    assert len(lines) <= max(height, 12)
    assert any(line.startswith("5 ") for line in lines)
    assert any("of 8 layers" in line for line in lines) == (height < 50)


def test_quantities_that_no_layer_has_are_left_out(folder: RunFolder) -> None:
    folder.layers.unlink()
    with RunRecorder(folder) as recorder:
        recorder.record_layers(12, {"0": build_layer((1, 1), entropy=None)})
    text = "\n".join(build_frame(open_history(folder), Screen(width=100)))
    assert "entropy" not in text
    assert "dropped" in text


def test_a_dense_run_has_its_loss(folder: RunFolder) -> None:
    folder.layers.unlink()
    assert build_frame(open_history(folder), Screen())[-1] == "no expert layer has been recorded"


def test_a_history_follows_its_files(folder: RunFolder) -> None:
    history = open_history(folder)
    assert not history.update()
    record_steps(folder, 13, 14)
    assert history.update()
    assert history.step == 14
    assert history.layers["0"]["MaxVio"].steps == [*range(1, 15)]
    assert build_line(history).startswith("step 14/600  loss 4.6  MaxVio 3  dead 3  dropped 25.0%")


def test_a_run_that_goes_back_to_a_checkpoint_has_no_step_twice(folder: RunFolder) -> None:
    history = open_history(folder)
    for path in (folder.journal, folder.layers):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    record_steps(folder, 7, 8)
    history.update()
    assert history.loss.steps == history.layers["3"]["dead"].steps == [*range(1, 9)]
    assert not history.collapses


def test_a_layer_that_recovers_is_not_marked(folder: RunFolder) -> None:
    with RunRecorder(folder) as recorder:
        recorder.append(13, {"collapse/layers": 0.0, "collapse/5/recovered": 0.2})
    assert not open_history(folder).collapses


def test_the_end_of_a_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    history = open_history(folder)
    assert not history.is_over  # something may come
    now = time.monotonic() + run_history.SILENT_S + 1
    monkeypatch.setattr("moebench.analysis.watching.run_history.time.monotonic", lambda: now)
    with FileLock(folder.lock):
        assert not history.is_over
        assert describe_state(history) == "training, step 12/600"
    assert history.is_over
    write_result(folder.path, step=600)
    assert history.update()
    assert describe_state(history) == "done, step 12/600"


def test_damage_is_an_error_in_one_line(folder: RunFolder) -> None:
    folder.layers.write_text("x\n")
    with pytest.raises(UsageError, match=r"layers\.jsonl, line"):
        open_history(folder)


def test_a_cell_without_steps_is_shown(folder: RunFolder) -> None:
    for config in ({}, {"train": []}, {"train": {"steps": "x"}}):
        write_cell(folder.path, config=config)
        assert describe_state(open_history(folder)).endswith("step 12/0")


def test_long_series_are_thinned() -> None:
    series = Series()
    for step in range(10_000):
        series.add(step, float(step))
    assert len(series.steps) <= run_history.MAX_POINTS
    assert (series.steps[0], series.last) == (0, 9999.0)
