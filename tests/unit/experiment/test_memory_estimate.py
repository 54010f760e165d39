"""The estimated memory of a cell: worked by hand, and what is refused by it."""

import math
from pathlib import Path

import pytest
import yaml
from support.tiny_experiment import tiny, write_text
from support.training_cases import tiny_config
from support.training_cases import write_text as write_text_file
from torch import nn

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.memory import count_fitting_cells, estimate_memory, require_memory
from moebench.experiment.model_costs import ModelCosts
from moebench.experts.layer import MoELayer
from moebench.models.memory import COPIES_IN_BF16_ON_CPU, COPIES_OF_A_VALUE, ModelSize, StepMemory
from moebench.models.storageless import build_without_storage
from moebench.tasks.deferred_logits import CHUNK_LOGITS
from moebench.training.model import build_model


class _Dense:
    def moe_layers(self) -> list[MoELayer]:
        return []


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny()))
    return expand(tmp_path / "tiny.yaml")


def test_a_dense_model_by_hand() -> None:
    # A table of 5 x 4 gives 4 values per token, a map from 4 to 3 takes 4 and gives 3; 20 + 12 + 3 parameters.
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    size = ModelSize.of(model, _Dense())
    assert (size.replicated_params, size.expert_params, size.values_per_token) == (35, 0, 11)
    # At the end of the forward pass there are no gradients: three copies of each parameter, two of each value.
    assert size.training_bytes(10, StepMemory(copies=2.0)) == 4 * (3 * 35 + 2 * 11 * 10)
    # Those of an earlier micro-batch are there; AdamW has temporary tensors, but later.
    accumulating = StepMemory(copies=2.0, keeps_gradients=True)
    assert size.training_bytes(10, accumulating) == math.ceil(4 * (4.6 * 35 + 2 * 11 * 10))
    # Without activations the update decides: AdamW's, and Muon's on 20 of the elements at a time.
    assert size.training_bytes(0, StepMemory()) == math.ceil(4 * 4.6 * 35)
    assert size.training_bytes(0, StepMemory(batched_update=20)) == 4 * (4 * 35 + 4 * 20)


def test_bf16_copies_of_networks_by_hand(tmp_path: Path) -> None:
    # 8 of 12 parameters are experts', on two processes, and 2 those of a dense network: half a copy in fp32 each.
    size = ModelSize(replicated_params=4, expert_params=8, values_per_token=100, network_params=2)
    step = StepMemory(shards=2, copies=1.0, weight_copies=0.5)
    assert size.training_bytes(1, step) == 4 * (3 * (4 + 4) + 100) + 2 * (2 + 4)
    # Two layers: four experts of 2 x 8 x 8 in each, or a network of 2 x 8 x 16.
    text, costs = write_text_file(tmp_path), ModelCosts(tmp_path)
    sizes = [costs.facts(tiny_config(text, router=router)).size for router in ("top_k", "dense")]
    assert [(size.expert_params, size.network_params) for size in sizes] == [(2 * 4 * 128, 0), (0, 2 * 256)]
    # Where the backward pass does not read them as they are, they are besides the other values.
    for recompute, weight_copies in (("blocks", 0.5), ("none", 0.0)):
        config = tiny_config(text, train={"precision": "bf16", "recompute": recompute, "batch_size": 1024})
        step = StepMemory(copies=COPIES_IN_BF16_ON_CPU, weight_copies=weight_copies)
        expected = costs.facts(config).size.training_bytes(costs.tokens_per_process(config), step)
        assert costs.training_bytes(config) == expected


def test_each_half_of_an_encoder_decoder_sees_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    task = {"name": "span_corruption", "sequence_length": 32, "eval_windows": 4}
    base = {"task": task | {"data": {"path": "text", "tokenizer": "bytes"}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(base=base, grid={"router": ["dense"]})))
    (cell, *_) = expand(tmp_path / "tiny.yaml").cells
    costs = ModelCosts(tmp_path / "results")
    prepared = costs.task(cell.config)
    assert prepared.decoder_length is not None
    with build_without_storage():
        model = build_model(cell.config, prepared)
    halves = [ModelSize.of(half, half).values_per_token for half in (model.backbone.encoder, model.backbone.decoder)]
    table, head = (16, 16 + prepared.vocab_size)
    encoded, decoded = prepared.sequence_length, prepared.decoder_length
    values = table * (encoded + decoded) + halves[0] * encoded + (halves[1] + head) * decoded
    expected = values / (encoded + decoded)
    assert costs.facts(cell.config).size.values_per_token == pytest.approx(expected)


def test_logits_in_chunks_and_recomputed_blocks_by_hand(tmp_path: Path) -> None:
    costs = ModelCosts(tmp_path)
    needed = {
        name: costs.training_bytes(tiny_config(write_text_file(tmp_path), router="dense", train=options))
        for name, options in {
            "kept": {"cross_entropy": "full"},
            "chunked": {"cross_entropy": "chunked"},
            "blocks": {"recompute": "blocks"},
        }.items()
    }
    tokens, copies, vocabulary = 4 * 8, COPIES_OF_A_VALUE, 257
    # All logits of a batch this small are one chunk.
    assert needed["chunked"] == needed["kept"]
    # A block: 8 -> 24 and 8 -> 8 in attention, 8 -> 16 and 16 -> 8 in the network. Of two blocks, one is kept.
    block = (8 + 24) + (8 + 8) + (8 + 16) + (16 + 8)
    assert needed["kept"] - needed["blocks"] == pytest.approx(4 * copies * tokens * (block - 2 * 8), abs=1)
    size = ModelSize(replicated_params=0, expert_params=0, values_per_token=300, logits_of_heads=((vocabulary, 1000),))
    assert size.training_bytes(3, StepMemory(copies=1.0)) == 4 * 300 * 3  # 771 logits
    assert size.training_bytes(10**6, StepMemory(copies=1.0)) == 4 * ((300 - vocabulary) * 10**6 + CHUNK_LOGITS)


def test_more_processes_need_more_memory_and_too_much_is_refused(
    grid: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = ModelCosts(tmp_path / "results")
    need = estimate_memory(grid.cells[0].config, costs).total_bytes
    require_memory(grid.cells, costs)
    monkeypatch.setattr("moebench.experiment.memory.available_memory", lambda: 3 * need)
    assert 1 <= count_fitting_cells(grid.cells, costs) <= 3
    monkeypatch.setattr("moebench.experiment.memory.available_memory", lambda: need // 2)
    assert count_fitting_cells(grid.cells, costs) == 1
    with pytest.raises(UsageError, match=r"^dense: needs about .*MiB, and this machine has .*--ignore-memory\)$"):
        require_memory(grid.cells, costs)
