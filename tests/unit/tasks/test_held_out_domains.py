"""Domains held out of training: splits, metrics, and invalid configurations."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import tiny_config

from moebench.errors import UsageError
from moebench.tasks.task import average_by_domain
from moebench.tasks.text.sources import TextDataConfig, source_digest
from moebench.tasks.text.windows import prepare
from moebench.training.evaluation import evaluate
from moebench.training.model import build_initialised_model, prepare_task

TASKS = ("language", "masked_language", "span_corruption")
LETTERS = "xyz"
"""Three domains; all texts of one are of one letter, and x and y share their groups."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {"text": letter * (100 + number), "domain": letter, "group": f"{'z' if letter == 'z' else ''}{number}"}
        for number in range(10)
        for letter in LETTERS
    ]
    file = tmp_path_factory.mktemp("letters") / "letters.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def options(path: str, *held_out: str) -> dict[str, Any]:
    return {"path": path, "group_column": "group", "held_out_domains": list(held_out)}


def tiny_task(path: str, tmp_path: Path, name: str, *held_out: str) -> tuple[Any, Any]:
    task = {"name": name, "sequence_length": 16, "eval_windows": 5, "data": options(path, *held_out)}
    config = tiny_config(path, task=task, router="switch")
    return config, prepare_task(config, tmp_path)


def collect_letters(task: Any, *batches: Any) -> set[str]:
    """Return the letters in inputs and targets of batches."""
    tokens = {int(t) for batch in batches for x in (batch.input_BL, batch.target_BP) for t in x.unique()}
    return {chr(token) for token in tokens if token < 256} & set(LETTERS)


@pytest.mark.parametrize("name", TASKS)
def test_training_and_validation_never_see_what_is_held_out(path: str, tmp_path: Path, name: str) -> None:
    _, task = tiny_task(path, tmp_path, name, "y")
    assert (task.domains, task.num_held_out, task.num_trained_domains) == (("x", "z", "y"), 1, 2)
    num_steps = task.text.train.num_windows  # batches of one: a whole epoch and a little more
    batches = [task.train_batch(2, 0, step) for step in range(num_steps // 2 + 1)]
    assert collect_letters(task, *batches) == collect_letters(task, *task.eval_batches("validation", 4)) == {"x", "z"}
    assert {int(d) for batch in batches for d in batch.domain_B} == {0, 1}
    assert task.token_count_V[ord("y")] == 0
    assert task.token_count_V[ord("x")] > 0
    assert task.token_pairs()[ord("y")].sum() == 0


@pytest.mark.parametrize("name", TASKS)
def test_the_test_set_has_all_domains_and_no_batch_mixes_them(path: str, tmp_path: Path, name: str) -> None:
    _, task = tiny_task(path, tmp_path, name, "y")
    batches = task.eval_batches("test", 4)
    # Five windows each: ten of training's domains, then five of the one held out.
    assert [batch.domain_B.tolist() for batch in batches] == [[0] * 4, [0, 1, 1, 1], [1, 1], [2] * 4, [2]]
    assert collect_letters(task, *batches[:3]) == {"x", "z"}
    assert collect_letters(task, *batches[3:]) == {"y"}


def test_the_test_text_of_a_domain_is_the_same_whether_it_is_held_out_or_not(path: str, tmp_path: Path) -> None:
    # What it costs not to have trained on a domain is a difference on one and the same text; groups stay evaluation.
    _, without = tiny_task(path, tmp_path, "language")
    _, task = tiny_task(path, tmp_path, "language", "y")
    for domain in LETTERS:
        ours, theirs = (
            torch.cat([b.input_BL[b.domain_B == t.domains.index(domain)] for b in t.eval_batches("test", 4)])
            for t in (task, without)
        )
        assert torch.equal(ours, theirs)
    assert task.digest != without.digest
    assert task.eval_digest != without.eval_digest


def test_metrics_by_hand() -> None:
    sums = torch.tensor([2.0, 4.0, 9.0, 7.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])
    metrics = average_by_domain("bits", *sums, ["a", "b", "c", "d"], 2)
    assert metrics == {
        "bits": 6 / 4,
        "bits/out_of_domain": 16 / 4,
        "bits/a": 2,
        "bits/b": 4 / 3,
        "bits/c": 3,
        "bits/d": 7,
    }
    only_validated = average_by_domain("bits", torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), ["a", "b"], 1)
    assert only_validated == {"bits": 2, "bits/a": 2}


@pytest.mark.parametrize("name", TASKS)
def test_metrics_cover_trained_or_held_out_domains(path: str, tmp_path: Path, name: str) -> None:
    config, task = tiny_task(path, tmp_path, name, "y")
    model = build_initialised_model(config, task)
    with torch.no_grad():  # x is likelier than anything else, so that domains differ
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    result = evaluate(model, task, task.eval_batches("test", 4), 0, "cpu")
    batches = task.eval_batches("test", 4)
    inside, outside = (evaluate(model, task, part, 0, "cpu") for part in (batches[:3], batches[3:]))
    metric = task.metric
    assert result.quality[metric] == pytest.approx(inside.quality[metric], rel=1e-12)
    assert result.quality[f"{metric}/out_of_domain"] == outside.quality[f"{metric}/y"] == result.quality[f"{metric}/y"]
    assert result.quality[f"{metric}/out_of_domain"] != result.quality[metric]
    assert result.load_by_layer == inside.load_by_layer
    assert result.load == inside.load | outside.load
    assert "load/max_violation/out_of_domain" in result.load
    # One held-out domain: its label is constant, so experts have no information on it.
    assert "load/information/domain" in result.load
    assert "load/information/domain/out_of_domain" not in result.load
    validated = evaluate(model, task, task.eval_batches("validation", 4), 0, "cpu").metrics
    assert not [key for key in validated if "out_of_domain" in key or key.endswith("/y")]


def test_an_untrained_model_is_as_good_out_of_domain_as_in(path: str, tmp_path: Path) -> None:
    config, task = tiny_task(path, tmp_path, "language", "y")
    quality = evaluate(build_initialised_model(config, task), task, task.eval_batches("test", 4), 0, "cpu").quality
    assert quality["bits_per_byte/out_of_domain"] == pytest.approx(math.log2(257), rel=0.1)


@pytest.mark.parametrize("router", ["domain", "domain_posterior", "task_level", "multi_gate", "routing_networks"])
def test_routers_on_domains_serve_held_out_domains(path: str, tmp_path: Path, router: str) -> None:
    config, task = tiny_task(path, tmp_path, "language", "y", "z")
    config = tiny_config(path, task={"name": "language", "sequence_length": 16}, router=router)
    model = build_initialised_model(config, task)
    metrics = evaluate(model, task, task.eval_batches("test", 4), 0, "cpu").metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["load/unserved/out_of_domain"] == 0


def test_the_source_digest_depends_on_held_out_domains(path: str) -> None:
    held_out = [source_digest(TextDataConfig(**options(path, *names))) for names in ("", "x", "xy", "yx")]
    assert len(set(held_out)) == 3
    assert held_out[2] == held_out[3]


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        (["w"], ["'w' is unknown", "Allowed: x, y, z"]),
        (["x", "x"], ["each domain once"]),
        (["x", "y", "z"], ["some of x, y, z", "so that some are left"]),
    ],
)
def test_invalid_held_out_domains_are_refused(path: str, tmp_path: Path, held_out: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(TextDataConfig(**options(path, *held_out)), tmp_path, 16)
    assert all(word in str(caught.value) for word in ["task.data.held_out_domains", *words])
    assert "\n" not in str(caught.value)


def test_a_domain_named_like_the_metric_is_refused(tmp_path: Path) -> None:
    for name in ("out_of_domain", "other"):
        (tmp_path / "text" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "text" / name / f"{number}.txt").write_text(f"{name} {number} " * 100)
    path = str(tmp_path / "text")
    for held_out in ([], ["other"]):
        with pytest.raises(UsageError, match=r"task\.data\.domain_column: there is a domain 'out_of_domain'"):
            prepare(TextDataConfig(path=path, held_out_domains=held_out, tokenizer="bytes"), tmp_path, 16)
