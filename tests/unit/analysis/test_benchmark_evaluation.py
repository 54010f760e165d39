"""Tasks of lm-eval's form on a trained run, against numbers from its logits; what is stored is not computed again."""

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.benchmark_tasks import ITEMS, NAMES, write_tasks
from support.command_line import CommandLine
from support.results_folder import Results

from moebench.analysis.benchmarks.comparison import VerdictObstacle, compare_task
from moebench.analysis.benchmarks.experiment import evaluate_experiment
from moebench.analysis.benchmarks.measure import Benchmarks, EvaluationOptions
from moebench.analysis.benchmarks.report import build_experiment_report, build_model_report
from moebench.analysis.benchmarks.results import TaskResult, compute_trivial_accuracy
from moebench.analysis.benchmarks.run_model import RunModel
from moebench.analysis.benchmarks.tasks import TaskOptions
from moebench.analysis.exported_run import ExportOptions, export_run
from moebench.analysis.stored_run import find_stored_run
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError
from moebench.experiment.grid import expand
from moebench.training.evaluation import batch_context, evaluation_mode

pytest.importorskip("lm_eval")


@pytest.fixture
def results(finished: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished experiment, to be written to."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("results")


def find_run(results: Path, arm: str = "top_k") -> Any:
    return find_stored_run(results, Results(results).folder(arm, 0).name)


def evaluate(results: Path, folder: Path, arm: str = "top_k", **options: Any) -> dict[str, TaskResult]:
    reading = TaskOptions(include=folder, **options.pop("reading", {}))
    benchmarks = Benchmarks(EvaluationOptions(tasks=options.pop("tasks", NAMES), reading=reading, **options))
    return {result.task: result for result in benchmarks.evaluate_run(find_run(results, arm), results)}


class Logits:
    """The logits of a run, one text at a time: an independent computation of every score."""

    def __init__(self, results: Path, arm: str = "top_k") -> None:
        self.run = TrainedRun.open(results, Results(results).folder(arm, 0).name)
        self.model = self.run.load_model()
        self.length = self.run.config.task.sequence_length

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """Return the log-probabilities of the token after each of at most `length` tokens."""
        token_BM = torch.tensor([[*tokens, 0]])
        batch = self.run.task.make_batch(token_BM, token_BM, torch.tensor([2]), None)  # a domain it was not trained on
        with evaluation_mode(self.model):
            output, _ = self.model(batch, batch_context(batch, training=False, seed=0))
        return output[0].log_softmax(-1)

    def continuation(self, context: str, continuation: str) -> float:
        tokens = [256, *context.encode(), *continuation.encode()]
        kept = tokens[-self.length - 1 :]
        number = len(continuation.encode())
        log_p = self(kept[:-1])[-number:]
        return float(log_p.gather(1, torch.tensor(kept[-number:]).unsqueeze(1)).sum())

    def text(self, text: str) -> float:
        tokens = [256, *text.encode()]
        assert len(tokens) <= self.length + 1
        log_p = self(tokens[:-1])
        return float(log_p.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).sum())

    def generate(self, prompt: str, until: str, limit: int) -> str:
        tokens, new = [256, *prompt.encode()], b""
        while len(new) < limit:
            tokens.append(int(self(tokens[-self.length :])[-1].argmax()))
            if tokens[-1] == 256:
                break
            new += bytes(tokens[-1:])
            if until in new.decode(errors="replace"):
                break
        return new.decode(errors="replace").partition(until)[0]


def test_metrics_by_item_are_those_of_the_logits(results: Path, tmp_path: Path) -> None:
    evaluated, logits = evaluate(results, write_tasks(tmp_path / "tasks")), Logits(results)
    choices = [[item["first"], item["second"], item["third"]] for item in ITEMS]
    scores = [
        [logits.continuation(f"{item['question']} Answer:", f" {choice}") for choice in row]
        for item, row in zip(ITEMS, choices, strict=True)
    ]
    normed = [
        [score / len(choice) for score, choice in zip(*rows, strict=True)] for rows in zip(scores, choices, strict=True)
    ]
    for metric, values in {"acc": scores, "acc_norm": normed}.items():
        right = [float(row.index(max(row)) == item["answer"]) for row, item in zip(values, ITEMS, strict=True)]
        assert [item.metrics[metric] for item in evaluated["animals"].items] == right
        assert evaluated["animals"].metrics[metric] == pytest.approx(sum(right) / len(right))
    nats = [logits.text(item["question"]) for item in ITEMS]
    sums = [item.metrics["bits_per_byte"] for item in evaluated["sentences"].items]
    assert [value for value, _ in sums] == pytest.approx(nats, abs=1e-4)
    num_bytes = sum(len(item["question"]) for item in ITEMS)
    assert evaluated["sentences"].metrics["bits_per_byte"] == pytest.approx(-sum(nats) / num_bytes / math.log(2))
    texts = [logits.generate(item["question"], " ", 5) for item in ITEMS]
    matches = [float(text == item["first"]) for text, item in zip(texts, ITEMS, strict=True)]
    assert [item.metrics["exact_match"] for item in evaluated["continuations"].items] == matches
    stored = [json.loads(line) for line in Path(evaluated["continuations"].file).read_text().splitlines()]
    assert [line["response"] for line in stored if "response" in line] == [[text] for text in texts]
    # Chance, and the answer that is right most often: 2 in three of six.
    trivial = {"chance": 1 / 3, "constant answer": 0.5}
    assert compute_trivial_accuracy(evaluated["animals"].items) == pytest.approx(trivial)
    # The model reads 32 bytes: separator, question and " Answer:" are longer, but for "Which one hoots?".
    assert [item.is_truncated for item in evaluated["animals"].items] == [True, True, True, False, True, True]
    assert evaluated["sentences"].num_truncated == 0


def test_errors_are_those_of_lm_eval(results: Path, tmp_path: Path) -> None:
    from lm_eval.api.metrics import mean_stderr

    evaluated = evaluate(results, write_tasks(tmp_path / "tasks"))
    animals = evaluated["animals"]
    values = [item.metrics["acc"] for item in animals.items]
    assert animals.standard_error("acc") == pytest.approx(mean_stderr(values))
    # A ratio of two sums, by its jackknife, which its linearisation approximates.
    sums = torch.tensor([item.metrics["bits_per_byte"] for item in evaluated["sentences"].items], dtype=torch.float64)
    left_out = (sums.sum(0) - sums)[:, 0] / (sums.sum(0) - sums)[:, 1] / -math.log(2)
    jackknife = float(((left_out - left_out.mean()) ** 2).sum() * (len(sums) - 1) / len(sums)) ** 0.5
    assert evaluated["sentences"].standard_error("bits_per_byte") == pytest.approx(jackknife, rel=0.1)


def test_what_is_stored_is_not_computed_again(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tasks(tmp_path / "tasks")
    first = evaluate(results, folder, limit=4)
    file = Path(first["animals"].file)
    assert len(first["animals"].items) == 4
    asked: list[int] = []
    score = RunModel.score
    monkeypatch.setattr(RunModel, "score", lambda self, windows: asked.append(len(windows)) or score(self, windows))
    second = evaluate(results, folder, batch_size=1)
    assert len(second["animals"].items) == 6
    assert sum(asked) == 2 * 3 + 2  # the last two items alone
    # An interrupted evaluation: a torn last line is dropped, and its answer computed again.
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    asked.clear()
    assert evaluate(results, folder, tasks=("animals",))["animals"].items == second["animals"].items
    assert sum(asked) == 6 * 3 - 4
    asked.clear()
    again = evaluate(results, folder)
    assert again == second
    assert asked == []
    monkeypatch.setattr(RunModel, "load", None)  # the model is not loaded either
    assert evaluate(results, folder) == second


def test_examples_in_the_context_depend_on_the_seed(results: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    files = {
        (shots, seed): evaluate(results, folder, tasks=("animals",), reading={"shots": shots, "seed": seed})[
            "animals"
        ].file
        for shots, seed in ((0, 0), (0, 1), (2, 0), (2, 1))
    }
    assert files[0, 0] == files[0, 1]
    assert len(set(files.values())) == 3


def test_packaged_tasks_need_no_files(results: Path) -> None:
    names = ("moebench_cloze", "moebench_text")
    benchmarks = Benchmarks(EvaluationOptions(tasks=names, limit=12))
    run = find_run(results)
    cloze, text = benchmarks.evaluate_run(run, results)
    assert set(cloze.by_domain("acc")) == {"a", "b"}
    assert all(item.num_choices == 4 for item in cloze.items)
    reference = {each.task: each for each in benchmarks.compute_references(run, results)}
    assert 0 < reference["moebench_text"].metrics["bits_per_byte"] < text.metrics["bits_per_byte"] + 8
    report = build_model_report([cloze, text], [*reference.values()])
    assert report.values["tasks"]["moebench_cloze"]["trivial"]["acc"]["chance"] == 0.25
    assert "| moebench_text | bits_per_byte ↓ |" in report.to_markdown()


def test_arms_are_compared_item_by_item(results: Path, tmp_path: Path) -> None:
    experiment = expand(Path("tiny.yaml"))
    reading = TaskOptions(include=write_tasks(tmp_path / "tasks"))
    options = EvaluationOptions(tasks=("sentences", "animals"), reading=reading)
    progress: list[str] = []
    options = replace(options, on_progress=lambda subject, number, total: progress.append(f"{subject} {number}"))
    evaluation = evaluate_experiment(experiment, results, options)
    assert progress[:2] == ["dense, seed 0, sentences 6", "dense, seed 0, animals 18"]
    assert "unigram, sentences 6" in progress
    sentences, animals = evaluation.comparisons
    assert [difference.arm for difference in sentences.differences] == ["switch", "top_k"]
    for difference in sentences.differences:
        values = {arm: sentences.get_values(arm, "bits_per_byte") for arm in ("dense", difference.arm)}
        expected = sum(values[difference.arm][seed] - values["dense"][seed] for seed in (0, 1, 2)) / 3
        assert difference.difference is not None
        assert difference.difference.mean == pytest.approx(expected)
        assert difference.difference.num_items == len(ITEMS)
        assert difference.verdict in ("better", "worse", "undecided")
    report = build_experiment_report(evaluation)
    assert report.values["tasks"]["animals"]["differences"]["switch"]["seeds"] == [0, 1, 2]
    assert "| (constant answer) |" in report.to_markdown()
    unequal = {"switch": VerdictObstacle(verdict="not matched", marks=("≠FLOPs",))}
    comparison = compare_task("animals", animals.results, "dense", unequal)
    marked = build_experiment_report(replace(evaluation, comparisons=(comparison,)))
    assert "| not matched (≠FLOPs) |" in marked.to_markdown()
    assert "≠FLOPs: executed forward FLOPs per token are more than 2 %" in marked.to_markdown()
    assert animals.metric == "acc"


def test_an_exported_run_has_the_bits_per_byte_of_the_run(results: Path, tmp_path: Path) -> None:
    tasks, out = write_tasks(tmp_path / "tasks"), tmp_path / "out"
    run = evaluate(results, tasks, arm="dense", tasks=("sentences", "moebench_text"))
    opened = TrainedRun.open(results, find_run(results, "dense").id)
    export_run(opened, ExportOptions(out=out, format="hf"), results)
    options = EvaluationOptions(tasks=("sentences", "moebench_text"), reading=TaskOptions(include=tasks))
    exported = Benchmarks(options).evaluate_pretrained(f"hf:{out}", results, dtype="auto", max_length=None, data="text")
    for result in exported:
        same = run[result.task]
        assert [item.digest for item in result.items] == [item.digest for item in same.items]
        assert result.metrics["bits_per_byte"] == pytest.approx(same.metrics["bits_per_byte"], rel=1e-5)


def test_a_safetensors_export_is_refused_with_what_is_evaluated(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    opened = TrainedRun.open(results, find_run(results, "dense").id)
    export_run(opened, ExportOptions(out=out, format="safetensors"), results)
    benchmarks = Benchmarks(EvaluationOptions(tasks=("moebench_text",)))
    with pytest.raises(UsageError, match=r"out: is an export with --format safetensors, .*\(allowed: the run itself"):
        benchmarks.evaluate_pretrained(f"hf:{out}", results, dtype="auto", max_length=None, data="text")


def test_libraries_log_nothing_while_tasks_are_read(caplog: pytest.LogCaptureFixture) -> None:
    from moebench.analysis.benchmarks.harness import quiet_harness

    # Whether its messages reach pytest depends on what other libraries have set, so levels are compared.
    caplog.set_level(logging.WARNING, logger="huggingface_hub")
    logger = logging.getLogger("huggingface_hub.utils._http")
    with quiet_harness():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.WARNING)


def test_a_verdict_needs_seeds_and_the_same_items(results: Path, tmp_path: Path) -> None:
    base = evaluate(results, write_tasks(tmp_path / "tasks"), tasks=("animals",))["animals"]

    def with_scores(*scores: float) -> TaskResult:
        items = tuple(replace(item, metrics={"acc": s}) for item, s in zip(base.items, scores, strict=True))
        return replace(base, items=items, metrics={"acc": sum(scores) / len(scores)})

    low = {seed: with_scores(*[0.0] * 5, float(seed == 1)) for seed in range(5)}
    high = {seed: with_scores(*[1.0] * 5, float(seed != 2)) for seed in range(5)}
    two = {seed: high[seed] for seed in (0, 1)}
    other = {seed: replace(run, items=run.items[::-1]) for seed, run in high.items()}
    arms = {"dense": low, "good": high, "two": two, "other": other, "spoiled": high}
    compared = compare_task("animals", arms, "dense", {"spoiled": VerdictObstacle(verdict="diverged")})
    verdicts = {each.arm: each.verdict for each in compared.differences}
    marks = {each.arm: each.marks for each in compared.differences}
    assert marks == {"good": (), "two": (), "other": ("≠items",), "spoiled": ()}
    unequal = {"good": VerdictObstacle(verdict="not matched", marks=("≠FLOPs",))}
    (refused,) = compare_task("animals", {"dense": low, "good": high}, "dense", unequal).differences
    assert refused.to_dict()["marks"] == ["≠FLOPs"]
    assert verdicts == {"good": "better", "two": "too few seeds", "other": "not matched", "spoiled": "diverged"}
    (reverse,) = compare_task("animals", {"good": high, "dense": low}, "good", {}).differences
    assert reverse.verdict == "worse"
    (strict,) = compare_task(
        "animals", {"dense": low, "good": high}, "dense", {"good": VerdictObstacle(level=1e-9)}
    ).differences
    assert strict.verdict == "undecided"


def test_runs_that_cannot_be_evaluated_are_one_line(results: Path, tmp_path: Path) -> None:
    run = find_run(results)
    benchmarks = Benchmarks(EvaluationOptions(tasks=("moebench_cloze",)))
    refused = replace(run, config=replace(run.config, router=replace(run.config.router)))
    object.__setattr__(refused.config.layout, "capacity_factor_eval", 1.0)
    object.__setattr__(refused.config.layout, "drop_order", "score")
    with pytest.raises(UsageError, match=f"run {run.id}: layout.drop_order: 'score' lets later tokens push out"):
        benchmarks.evaluate_run(refused, results)


GREEDY = "generation_kwargs: {until: [' '], max_gen_toks: 5, do_sample: true, temperature: 0.7}"


def test_sampling_is_refused(results: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    file = folder / "generate.yaml"
    file.write_text(
        file.read_text().replace('generation_kwargs: {until: [" "], max_gen_toks: 5, do_sample: false}', GREEDY)
    )
    with pytest.raises(UsageError, match="generation_kwargs: sets sampling"):
        evaluate(results, folder, tasks=("continuations",))
