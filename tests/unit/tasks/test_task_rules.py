"""Plug-in tasks whose class, data or batches break a rule: each is refused in one line with the file and the rule."""

from pathlib import Path
from typing import Any

import pytest
from support.broken_plugins import TASK, assert_one_line, write_broken
from support.training_cases import TINY, Run

from moebench.config import merge_settings, resolve
from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.plugin_errors import ContractError
from moebench.registry import load_plugin
from moebench.schema import CellConfig
from moebench.tasks.contract import read_source_digest

BATCH = (
    "        return Batch(input_BL=token_BM[:, 1:], target_BP=token_BM[:, :-1], weight_BP=ones_BL, domain_B=domain_B)\n"
)
QUALITY = '        return average_by_domain("nats", sums["nats"], sums["weight"], self.domains)\n'
LOSS = "        return loss_T.view_as(batch.target_BP)\n"
SETS = "        return [self.draw(batch_size, split)]\n"
GENERATOR = ', generator=make_generator("broken", *purpose)'
LABELS = "    def build_head"

REGISTRATION = {
    "no task": ("class Broken(Task):", "class Broken:", ["must be a class that derives from Task"]),
    "a missing method": ("    def loss(", "    def losses(", ["it must define loss"]),
    "several missing methods": (
        "    def eval_batches(self, split, batch_size):\n" + SETS + "\n    def build_embedding",
        "    def embed",
        ["it must define build_embedding, eval_batches"],
    ),
    "prepare of an instance": (
        "    @classmethod\n    def prepare(cls, config, cache):\n        return cls(config)",
        "    def prepare(self, config, cache):\n        return self",
        ["prepare must be a static or class method"],
    ),
    "no part of a batch": (
        "step, part=ALL):",
        "step):",
        ["train_batch must take (batch_size, seed, step, part), got train_batch(self, batch_size, seed, step)"],
    ),
    "a property that is a method": (
        LABELS,
        f"    def tokens_per_sequence(self):\n        return 8\n\n{LABELS}",
        ["tokens_per_sequence must be a property"],
    ),
    "a method that is a value": (LABELS, f"    probe = {{}}\n\n{LABELS}", ["probe must be a method"]),
    "a fact of another type": ("causal=True", 'causal="yes"', ["TaskFacts(causal) must be of type bool, got 'yes'"]),
    "an unknown output": ("causal=True", 'causal=True, output="pixels"', ["TaskFacts(output) must be one of 'tokens'"]),
}
"""What is replaced in the plug-in, by what, and what the error names; refused when the file is loaded."""

DIGESTS = {
    "no digest": (
        "        return cls.digest\n",
        "        cls.digest\n",
        ["source_digest must return a text", "got None"],
    ),
    "a digest that fails": (
        "        return cls.digest\n",
        "        return open('none').read()\n",
        ["source_digest: FileNotFound"],
    ),
}
"""Refused when an experiment is read."""

PREPARING = {
    "prepare that raises": (
        "        return cls(config)\n",
        "        return 1 / 0\n",
        ["prepare: ZeroDivisionError", "(line 34)"],
    ),
    "prepare without a return": (
        "        return cls(config)\n",
        "        cls(config)\n",
        ["prepare must return the task", "NoneType"],
    ),
    "domains without a comma": ('("symbols",)', '("symbols")', ["domains must be a tuple of names, got 'symbols'"]),
    "no domains": ('("symbols",)', "()", ["domains must be different names, at least one"]),
    "too many held out": (
        "    vocab_size = 16\n",
        "    num_held_out = 1\n    vocab_size = 16\n",
        ["num_held_out", "got 1"],
    ),
    "no digest of the evaluation set": (
        "    digest = eval_digest =",
        "    digest =",
        ["eval_digest must be a text", "None"],
    ),
    "no length": ("        self.sequence_length = 8\n", "", ["sequence_length must be a whole number", "got None"]),
    "tokens without a vocabulary": (
        '    vocab_size = 16\n    domains = ("symbols",)\n    digest = eval_digest = "broken-1"\n',
        '    domains = ("symbols",)\n    digest = eval_digest = "broken-1"\n    token_count_V = None\n',
        ["token_count_V must be a tensor with one count", "vocab_size=None"],
    ),
    "counts of another vocabulary": (
        "torch.ones(16,",
        "torch.ones(17,",
        ["token_count_V", "vocab_size=16", "got [17]"],
    ),
    "a batch that is a mapping": (
        BATCH,
        "        return {'input_BL': token_BM}\n",
        ["train_batch", "AttributeError", "'part'"],
    ),
    "a batch without targets": (
        BATCH,
        BATCH.replace("target_BP=token_BM[:, :-1], ", ""),
        ["train_batch: TypeError", "'target_BP'"],
    ),
    "a batch that fails": (BATCH, "        return token_BM.nothing\n", ["train_batch: AttributeError", "'nothing'"]),
    "weights of another batch": (
        BATCH,
        BATCH.replace("weight_BP=ones_BL", "weight_BP=ones_BL[1:]"),
        ["sequences", "weight_BP with 3"],
    ),
    "weights without predictions": (
        BATCH,
        BATCH.replace("weight_BP=ones_BL", "weight_BP=domain_B"),
        ["weight_BP of shape [B, P]"],
    ),
    "ids of another type": (
        BATCH,
        BATCH.replace("token_BM[:, 1:]", "token_BM[:, 1:].int()"),
        ["input_BL as int64", "torch.int32"],
    ),
    "ids beyond the vocabulary": (
        BATCH,
        BATCH.replace("token_BM[:, 1:]", "token_BM[:, 1:] + 9"),
        ["token ids from 0 to 15"],
    ),
    "a domain that does not exist": (
        BATCH,
        BATCH.replace("domain_B=domain_B", "domain_B=domain_B + 1"),
        ["domain_B", "from 0 to 0"],
    ),
    "domains as numbers": (
        BATCH,
        BATCH.replace("domain_B=domain_B", "domain_B=0"),
        ["domain_B is a tensor", "got int"],
    ),
    "a mask of numbers": (
        BATCH,
        BATCH.replace("domain_B=domain_B", "domain_B=domain_B, valid_BL=ones_BL"),
        ["valid_BL as torch.bool of shape [2, 8], got torch.int64"],
    ),
    "counts of another shape": (
        BATCH,
        BATCH.replace("domain_B=domain_B", "domain_B=domain_B, count_BP=ones_BL[:, 1:]"),
        ["count_BP as torch.int64 of shape [2, 8], got torch.int64 [2, 7]"],
    ),
    "draws of the process": (GENERATOR, "", ["train_batch must be a function of its arguments", "make_generator"]),
    "all sequences for a part": (
        "range(batch_size)[part]",
        "range(batch_size)",
        ["part=slice(0, 2) must return 2 sequences", "with 4"],
    ),
    "other sequences for a part": (
        "whole = self.draw(batch_size, seed, step)",
        "whole = self.draw(batch_size, seed, step, span.stop)",
        ["must return the sequences `part` of the batch"],
    ),
    "no evaluation set": (
        SETS,
        "        self.draw(batch_size, split)\n",
        ["eval_batches('validation') must return a sequence", "NoneType"],
    ),
    "an empty evaluation set": (
        SETS,
        "        return []\n",
        ["eval_batches('validation')", "at least one, got list of 0"],
    ),
    "an evaluation set that changes": (
        SETS,
        "        self.calls = getattr(self, 'calls', 0) + 1\n        return [self.draw(batch_size, self.calls)]\n",
        ["eval_batches('validation') must return the same set each time"],
    ),
    "an unknown split": (
        SETS,
        '        return {"validation": [self.draw(4)]}[split]\n',
        ["eval_batches('test'): KeyError: 'test'"],
    ),
    "labels that are names": (
        LABELS,
        f"    def label_kinds(self):\n        return ('domain',)\n\n{LABELS}",
        ["label_kinds must return LabelKind objects, got str"],
    ),
    "labels beyond their names": (
        LABELS,
        "    def label_kinds(self):\n        return [LabelKind(name='a', values=['b'], read=lambda b: b.input_BL)]\n"
        + LABELS,
        ["label_kinds must read labels from 0 to 0 of kind 'a'"],
    ),
}
"""Refused before anything is trained."""


def config() -> CellConfig:
    plain = {section: TINY[section] for section in ("model", "layout", "train")}
    return resolve(merge_settings(plain, {"task": {"name": "broken"}, "model": {"tie_embeddings": False}}))


@pytest.mark.parametrize(("old", "new", "words"), REGISTRATION.values(), ids=REGISTRATION)
def test_registration(plugin: Any, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, TASK, old, new, "my_task.py")
    with pytest.raises(UsageError) as caught:
        load_plugin(path)
    assert_one_line(caught.value, words, path)


@pytest.mark.parametrize(("old", "new", "words"), DIGESTS.values(), ids=DIGESTS)
def test_digests(plugin: Any, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, TASK, old, new, "my_task.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        read_source_digest(config().task)
    assert_one_line(caught.value, ["task 'broken'", *words], path)


@pytest.mark.parametrize(("old", "new", "words"), PREPARING.values(), ids=PREPARING)
def test_preparation_and_trial(plugin: Any, tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, TASK, old, new, "my_task.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        ModelCosts(tmp_path).task(config())
    assert_one_line(caught.value, ["task 'broken'", *words], path)


def test_the_unbroken_task_is_tried_and_trained(plugin: Any, tmp_path: Path) -> None:
    load_plugin(plugin.write(TASK, name="my_task.py"))
    ModelCosts(tmp_path).task(config())
    result = Run(config(), tmp_path)()
    assert result is not None
    assert "nats" in result.metrics
