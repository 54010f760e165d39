"""Where a value that is not finite occurs first: step, batch, layer and tensor, in training and in evaluation."""

import re
from pathlib import Path

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text

from moebench.launch.error_report import classify_error
from moebench.registry import load_plugin
from moebench.runs.result import Fault
from moebench.training import compilation
from moebench.training.batches import build_loss_normalizer
from moebench.training.divergence import NonFiniteError
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.non_finite import FindingList, trace_step

ROUTER = Path(__file__).parents[2] / "support" / "spoiled_router.py"
BATCH = r"batch 3 of seed 0 \(windows (\d+, ){3}\d+\)"

pytestmark = pytest.mark.usefixtures("plugin")  # routers are taken back after each test


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (
            {"call": 0},
            r"the activation of backbone\.blocks\.0\.feed_forward\.router \(weight_N\): 32 of 32 values are nan",
        ),
        (
            {"call": 1},
            r"the activation of backbone\.blocks\.1\.feed_forward\.router \(weight_N\): 32 of 32 values are nan",
        ),
        (
            {"call": 1, "kind": "inf"},  # the router's input is the output of the norm before it
            r"the gradient of the activation of backbone\.blocks\.1\.feed_forward_norm: \d+ of 256 values are .*",
        ),
    ],
    ids=["first layer", "second layer", "gradient"],
)
def test_failure_names_step_batch_and_layer(text: Path, tmp_path: Path, options: dict, place: str) -> None:
    load_plugin(str(ROUTER))
    run = Run(tiny_config(text, router={"name": "spoiled", **options}), tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        run()
    pattern = rf"(loss|gradient norm) is (nan|inf) at step 4; no update was made; {BATCH}, first in {place}"
    assert re.fullmatch(pattern, str(caught.value)), caught.value
    assert classify_error(caught.value) == Fault.DIVERGED


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning", "ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_trace_of_compiled_blocks_names_a_module_inside(text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = tiny_config(text, router="top_k", train={"compile": True})
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task)
    compilation.compile_blocks(module.model, torch.device("cpu"))
    for step, value in ((0, None), (1, 3e38)):  # what is compiled for step 1 is what its repetition finds
        with torch.no_grad():
            if value is not None:
                dict(module.model.named_parameters())["backbone.blocks.0.feed_forward.bank.w_out_EFD"].fill_(value)
        batch = module.source.make_micro_batches(step)[0]
        outputs, records = module.run_passes(batch, batch_context(batch, training=True, seed=0, step=step))
        normalizer = build_loss_normalizer(batch, config, module.mesh)
        module.compute_loss(batch, outputs, records, normalizer)[0].total.backward()
        module.zero_grad()
    assert "first in the activation of backbone.blocks.0.feed_forward:" in trace_step(module, 1)
    torch._dynamo.reset()


def test_a_parameter_is_named_before_what_it_spoils(text: Path, tmp_path: Path, monkeypatch) -> None:
    original = CellModule.__init__

    def spoil(self: CellModule, *args) -> None:
        original(self, *args)
        with torch.no_grad():
            self.model.get_parameter("backbone.blocks.0.attention_norm.weight")[2] = torch.nan

    monkeypatch.setattr(CellModule, "__init__", spoil)
    with pytest.raises(
        NonFiniteError, match=r"the parameter backbone\.blocks\.0\.attention_norm\.weight: 1 of 8 values"
    ):
        Run(tiny_config(text), tmp_path)()


def test_a_norm_that_overflows_is_not_blamed_on_a_layer(text: Path, tmp_path: Path) -> None:
    # Gradients near 1e30 are finite, their squares are not.
    config = tiny_config(text, router={"name": "switch", "losses": {"z": 1e30}})
    with pytest.raises(NonFiniteError, match=r"^gradient norm is inf at step 1; .*every loss and gradient of its rep"):
        Run(config, tmp_path)()


def test_evaluation_names_split_batch_and_layer(text: Path, tmp_path: Path, capfd) -> None:
    load_plugin(str(ROUTER))
    run = Run(tiny_config(text, router={"name": "spoiled", "step": -1}), tmp_path)
    place = r"batch 0 of the split, first in the activation of backbone\.blocks\.1\.feed_forward\.router \(weight_N\): "
    with pytest.raises(NonFiniteError, match=rf"^the validation split gives .* after step 12: {place}"):
        run()
    lines = capfd.readouterr().out.splitlines()
    # Training continues after an evaluation that is not the last: its loss is finite.
    assert [line.split(":")[0].rsplit(" ", 1)[1] for line in lines if line.startswith("the validation split")] == [
        "5",
        "10",
        "12",
    ]
    assert max(step for step, _ in run.points()) == 12


def test_nothing_is_traced_in_normal_steps(text: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a step without a fault is traced")

    monkeypatch.setattr(FindingList, "check", refuse)
    assert Run(tiny_config(text), tmp_path)() is not None
