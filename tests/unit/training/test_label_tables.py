"""Label tables: by hand, for any counts, for every kind of routing, and over an evaluation."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import randomise_parameters
from support.training_cases import Run, tiny_config, write_text

from moebench.errors import UsageError
from moebench.ranks import SINGLE_RANK
from moebench.routing.layer_name import LayerName
from moebench.routing.metrics import label_information, label_parts
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.values import ChainRouting, LayerRecord, Routing
from moebench.tasks.task import Batch, LabelKind, position_label_kind
from moebench.training.evaluation import Evaluation, evaluate
from moebench.training.label_tables import (
    LabelCounts,
    LabelTable,
    label_tables_to_json,
    read_label_tables,
    summarise_information,
)
from moebench.training.model import build_initialised_model, prepare_task

CLUSTERS = {"name": "clustered", "sequence_length": 6, "num_clusters": 4, "width": 3, "eval_sequences": 8}


def routing_of(expert_TK: list[list[int]], num_experts: int) -> Routing:
    index_TK = torch.tensor(expert_TK)
    return Routing.from_top_k(index_TK, torch.ones(index_TK.shape), num_experts=num_experts)


def test_two_experts_and_three_labels_by_hand() -> None:
    # Two tokens of each label: label 0 always to expert 0, label 1 to either, label 2 always to expert 1.
    table = routing_of([[0], [0], [0], [1], [1], [1]], 2).tabulate_labels(torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    assert table.tolist() == [[2, 0], [1, 1], [0, 2]]
    # Each expert has half: labels 0 and 2 are ln 2 away from that, a third of the tokens each; label 1 is not.
    assert label_parts(table).tolist() == pytest.approx([math.log(2) / 3, 0, math.log(2) / 3])
    assert label_information(table) == pytest.approx(2 / 3 * math.log(2) / math.log(3))
    # Two experts hold at most ln 2 of ln 3 about three labels: one label for one expert, two for the other.
    most = label_information(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    assert most == pytest.approx(math.log(2) / (0.5 * math.log(2) + 0.5 * math.log(4)))


def test_information_by_hand() -> None:
    label_T = torch.tensor([0, 0, 1, 1])
    table = routing_of([[0], [0], [1], [1]], 2).tabulate_labels(label_T, 2)
    assert label_information(table) == pytest.approx(1.0)
    assert label_information(routing_of([[0], [1], [0], [1]], 2).tabulate_labels(label_T, 2)) == pytest.approx(0.0)
    # Label 0 always to expert 0, label 1 to either: I = H(3/4) - 1/2 · ln 2, over H(1/2) = ln 2.
    halves = routing_of([[0], [0], [0], [1]], 2).tabulate_labels(label_T, 2)
    by_hand = (-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - 0.5 * math.log(2)) / math.log(2)
    assert label_information(halves) == pytest.approx(by_hand)
    # Four labels, each with two of four experts, every expert shared by two: ln 4 - ln 2 of ln 4.
    shared = routing_of([[0, 1], [1, 2], [2, 3], [3, 0]], 4)
    assert label_information(shared.tabulate_labels(torch.arange(4), 4)) == pytest.approx(0.5)
    assert label_information(torch.tensor([[3.0, 1.0], [0.0, 0.0]])) is None  # a single label carries no information
    assert label_information(torch.zeros(2, 2)) is None


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=2, max_size=5), st.permutations(range(3))
)
def test_information_is_between_0_and_1_and_ignores_the_order(rows: list[list[int]], order: list[int]) -> None:
    table = torch.tensor(rows, dtype=torch.float64)
    value = label_information(table)
    if value is None:
        assert int((table.sum(1) > 0).sum()) < 2
        return
    assert 0 <= value <= 1
    assert (label_parts(table) >= 0).all()
    for same in (table[:, order], table.flip(0), 3 * table):
        assert label_information(same) == pytest.approx(value, abs=1e-9)


def test_dropped_assignments_are_not_counted() -> None:
    routing = routing_of([[0], [1], [1], [0]], 2).keep(torch.tensor([True, True, False, False]))
    assert routing.tabulate_labels(torch.tensor([0, 1, 0, 1]), 2).tolist() == [[1, 0], [0, 1]]


def test_chain_routing_counts_its_steps() -> None:
    chosen_TE = torch.tensor([[True, True], [True, False], [True, False]])
    routing = ChainRouting.from_table(torch.rand(3, 2), chosen_TE)
    assert routing.tabulate_labels(torch.tensor([1, 1, 0]), 2).tolist() == [[1, 0], [2, 1]]


def test_soft_routing_counts_combine_weights() -> None:
    combine_BLS = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]])
    routing = SoftRouting(dispatch_BLS=torch.zeros(1, 3, 4), combine_BLS=combine_BLS, num_experts=2)
    assert routing.tabulate_labels(torch.tensor([0, 1, 1]), 2).tolist() == [[0.75, 0.25], [0.0, 1.0]]


def test_merged_experts_count_their_weights_without_padding() -> None:
    weight_GE = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    valid_T = torch.tensor([True, True, True, False])
    routing = MergeRouting(weight_GE=weight_GE, num_tokens=4, sequence_length=2, segment_length=2, valid_T=valid_T)
    assert routing.tabulate_labels(torch.tensor([0, 1, 1, 1]), 2).tolist() == [[0.75, 0.25], [1.25, 0.75]]


def batch_of(input_BL: torch.Tensor, **fields: torch.Tensor) -> Batch:
    ones_B1 = torch.ones(len(input_BL), 1)
    return Batch(
        input_BL=input_BL, target_BP=ones_B1, weight_BP=ones_B1, domain_B=torch.arange(len(input_BL)), **fields
    )


def test_position_labels_ignore_padding() -> None:
    read = position_label_kind().read
    assert read(batch_of(torch.zeros(1, 16).long())).tolist() == [[i // 2 for i in range(16)]]
    valid_BL = torch.arange(12) < torch.tensor([[12], [8], [4], [0]])
    label_BL = read(batch_of(torch.zeros(4, 12).long(), valid_BL=valid_BL))
    assert label_BL[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]  # 8 · position // 12
    assert label_BL[1, :8].tolist() == list(range(8))
    assert label_BL[2, :4].tolist() == [0, 2, 4, 6]
    assert int(label_BL.max()) == 7


def test_encoder_and_decoder_have_their_own_labels() -> None:
    batch = batch_of(torch.tensor([[0, 1, 1]]), decoder_input_BP=torch.tensor([[2, 0]]))
    kind = LabelKind(name="token", values=("a", "b", "c"), read=lambda batch: batch.input_BL)
    counts = LabelCounts([kind, LabelKind(name="one", values=("all",), read=lambda batch: batch.input_BL * 0)])
    for _ in range(2):
        records = [
            record(LayerName(0, "encoder"), routing_of([[0], [1], [1]], 2), 3),
            record(LayerName(0, "decoder"), routing_of([[0], [1]], 2), 2),
        ]
        counts.add(batch, records)
    tables = counts.sum_over(SINGLE_RANK)
    assert list(tables) == ["token"]  # kinds with a single label are left out
    assert tables["token"].layers["encoder.0"].tolist() == [[2, 0], [0, 4], [0, 0]]
    assert tables["token"].layers["decoder.0"].tolist() == [[0, 2], [0, 0], [2, 0]]
    assert summarise_information(tables) == {"load/information/token": pytest.approx(1.0)}


def record(layer: LayerName, routing: Routing, length: int) -> LayerRecord:
    return LayerRecord(layer=layer, routing=routing, kept=routing, sequence_length=length)


def test_kinds_of_which_one_label_occurs_are_left_out() -> None:
    table = LabelTable(values=("a", "b"), layers={"0": torch.tensor([[3.0, 1.0], [0.0, 0.0]])})
    assert table.information == {}
    counts = LabelCounts([LabelKind(name="same", values=("a", "b"), read=lambda batch: batch.input_BL * 0)])
    counts.add(batch_of(torch.ones(1, 2).long()), [record(LayerName(), routing_of([[0], [1]], 2), 2)])
    assert counts.sum_over(SINGLE_RANK) == {}


def test_process_without_sequences_counts_nothing() -> None:
    counts = LabelCounts([position_label_kind()])
    empty = Routing.from_top_k(torch.zeros(0, 1).long(), torch.zeros(0, 1), num_experts=2)
    counts.add(batch_of(torch.zeros(0, 16).long()), [record(LayerName(), empty, 16)])
    assert counts.tables[LayerName()].shape == (8, 2)
    assert not counts.tables[LayerName()].any()


def evaluate_untrained(config, folder: Path) -> Evaluation:
    task = prepare_task(config, folder)
    model = randomise_parameters(build_initialised_model(config, task))
    return evaluate(model, task, task.eval_batches("test", 4), 0, torch.device("cpu"))


def test_evaluation_measures_label_information(tmp_path: Path) -> None:
    evaluation = evaluate_untrained(tiny_config(tmp_path, task=CLUSTERS, router="oracle"), tmp_path)
    assert evaluation.metrics["load/information/cluster"] == pytest.approx(1.0)
    assert [name for name in evaluation.metrics if "information" in name] == ["load/information/cluster"]
    evaluation = evaluate_untrained(tiny_config(tmp_path, task=CLUSTERS, router="hash_position"), tmp_path)
    # 48 tokens by chance: (4 - 1)² / (2 · 48 · ln 4) = 0.07 expected
    assert evaluation.metrics["load/information/cluster"] < 0.2
    text = write_text(tmp_path)
    evaluation = evaluate_untrained(tiny_config(text, router="domain"), tmp_path)
    assert evaluation.metrics["load/information/domain"] == pytest.approx(1.0)
    assert evaluation.metrics["load/information/position"] == pytest.approx(
        0.0, abs=1e-9
    )  # each domain has the same number of each position
    by_position = evaluate_untrained(tiny_config(text, router="hash_position"), tmp_path)
    # 8 positions on 4 experts, two positions for each expert: ln 8 - ln 2 of ln 8.
    assert by_position.metrics["load/information/position"] == pytest.approx(2 / 3)
    assert evaluate_untrained(tiny_config(text, router="dense"), tmp_path).labels == {}
    one = tiny_config(tmp_path, task={**CLUSTERS, "num_clusters": 1}, router="switch")
    assert evaluate_untrained(one, tmp_path).labels == {}


@pytest.mark.parametrize("router", ["soft_moe", "smear", "ponder_net", "expert_choice"])
def test_tables_of_every_kind_of_routing_count_the_same_tokens(tmp_path: Path, router: str) -> None:
    config = tiny_config(write_text(tmp_path), router=router, allow_noncausal=True)
    evaluation = evaluate_untrained(config, tmp_path)
    assert set(evaluation.labels) == {"domain", "position", "token"}
    totals = {
        name: {layer: table.sum() for layer, table in kind.layers.items()} for name, kind in evaluation.labels.items()
    }
    for layer in ("0", "1"):
        assert totals["domain"][layer] == pytest.approx(float(totals["token"][layer]))
        assert totals["domain"][layer] == pytest.approx(float(totals["position"][layer]))
    if router in ("soft_moe", "smear"):  # the weights of a token sum to 1
        assert evaluation.labels["domain"].layers["0"].sum(1).tolist() == pytest.approx([16.0, 16.0])


def test_tables_of_a_run_are_written_and_read_back(tmp_path: Path) -> None:
    run = Run(tiny_config(write_text(tmp_path), router="top_k"), tmp_path)
    result = run()
    assert result is not None
    file = tmp_path / "labels.json"
    written = json.loads(file.read_text())
    assert (written["step"], written["split"]) == (12, "test")
    tables = read_label_tables(file)
    assert summarise_information(tables) == pytest.approx(
        {k: v for k, v in result.metrics.items() if "information" in k}
    )
    # Of each domain 2 windows of 8 tokens, 2 experts each.
    assert tables["domain"].values == ("ab", "xyz")
    assert tables["domain"].layers["1"].sum(1).tolist() == [32, 32]
    file.unlink()
    resumed = Run(run.config, tmp_path)()  # killed between the last checkpoint and the result
    assert resumed is not None
    assert json.loads(file.read_text()) == written


def test_large_tables_are_measured_but_not_written(tmp_path: Path) -> None:
    layers = {"0": torch.eye(1025, 4, dtype=torch.float64)}
    table = LabelTable(values=tuple(map(str, range(1025))), layers=layers)
    assert list(summarise_information({"class": table})) == ["load/information/class"]
    assert json.loads(label_tables_to_json(3, {"class": table}))["kinds"] == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kinds": {"a": {"values": ["x"], "layers": {"0": [[1], [2]]}}}}'])
def test_damaged_tables_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "labels.json"
    with pytest.raises(UsageError, match=r"labels\.json: does not exist"):
        read_label_tables(file)
    file.write_text(text)
    with pytest.raises(UsageError, match=r"labels\.json: cannot be read"):
        read_label_tables(file)
