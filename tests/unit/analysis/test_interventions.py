"""Interventions on a model and their effects: each equals a slow computation, and leaves the model as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training_cases import tiny_config, write_text
from torch import Tensor

from moebench.analysis.interventions.effect import Effect, Predictions, compute_effect
from moebench.analysis.interventions.routing_changes import (
    change_routing,
    drop_expert,
    replace_routers,
    shuffle_tokens,
)
from moebench.experts.layer import MoELayer
from moebench.routing.mixing import SoftRouting
from moebench.routing.values import Routing
from moebench.seeds import make_generator
from moebench.tasks.task import Batch, LabelKind
from moebench.training.evaluation import batch_context
from moebench.training.model import Model, build_initialised_model, prepare_task


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def build(text: Path, router: str, seed: int = 0) -> tuple[Model, Batch]:
    """Return an untrained model with random biases of nothing, and a batch."""
    config = replace(tiny_config(text, router=router, allow_noncausal=True), seed=seed)
    task = prepare_task(config, text.parent)
    return build_initialised_model(config, task).eval(), task.eval_batches("validation", 4)[0]


def run(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        hidden, _ = model.compute_hidden(batch, batch_context(batch, training=False, seed=0))
    return hidden


def layers_of(model: Model) -> dict[str, MoELayer]:
    return {str(layer.name): layer for layer in model.backbone.moe_layers()}


@pytest.mark.parametrize("router", ["switch", "top_k", "expert_choice", "dynmoe", "remoe", "soft_moe"])
def test_leaving_an_expert_out_is_as_if_it_returned_zero(text: Path, router: str) -> None:
    model, batch = build(text, router)
    before = run(model, batch)
    layer = layers_of(model)["1"]
    with change_routing({"1": layer}, lambda routing, ctx: drop_expert(routing, 2)):
        left_out = run(model, batch)
    assert torch.equal(run(model, batch), before)
    with torch.no_grad():
        layer.bank.w_out_EFD[2] = 0.0
    torch.testing.assert_close(run(model, batch), left_out)
    assert not torch.equal(left_out, before)


def test_shuffled_tokens_keep_loads_and_weights_and_padding() -> None:
    expert_TK = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]])
    weight_TK = torch.arange(10.0).view(5, 2)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=4, scores_TE=torch.arange(20.0).view(5, 4))
    valid_T = torch.tensor([True, False, True, True, True])
    shuffled = shuffle_tokens(routing, valid_T, make_generator("shuffle"))
    assert shuffled.top_k == 2
    assert torch.equal(shuffled.token_N, routing.token_N)
    assert torch.equal(shuffled.load_E, routing.load_E)
    new_TK, original = shuffled.weight_N.view(5, 2), {tuple(row) for row in weight_TK.tolist()}
    assert {tuple(row) for row in new_TK.tolist()} == original
    assert new_TK[1].tolist() == weight_TK[1].tolist()
    assert not torch.equal(new_TK, weight_TK)
    for token, row in enumerate(new_TK.tolist()):  # experts, weights and scores of a token go together
        source = weight_TK.tolist().index(row)
        assert shuffled.expert_N.view(5, 2)[token].tolist() == expert_TK[source].tolist()
        assert torch.equal(shuffled.scores_TE[token], routing.scores_TE[source])


def test_shuffling_a_list_of_any_length_moves_whole_tokens() -> None:
    chosen_TE = torch.tensor([[True, True, False], [False, False, False], [False, True, False], [True, True, True]])
    weight_TE = torch.arange(12.0).view(4, 3)
    routing = Routing.from_table(weight_TE, chosen_TE).compact()
    shuffled = shuffle_tokens(routing, None, make_generator(1))
    tables = [torch.zeros(4, 3).index_put((each.token_N, each.expert_N), each.weight_N) for each in (routing, shuffled)]
    assert sorted(tables[0].tolist()) == sorted(tables[1].tolist())
    assert tables[0].tolist() != tables[1].tolist()
    assert shuffled.token_N.tolist() == sorted(shuffled.token_N.tolist())


@pytest.mark.parametrize("router", ["top_k", "loss_free", "act", "smear"])
def test_other_routers_route_and_the_trained_ones_come_back(text: Path, router: str) -> None:
    model, batch = build(text, router)
    other, _ = build(text, router, seed=1)
    for layer in layers_of(other).values():
        for parameter in layer.router.parameters():
            parameter.data.mul_(50)
    before, trained = run(model, batch), {name: layer.router for name, layer in layers_of(model).items()}
    routers = {name: layer.router for name, layer in layers_of(other).items()}
    with replace_routers(layers_of(model), routers):
        assert layers_of(model)["0"].router is routers["0"]
        assert not torch.equal(run(model, batch), before)
    assert {name: layer.router for name, layer in layers_of(model).items()} == trained
    assert torch.equal(run(model, batch), before)


def test_the_effect_by_hand() -> None:
    # Five sequences of two predictions; changes 1, 1, 1, 1, 6 give a mean of 1 nat per prediction.
    effect = compute_effect(torch.tensor([1.0, 1, 1, 1, 6]).double(), torch.full((5,), 2.0).double())
    # Residuals -1, -1, -1, -1, 4: 20 · 5/4 = 25, whose root over 10 predictions is 0.5.
    assert (effect.change, effect.error, effect.num_sequences) == (1.0, pytest.approx(0.5), 5)
    low, high = effect.interval(1) or (0, 0)
    assert (low, high) == (pytest.approx(1 - 2.776445 * 0.5), pytest.approx(1 + 2.776445 * 0.5))
    wider = effect.interval(10) or (0, 0)
    assert wider[1] - 1 == pytest.approx(5.597568 * 0.5, abs=1e-5)  # t of 4 degrees of freedom at 1 - 0.0025


def test_sequences_without_a_prediction_count_nowhere() -> None:
    with_empty = compute_effect(torch.tensor([1.0, 2, 0, 3, 4, 5, 0]), torch.tensor([1.0, 1, 0, 1, 1, 1, 0]))
    assert with_empty == compute_effect(torch.tensor([1.0, 2, 3, 4, 5]), torch.ones(5))
    assert compute_effect(torch.tensor([1.0, 2]), torch.ones(2)) == Effect(change=1.5, error=None, num_sequences=2)
    assert compute_effect(torch.zeros(2), torch.zeros(2)).interval(1) is None


def test_equal_sequences_have_the_interval_of_their_number() -> None:
    # The standard error of a ratio with equal counts is that of a mean.
    change = torch.randn(40, generator=make_generator("effect"), dtype=torch.float64)
    effect = compute_effect(change * 8, torch.full((40,), 8.0, dtype=torch.float64))
    assert effect.error == pytest.approx(float(change.std() / 40**0.5))


def test_effects_by_label_are_those_of_their_predictions() -> None:
    label_BP, count_BP = torch.tensor([[0, 1, 1], [1, 0, 2]]), torch.ones(2, 3, dtype=torch.float64)
    kind = LabelKind(name="kind", values=("a", "b", "c", "d"), read=lambda batch: label_BP)
    predictions = Predictions(count=[count_BP], kinds=[kind], labels={"kind": [label_BP]})
    effects = predictions.compute_label_effects([torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)])["kind"]
    assert {label: effect.change for label, effect in effects.items()} == {"a": 3.0, "b": 3.0, "c": 6.0}
    assert effects["c"].num_sequences == 1
    assert predictions.compute_effect([torch.ones(2, 3, dtype=torch.float64)]).change == 1.0


def test_labels_of_positions_say_nothing_of_one_prediction_per_sequence() -> None:
    class Task:
        """Stands for a task with three kinds of labels."""

        def label_kinds(self) -> list[LabelKind]:
            position = torch.arange(4)[None]
            return [
                LabelKind(name="domain", values=("a", "b"), read=lambda batch: batch.domain_B[:, None]),
                LabelKind(name="position", values=("0", "1", "2", "3"), read=lambda batch: position),
                LabelKind(name="constant", values=("all",), read=lambda batch: position * 0),
            ]

    def batch(num_predictions: int) -> Batch:
        target = torch.zeros(2, num_predictions, dtype=torch.int64)
        return Batch(input_BL=torch.zeros(2, 4), target_BP=target, weight_BP=target + 1, domain_B=torch.tensor([0, 1]))

    one, all_positions = (Predictions.of(Task(), [batch(number)]) for number in (1, 4))  # type: ignore[arg-type]
    assert [kind.name for kind in one.kinds] == ["domain"]
    assert [kind.name for kind in all_positions.kinds] == ["domain", "position"]
    assert all_positions.labels["position"][0].tolist() == [[0, 1, 2, 3]] * 2


def test_a_soft_routing_without_an_expert_loses_its_slots() -> None:
    routing = SoftRouting.from_logits(torch.randn(2, 3, 4), num_experts=2)
    dropped = drop_expert(routing, 1)
    assert isinstance(dropped, SoftRouting)
    assert torch.equal(dropped.combine_BLS[..., :2], routing.combine_BLS[..., :2])
    assert dropped.combine_BLS[..., 2:].abs().sum() == 0
    assert torch.equal(dropped.dispatch_BLS, routing.dispatch_BLS)
