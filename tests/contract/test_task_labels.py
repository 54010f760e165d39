"""Label kinds of every task: declared, in range, one label per token, without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import randomise_parameters
from support.task_data import write_data
from support.training_cases import TINY

from moebench.config import merge_settings, resolve
from moebench.models.transformer import BatchContext
from moebench.tasks.task import TASKS, Batch, Task
from moebench.training.evaluation import batch_context, evaluate
from moebench.training.model import build_initialised_model, prepare_task

KINDS = {
    "language": {"domain", "position", "token"},
    "masked_language": {"domain", "position", "token"},
    "span_corruption": {"domain", "position", "token", "sentinel"},
    "vision": {"domain", "class", "position"},
    "speech": {"domain", "position"},
    "keyword": {"domain", "position", "class"},
    "clustered": {"cluster"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return write_data(tmp_path_factory.mktemp("label_data"))


def config_of(name: str, given: dict[str, dict[str, Any]], **task: Any) -> Any:
    plain = {"model": TINY["model"], "train": TINY["train"], "layout": TINY["layout"], "router": {"name": "top_k"}}
    return resolve(merge_settings(plain, {"task": {"name": name, **given[name], **task}}))


def halves(task: Task, batch: Batch) -> list[Batch]:
    return [batch] if task.decoder_length is None else [batch, batch.decoder_batch]


@pytest.mark.parametrize("name", TASKS.names())
def test_labels_are_declared_and_in_range(name: str, data: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    task = prepare_task(config_of(name, data), tmp_path)
    kinds = {kind.name: kind for kind in task.label_kinds()}
    assert set(kinds) == KINDS[name]
    for batch in (task.train_batch(4, 0, 0), *task.eval_batches("test", 4)):
        for half in halves(task, batch):
            for kind in kinds.values():
                label_BL = kind.read(half)
                assert label_BL.dtype == torch.int64
                assert label_BL.expand(len(batch.domain_B), half.input_BL.shape[1]).numel()
                assert 0 <= int(label_BL.min()) <= int(label_BL.max()) < len(kind.values), kind.name
                assert len(set(kind.values)) == len(kind.values)


@pytest.mark.parametrize("name", TASKS.names())
def test_label_tables_count_each_assignment_once_without_padding(
    name: str, data: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(name, data)
    task = prepare_task(config, tmp_path)
    model = randomise_parameters(build_initialised_model(config, task))
    batches = task.eval_batches("test", 4)
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for batch in batches:  # by a loop over assignments and labels, layer by layer
        ctx: BatchContext = batch_context(batch, training=False, seed=0)
        for record in model(batch, ctx)[1]:
            half = batch.decoder_batch if record.layer.half == "decoder" else batch
            shape = len(batch.domain_B), record.sequence_length
            valid = torch.ones(shape) if half.valid_BL is None else half.valid_BL
            for kind in task.label_kinds():
                label_T = kind.read(half).expand(shape).reshape(-1).tolist()
                table = expected.setdefault(kind.name, {}).setdefault(
                    str(record.layer), torch.zeros(len(kind.values), 4)
                )
                pairs = zip(record.routing.token_N.tolist(), record.routing.expert_N.tolist(), strict=True)
                for token, expert in pairs:
                    table[label_T[token], expert] += float(valid.reshape(-1)[token])
    tables = evaluate(model, task, batches, 0, "cpu").labels
    several = {kind.name for kind in task.label_kinds() if (expected[kind.name].popitem()[1].sum(1) > 0).sum() > 1}
    assert set(tables) == several
    for name_of_kind, table in tables.items():
        for layer, rows in expected[name_of_kind].items():
            assert torch.equal(table.layers[layer].float(), rows), (name_of_kind, layer)


def test_position_labels_of_images(data: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    task = prepare_task(config_of("vision", data, patch=2, pooling="class_token"), tmp_path)
    position = {kind.name: kind for kind in task.label_kinds()}["position"]
    label_L = position.read(task.train_batch(1, 0, 0))[0]
    assert [position.values[label] for label in label_L[:6].tolist()] == [
        "class token", "row 1, column 1", "row 1, column 2", "row 1, column 3", "row 1, column 4", "row 2, column 1"
    ]  # fmt: skip
    fine = prepare_task(config_of("vision", data, patch=1, data=data["vision"]["data"] | {"size": 16}), tmp_path)
    position = {kind.name: kind for kind in fine.label_kinds()}["position"]
    counts = torch.bincount(position.read(fine.train_batch(1, 0, 0))[0])
    assert counts.tolist() == [4] * 64  # 16 x 16 squares, four neighbours to a place


def test_class_labels_of_images_match_the_head(data: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    held_out = data["vision"]["data"] | {"held_out_classes": [1]}
    task = prepare_task(config_of("vision", data, data=held_out, few_shot={"shots": [1], "draws": 1}), tmp_path)
    (kind,) = [kind for kind in task.label_kinds() if kind.name == "class"]
    assert kind.values == ("class0", "class2", "class3")
    batch = task.train_batch(8, 0, 0)
    assert torch.equal(kind.read(batch), batch.target_BP)


def test_sentinel_labels_of_encoder_and_decoder(data: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    task = prepare_task(config_of("span_corruption", data), tmp_path)
    (kind,) = [kind for kind in task.label_kinds() if kind.name == "sentinel"]
    batch = task.train_batch(3, 0, 0)
    # 16 tokens with round(16 · 0.15) = 2 masked in one span: one sentinel in each half.
    assert kind.read(batch).sum(1).tolist() == [1, 1, 1]
    assert kind.read(batch.decoder_batch)[:, :2].tolist() == [[0, 1]] * 3
    assert kind.read(batch.decoder_batch).sum(1).tolist() == [1, 1, 1]
