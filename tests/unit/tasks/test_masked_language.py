"""Masked language modelling: shares of BERT, reproducible masks, and metrics of selected tokens only."""

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import binom
from support.training_cases import Run, tiny_config, write_text
from torch.nn import functional

from moebench.compatibility import check_cell
from moebench.errors import UsageError
from moebench.tasks.language import Language
from moebench.tasks.masked_language import MaskedLanguage
from moebench.tasks.task import Batch
from moebench.training.model import prepare_task


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def make_task(text: Path, folder: Path, **options: object) -> MaskedLanguage:
    config = tiny_config(text, task={"name": "masked_language", "sequence_length": 8, "eval_windows": 2, **options})
    task = prepare_task(config, folder)
    assert isinstance(task, MaskedLanguage)
    return task


def is_plausible(count: int, total: int, share: float) -> bool:
    """Return whether a binomial distribution gives a count as extreme as this in one of a million cases or more."""
    return bool(binom.ppf(5e-7, total, share) <= count <= binom.isf(5e-7, total, share))


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_shares_are_those_of_bert(text: Path, tmp_path: Path, rate: float) -> None:
    task = make_task(text, tmp_path, rate=rate)
    batches = [task.train_batch(64, 0, step) for step in range(20)]
    selected = masks = kept = total = 0
    for batch in batches:
        selected_BL = batch.count_BP == 1
        total += selected_BL.numel()
        selected += int(selected_BL.sum())
        masks += int((batch.input_BL == task.mask_id).sum())
        kept += int((selected_BL & (batch.input_BL == batch.target_BP)).sum())
        assert torch.equal(batch.input_BL[~selected_BL], batch.target_BP[~selected_BL])
        assert (batch.target_BP < task.mask_id).all()
    assert is_plausible(selected, total, rate)
    assert is_plausible(masks, selected, 0.8)
    assert is_plausible(kept, selected, 0.1 + 0.1 / 257)  # a random token is the right one once in 257 times


def test_a_random_token_is_any_token(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path, rate=1.0)
    tokens = torch.cat([task.train_batch(64, 0, step).input_BL.flatten() for step in range(100)])
    random_tokens = tokens[(tokens != task.mask_id) & ~torch.isin(tokens, torch.tensor(list(b"abxyz 0123456789")))]
    assert len(random_tokens.unique()) == 257 - len(b"abxyz 0123456789")  # 51,200 · 0.1 draws from 257 leave none out


def test_masks_are_a_function_of_seed_and_step(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)
    first = task.train_batch(8, 3, 5)
    assert torch.equal(task.train_batch(8, 3, 5).input_BL, first.input_BL)
    assert not torch.equal(task.train_batch(8, 3, 6).count_BP, first.count_BP)
    assert not torch.equal(task.train_batch(8, 4, 5).count_BP, first.count_BP)
    part = task.train_batch(8, 3, 5, slice(2, 5))
    assert torch.equal(part.input_BL, first.input_BL[2:5])
    assert torch.equal(part.count_BP, first.count_BP[2:5])


def test_evaluation_masks_are_fixed(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)
    evaluations = [task.eval_batches("validation", size) for size in (100, 3, 1)]
    inputs = [torch.cat([batch.input_BL for batch in batches]) for batches in evaluations]
    assert torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[0], inputs[2])
    assert not torch.equal(inputs[0][0], task.eval_batches("test", 100)[0].input_BL[0])
    assert task.eval_digest != make_task(text, tmp_path, rate=0.3).eval_digest


def test_the_selected_tokens_are_those_that_language_predicts(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)
    language = Language(task.config, task.text)
    ours, theirs = task.train_batch(8, 0, 0), language.train_batch(8, 0, 0)
    assert torch.equal(ours.target_BP, theirs.target_BP)
    assert torch.equal(ours.weight_BP, theirs.weight_BP)
    assert task.eval_digest != language.eval_digest


def test_only_selected_tokens_count_in_the_metrics(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)
    batch = Batch(
        input_BL=torch.tensor([[1, 257, 3]]),
        target_BP=torch.tensor([[1, 2, 3]]),
        weight_BP=torch.tensor([[1, 1, 1]]),
        domain_B=torch.tensor([0]),
        count_BP=torch.tensor([[0, 1, 1]]),
    )
    # ln 2 nats for the second token (its rival is as likely), which argmax predicts; the third is predicted wrongly.
    output = torch.full((1, 3, 257), -torch.inf)
    output[0, 0, 9] = 0.0
    output[0, 1, [2, 5]] = 0.0
    output[0, 2, 3], output[0, 2, 4] = 0.0, math.log(3)
    sums = task.compute_sums(output, batch)
    assert sums["nats"].tolist() == pytest.approx([math.log(2) + math.log(4)])
    assert {name: sums[name].tolist() for name in ("weight", "correct", "masked")} == {
        "weight": [2.0],
        "correct": [1],
        "masked": [2],
    }
    both = {name: torch.stack([value[0], value[0] * 0]) for name, value in sums.items()}
    quality = task.compute_quality(both)
    assert quality == pytest.approx(
        {
            "masked_bits_per_byte": 1.5,  # 1 and 2 bits for a byte each
            "masked_bits_per_byte/ab": 1.5,
            "masked_accuracy": 0.5,
            "masked_accuracy/ab": 0.5,
        }
    )


def test_the_loss_is_the_cross_entropy_of_each_position(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)
    batch = task.train_batch(8, 0, 0)
    output = torch.randn(8, 8, 257, generator=torch.Generator().manual_seed(0))
    loss_BP = task.loss(output, batch)
    by_hand = functional.cross_entropy(output[1, 2], batch.target_BP[1, 2])
    torch.testing.assert_close(loss_BP[1, 2], by_hand)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5])
def test_rates_out_of_range_are_refused(text: Path, tmp_path: Path, rate: float) -> None:
    with pytest.raises(UsageError, match=rf"^task\.rate must be greater than 0 and at most 1, got {rate}"):
        make_task(text, tmp_path, rate=rate)


@pytest.mark.parametrize("router", [pytest.param("hash", marks=pytest.mark.slow), "dense", "expert_choice"])
def test_it_trains(text: Path, tmp_path: Path, router: str) -> None:
    config = tiny_config(
        text,
        task={"name": "masked_language", "sequence_length": 8, "eval_windows": 2, "rate": 0.5},
        router=router,
        train={"steps": 60, "learning_rate": 1e-2, "eval_every": 100, "log_every": 60},
    )
    check_cell(config)  # expert choice depends on later tokens, which the task allows
    result = Run(config, tmp_path)()
    assert result is not None
    assert result.marks == ()
    assert result.metrics["masked_bits_per_byte"] < 6  # of 8 bits at the start
    assert 0.1 < result.metrics["masked_accuracy"] <= 1
    assert {"masked_bits_per_byte/ab", "masked_accuracy/xyz"} <= set(result.metrics)


def test_the_mask_id_is_in_the_token_counts(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path, rate=0.5)
    assert task.vocab_size == len(task.token_count_V) == 258
    assert int(task.token_count_V[-1]) == int(0.4 * task.token_count_V[:-1].sum())
