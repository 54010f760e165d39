"""Random numbers of routers in evaluation depend on the seed, the batch and the position in it."""

import pytest
import torch
from support.training_cases import tiny_config, write_text

from moebench.ranks import Span
from moebench.routing.router import ROUTERS
from moebench.seeds import make_generator
from moebench.training.evaluation import batch_context, evaluate, probe
from moebench.training.model import build_initialised_model, prepare_task


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_every_batch_of_an_evaluation_draws_other_numbers(text, tmp_path) -> None:
    config = tiny_config(text, router={"name": "random"}, task={"eval_windows": 32})
    task = prepare_task(config, tmp_path)
    batches = task.eval_batches("validation", 2)
    assert len(batches) > 8
    model = build_initialised_model(config, task)
    load = torch.tensor(evaluate(model, task, batches, 5, "cpu").load_by_layer["0"])
    # The draws of batch n, repeated here: they depend on the seed, the number of the batch and the layer.
    slow = torch.zeros(4, dtype=torch.int64)
    first = torch.zeros(4, dtype=torch.int64)
    for number, batch in enumerate(batches):
        purpose = ("micro-batch", number) if number else ()
        draw = make_generator(5, "router in evaluation", *purpose, 0)
        num_tokens = batch.weight_BP.numel()
        drawn_E = torch.rand(num_tokens, 4, generator=draw).argmax(-1).bincount(minlength=4)
        slow, first = slow + drawn_E, drawn_E if number == 0 else first
    assert torch.equal(load, slow)
    assert not torch.equal(load, first * len(batches)), "the same draws in each batch"
    # Each expert has a quarter of all tokens, within five standard deviations.
    mean = load.sum() / 4
    assert (load - mean).abs().max() < 5 * (mean * 3 / 4).sqrt()
    # Half a batch draws what the full batch draws for the same tokens.
    halves = [batch.part(Span(start=start, length=1, total=2)) for batch in batches[:3] for start in (0, 1)]
    part_loads = []
    for number, half in enumerate(halves):
        _, records = model.eval()(half, batch_context(half, training=False, seed=5, micro_batch=number // 2))
        part_loads.append(records[0].routing.load_E)
    full_load = torch.tensor(evaluate(model, task, batches[:3], 5, "cpu").load_by_layer["0"])
    assert torch.equal(torch.stack(part_loads).sum(0), full_load)


@pytest.mark.parametrize("name", sorted(e.name for e in ROUTERS.entries() if e.facts.causality.draws_in_evaluation))
def test_router_that_draws_in_evaluation_draws_by_batch(text, tmp_path, name: str) -> None:
    config = tiny_config(text, router={"name": name})
    task = prepare_task(config, tmp_path)
    model, batch = build_initialised_model(config, task).eval(), task.eval_batches("validation", 2)[0]
    experts = []
    for number in (0, 1, 1):
        _, records = model(batch, batch_context(batch, training=False, seed=0, micro_batch=number))
        experts.append(records[0].routing.compact().expert_N.tolist())
    assert experts[0] != experts[1]
    assert experts[1] == experts[2]


def test_every_batch_of_a_probe_draws_other_numbers(text, tmp_path) -> None:
    config = tiny_config(text, router={"name": "random"})
    task = prepare_task(config, tmp_path)
    model, batch = build_initialised_model(config, task), task.eval_batches("validation", 2)[0]
    features: list[torch.Tensor] = []

    class TwoBatches:
        def probe(self, compute_features, batch_size: int) -> dict[str, float]:
            features.extend(compute_features(batch) for _ in range(2))
            return {}

    for _ in range(2):
        probe(model, TwoBatches(), 2, 0, "cpu")
    assert not torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    assert torch.equal(features[1], features[3])
