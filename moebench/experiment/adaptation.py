"""`moebench adapt`: the experiment of one arm that continues from a finished run, on one domain or on other data."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moebench.config import resolve, to_plain
from moebench.errors import UsageError, require, suggest
from moebench.experiment.grid import Experiment, expand_config
from moebench.registry import Plugin
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig, ExperimentConfig
from moebench.tasks.domain_metrics import metric_names
from moebench.tasks.language import TextTask
from moebench.tasks.task import Task
from moebench.tasks.text.prepared.manifest import read_manifest
from moebench.tasks.text.prepared.reader import KEPT_OPTIONS, is_prepared
from moebench.training.model import prepare_task
from moebench.tuning_config import TuneConfig

STEPS_SHARE = 0.2
"""Updates of an adaptation, as a share of those of its parent, where none are given."""
TUNING_SEED = 100
SOURCE_KEYS = ("path", "dataset", "config", "split", "revision", "pack", "made_by", "max_bytes", "streaming")
"""Keys of `task.data` that name a source; those of another one are at their defaults."""


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """What is adapted, to what, and how."""

    to: str
    """A domain of the run's data, or a file or folder with other data."""
    trainable: str = "all"
    examples: int | None = None
    """Windows of the training split; None: all."""
    steps: int | None = None
    learning_rates: Sequence[float] = ()
    """Several are tried, and one is chosen on validation; none: that of the run."""
    expert_dropout: float | None = None
    has_balance_loss: bool = True

    def check(self) -> None:
        """Raise UsageError for values that no adaptation has, before anything is read."""
        require(self.examples is None or self.examples >= 1, "--examples", self.examples, "at least 1")
        require(self.steps is None or self.steps >= 1, "--steps", self.steps, "at least 1")
        rates = list(self.learning_rates)
        require(all(rate > 0 for rate in rates), "--learning-rate", rates, "positive numbers")
        require(len(set(rates)) == len(rates), "--learning-rate", rates, "different numbers")


def build_adaptation(
    folder: RunFolder, options: AdaptOptions, overrides: Sequence[str], plugins: Sequence[Plugin], results: Path
) -> Experiment:
    """Return the experiment of an adaptation: one arm, the seed of its parent.

    Raises UsageError for a run that is not done, a target that is no domain and no file, and a vocabulary that is not
    that of the run.
    """
    cell, state = folder.read_cell(), folder.state()
    if state != "done":
        raise UsageError(f"adapt: the run {cell['id']} ({cell['arm']}, seed {cell['seed']}) is {state}, not done")
    parent = resolve(cell["config"])
    base = _build_base(parent, cell["id"], options, results)
    seed = int(cell["seed"])
    rates = list(options.learning_rates)
    tune = TuneConfig()
    if len(rates) > 1:
        tune = TuneConfig(grid={"train.learning_rate": rates}, seeds=[TUNING_SEED if seed != TUNING_SEED else 101])
    elif rates:
        base["train"]["learning_rate"] = rates[0]
    config = ExperimentConfig(
        question=f"What does run {cell['id']} ({cell['arm']}, seed {seed}) gain on {options.to}, and what is lost?",
        base=base,
        seeds=[seed],
        tune=tune,
    )
    name = f"adapt-{cell['id']}-{_identify(base, tune, overrides)}"
    experiment = expand_config(name, config, overrides, plugins)
    return replace(experiment, notes=(*experiment.notes, *_note_trained_target(parent, cell["id"], base["task"])))


def _note_trained_target(parent: CellConfig, parent_id: str, task: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note where the target is a domain that the parent was trained on."""
    ours, theirs = task["data"], to_plain(parent.task)["data"]
    if any(ours[key] != theirs[key] for key in SOURCE_KEYS if key in ours):
        return  # other data, whose test text is looked for in the parent's
    held_out = set(theirs["held_out_domains"])
    if not held_out <= set(ours["held_out_domains"]):
        return
    yield (
        f"run {parent_id} was trained on the target domain too: its gain is that of more training, not of a new domain"
        f" (held out of that run: {', '.join(sorted(held_out)) or 'none'})"
    )


def _identify(base: Mapping[str, Any], tune: TuneConfig, overrides: Sequence[str]) -> str:
    """Return six digits that stand for the settings: another call of the same settings continues with the same runs."""
    content = json.dumps([base, to_plain(tune), sorted(overrides)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:6]


def _build_base(parent: CellConfig, parent_id: str, options: AdaptOptions, results: Path) -> dict[str, Any]:
    """Return the settings of the adaptation: those of the parent with another source of weights, data and steps."""
    base = {key: value for key, value in to_plain(parent).items() if key != "seed"}
    base["init"] = {"from": f"run:{parent_id}"}
    base["task"] = _choose_target(parent, options, results)
    train = base["train"]
    steps = options.steps or max(1, round(STEPS_SHARE * train["steps"]))
    warmup = round(train["warmup_steps"] * steps / train["steps"])
    train |= {"steps": steps, "warmup_steps": warmup, "keep_checkpoints": [], "trainable": options.trainable}
    train["eval_every"] = min(train["eval_every"], steps)
    if options.expert_dropout is not None:
        base["layout"]["expert_dropout"] = options.expert_dropout
    if not options.has_balance_loss:
        base["router"]["losses"] = dict.fromkeys(base["router"].get("losses", {}), 0.0)
    return base


def _choose_target(parent: CellConfig, options: AdaptOptions, results: Path) -> dict[str, Any]:
    """Return the section `task`: the data of the target."""
    task = to_plain(parent.task)
    if "held_out_domains" not in (task.get("data") or {}):
        raise UsageError(f"adapt: the task '{parent.task.name}' has no domains that can be held out")
    if options.examples is not None:
        if "train_windows" not in task:
            raise UsageError(f"--examples: the task '{parent.task.name}' has no task.train_windows")
        task["train_windows"] = options.examples
    trained = prepare_task(parent, results)
    names = dict(zip(metric_names(tuple(trained.domains)), trained.domains, strict=True))
    target = options.to if options.to in trained.domains else names.get(options.to)
    if target is not None:
        task["data"]["held_out_domains"] = sorted(domain for domain in trained.domains if domain != target)
        return task
    path = Path(options.to).expanduser()
    if not path.exists():
        raise UsageError(
            f"--to {options.to}: is no domain of the run's data and no file or folder.{suggest(options.to, names)}"
            f" Domains: {', '.join(trained.domains)}"
        )
    defaults = to_plain(type(parent.task.data)())  # type: ignore[attr-defined]
    task["data"] |= {key: defaults[key] for key in (*SOURCE_KEYS, "held_out_domains") if key in defaults}
    task["data"] |= {"path": str(path.absolute())}
    _require_same_vocabulary(parent, trained, task, results)
    return task


def _require_same_vocabulary(parent: CellConfig, trained: Task, task: dict[str, Any], results: Path) -> None:
    """Raise UsageError where ids of tokens mean something else in the new data, as in a folder with its tokenizer."""
    if not isinstance(trained, TextTask):
        return
    data = resolve({**to_plain(parent), "task": task}).task.data  # type: ignore[attr-defined]
    if is_prepared(data):  # its options are fixed: those of the run that it does not share are left at their defaults
        stored, defaults = read_manifest(Path(task["data"]["path"])).options, to_plain(type(data)())
        differing = [key for key, value in task["data"].items() if value != stored.get(key, defaults[key])]
        task["data"] |= {key: defaults[key] for key in differing if key not in KEPT_OPTIONS}
    adapted = prepare_task(resolve({**to_plain(parent), "task": task}), results)
    assert isinstance(adapted, TextTask)
    vocabularies = [each.text.tokenizer.to_json() for each in (trained, adapted)]
    if trained.vocab_size != adapted.vocab_size or vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"--to {task['data']['path']}: its vocabulary of {adapted.vocab_size:,} tokens is another than that of the"
            f" run, {trained.vocab_size:,} tokens (allowed: text, or a folder prepared with the run's tokenizer)"
        )
