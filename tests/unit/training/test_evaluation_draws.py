"""What routers draw in an evaluation: a function of the seed, the batch and the place in it, anew in every batch."""

import pytest
import torch
from moebench.training.evaluation import batch_context, evaluate, probe
from support.training_cases import tiny_config, write_text

from moebench.ranks import Span
from moebench.routing.router import ROUTERS
from moebench.seeds import make_generator
from moebench.training.model import initialised_model, prepare_task


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_every_batch_of_an_evaluation_draws_anew(text, tmp_path) -> None:
    config = tiny_config(text, router={"name": "random"}, task={"eval_windows": 32})
    task = prepare_task(config, tmp_path)
    batches = task.eval_batches("validation", 2)
    assert len(batches) > 8
    model = initialised_model(config, task)
    load = torch.tensor(evaluate(model, task, batches, 5, "cpu").load_by_layer["0"])
    # The draws of batch n, made here: from the seed, the number of the batch and the layer.
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
    # Over all tokens each expert has a quarter, within five deviations of a fair draw.
    mean = load.sum() / 4
    assert (load - mean).abs().max() < 5 * (mean * 3 / 4).sqrt()
    # Half of each batch draws what the whole one draws for these tokens.
    halves = [batch.part(Span(start=start, length=1, total=2)) for batch in batches[:3] for start in (0, 1)]
    parts = []
    for number, half in enumerate(halves):
        _, records = model.eval()(half, batch_context(half, training=False, seed=5, micro_batch=number // 2))
        parts.append(records[0].routing.load_E)
    three = torch.tensor(evaluate(model, task, batches[:3], 5, "cpu").load_by_layer["0"])
    assert torch.equal(torch.stack(parts).sum(0), three)


@pytest.mark.parametrize("name", sorted(e.name for e in ROUTERS.entries() if e.facts.causality.draws_in_evaluation))
def test_whoever_draws_in_evaluation_draws_by_the_batch(text, tmp_path, name: str) -> None:
    config = tiny_config(text, router={"name": name})
    task = prepare_task(config, tmp_path)
    model, batch = initialised_model(config, task).eval(), task.eval_batches("validation", 2)[0]
    found = []
    for number in (0, 1, 1):
        _, records = model(batch, batch_context(batch, training=False, seed=0, micro_batch=number))
        found.append(records[0].routing.compact().expert_N.tolist())
    assert found[0] != found[1]
    assert found[1] == found[2]


def test_every_batch_of_a_probe_draws_anew(text, tmp_path) -> None:
    config = tiny_config(text, router={"name": "random"})
    task = prepare_task(config, tmp_path)
    model, batch = initialised_model(config, task), task.eval_batches("validation", 2)[0]
    found: list[torch.Tensor] = []

    class Probed:
        def probe(self, read, batch_size: int) -> dict[str, float]:
            found.extend(read(batch) for _ in range(2))
            return {}

    for _ in range(2):
        probe(model, Probed(), 2, 0, "cpu")
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
