"""The same tasks on the same model by lm-eval's own model of transformers: the same answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.benchmark_tasks import NAMES, write_tasks
from support.pretrained_models import write_model

from moebench.analysis.benchmarks.harness import evaluate_task, quiet_harness
from moebench.analysis.benchmarks.measure import Benchmarks, EvaluationOptions
from moebench.analysis.benchmarks.tasks import TaskOptions, load_tasks
from moebench.errors import UsageError

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def evaluate_by_peer(folder: Path, model: Any, tasks: Path, shots: int) -> dict[str, list[Any]]:
    """Return the metrics of each item of each task."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    with quiet_harness():
        peer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
    items = {}
    for task in load_tasks(NAMES, TaskOptions(include=tasks, shots=shots), read_text=lambda: pytest.fail("no text")):
        peer.responses, peer.error = {}, None
        items[task.name] = [item.metrics for item in evaluate_task(peer, task.task, task.name, limit=None, seed=0)[0]]
    return items


@pytest.mark.parametrize(("model_type", "shots"), [("olmoe", 0), ("llama", 2)])
def test_items_are_those_of_lm_eval(tmp_path: Path, model_type: str, shots: int) -> None:
    model = write_model(tmp_path / "model", model_type)
    tasks = write_tasks(tmp_path / "tasks")
    expected = evaluate_by_peer(tmp_path / "model", model, tasks, shots)
    options = EvaluationOptions(tasks=NAMES, reading=TaskOptions(include=tasks, shots=shots), batch_size=4)
    results = Benchmarks(options).evaluate_pretrained(
        f"hf:{tmp_path / 'model'}", tmp_path / "results", dtype="auto", max_length=None, data=None
    )
    for result in results:
        for item, theirs in zip(result.items, expected[result.task], strict=True):
            assert set(item.metrics) == set(theirs)
            for name, value in theirs.items():
                assert item.metrics[name] == pytest.approx(value, rel=1e-5)
    assert torch.isfinite(torch.tensor(results[1].metrics["bits_per_byte"]))
    (record,) = (tmp_path / "results" / "evaluations").iterdir()
    assert {file.name.partition("-")[0] for file in record.glob("*.jsonl")} == {*NAMES}


def test_models_with_an_encoder_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "switch_transformers")
    options = EvaluationOptions(tasks=("animals",), reading=TaskOptions(include=write_tasks(tmp_path / "tasks")))
    with pytest.raises(UsageError, match="a Switch Transformers model has an encoder"):
        Benchmarks(options).evaluate_pretrained(
            f"hf:{tmp_path / 'model'}", tmp_path / "results", dtype="auto", max_length=None, data=None
        )
