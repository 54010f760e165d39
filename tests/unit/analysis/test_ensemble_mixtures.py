"""Mixtures of the predictions of whole models: values by hand, and a slow computation of the posterior."""

import math
from pathlib import Path

import pytest
import torch
from support.run_folders import write_cell, write_result
from support.training_cases import tiny_config, write_text

from moebench.analysis.ensemble.measure import measure_ensemble
from moebench.analysis.ensemble.mixtures import mix_by_posterior, mix_evenly, select_model
from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.tasks.language import Language

P_MBL = torch.tensor([[[0.8, 0.5, 0.1]], [[0.2, 0.5, 0.3]]], dtype=torch.float64)
"""Two models, one sequence of three targets."""


def test_mixtures_by_hand() -> None:
    nats_BL, posterior_MBL = mix_by_posterior(P_MBL.log())
    # From an even prior: the first target makes model 0 four times as likely, the second says nothing.
    torch.testing.assert_close(posterior_MBL[0], torch.tensor([[0.5, 0.8, 0.8]], dtype=torch.float64))
    # .5 x .8 + .5 x .2 = .5;  .8 x .5 + .2 x .5 = .5;  .8 x .1 + .2 x .3 = .14
    torch.testing.assert_close(nats_BL.neg().exp(), torch.tensor([[0.5, 0.5, 0.14]], dtype=torch.float64))
    torch.testing.assert_close(mix_evenly(P_MBL.log()).neg().exp(), P_MBL.mean(0))
    assert torch.equal(select_model(P_MBL.log(), torch.tensor([1])), -P_MBL[1].log())


def test_the_posterior_against_a_double_loop() -> None:
    p_MBL = torch.rand(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    nats_BL, posterior_MBL = mix_by_posterior(p_MBL.log())
    for sequence in range(4):
        weights = [1 / 3] * 3
        for position in range(7):
            total = sum(weights)
            current = [p_MBL[model, sequence, position].item() for model in range(3)]
            expected = [weight / total for weight in weights]
            assert torch.allclose(posterior_MBL[:, sequence, position], torch.tensor(expected, dtype=torch.float64))
            mixed = sum(share * p for share, p in zip(expected, current, strict=True))
            assert math.isclose(nats_BL[sequence, position].item(), -math.log(mixed), rel_tol=1e-12)
            weights = [weight * p for weight, p in zip(weights, current, strict=True)]
    # The chain rule: a sequence's code length is that of the mean of its probabilities under the models.
    torch.testing.assert_close(nats_BL.sum(1), -p_MBL.prod(2).mean(0).log())


def test_equal_models_are_mixed_to_themselves() -> None:
    p_MBL = torch.rand(1, 2, 5, dtype=torch.float64).clamp(min=0.1).expand(3, -1, -1)
    nats_BL, posterior_MBL = mix_by_posterior(p_MBL.log())
    torch.testing.assert_close(nats_BL, -p_MBL[0].log())
    torch.testing.assert_close(posterior_MBL, torch.full_like(posterior_MBL, 1 / 3))


def test_runs_of_other_windows_are_refused_with_the_key_and_both_values(tmp_path: Path) -> None:
    text, runs = write_text(tmp_path), ("0" * 12, "1" * 12)
    tasks = {"eval_windows": 2}, {"eval_windows": 3, "data": {"held_out_domains": ["ab"]}}
    for run_id, task in zip(runs, tasks, strict=True):
        config, folder = tiny_config(text, router="dense", task=task), tmp_path / "runs" / run_id
        folder.mkdir(parents=True)
        data = {"name": "text", "digest": Language.source_digest(config.task)}
        write_cell(folder, config=to_plain(config), data=data)
        write_result(folder, config=to_plain(config))
    with pytest.raises(UsageError) as error:
        measure_ensemble(tmp_path, runs)
    assert str(error.value) == (
        f"ensemble: task.eval_windows is 2 in run {runs[0]} and 3 in run {runs[1]} (allowed: runs whose section task"
        " differs in data.held_out_domains alone)"
    )
