"""Small plug-ins that work, for tests that break one rule in each, and what they expect of the error."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROUTER = '''
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Form, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="y = x",
        paper="arXiv:0000.00000",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
    )
)
class Broken(Router):
    """Send each token to its best expert."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options."""

        name: str = "broken"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        weight_TK, expert_TK = logits_TE.softmax(-1).topk(1)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=logits_TE.softmax(-1)
        )
'''
LAYOUT = """
from dataclasses import dataclass

from moebench.experts.layout import (
    LAYOUTS, BlockPlan, Experts, ExpertShape, Layout, LayoutConfig, LayoutFacts, place_experts
)


@LAYOUTS.register(LayoutFacts(placement="the top block alone", paper="none"))
class Broken(Layout):
    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        name: str = "broken"

    @staticmethod
    def plan(config, num_layers):
        bank = Experts(shapes=config.shapes)
        return place_experts([num_layers - 1], num_layers, bank)
"""
TASK = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from moebench.ranks import Span
from moebench.seeds import make_generator
from moebench.tasks.language import TokenEmbedding, TokenHead
from moebench.tasks.task import ALL, TASKS, Batch, LabelKind, Task, TaskConfig, TaskFacts, average_by_domain


@TASKS.register(TaskFacts(causal=True, metric="nats", lower_is_better=True, data="random symbols"))
class Broken(Task):
    vocab_size = 16
    domains = ("symbols",)
    digest = eval_digest = "broken-1"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        name: str = "broken"

    def __init__(self, config):
        self.sequence_length = 8
        self.token_count_V = torch.ones(16, dtype=torch.int64)

    @classmethod
    def source_digest(cls, config):
        return cls.digest

    @classmethod
    def prepare(cls, config, cache):
        return cls(config)

    def draw(self, size, *purpose):
        token_BM = torch.randint(16, (size, 9), generator=make_generator("broken", *purpose))
        ones_BL = torch.ones(size, 8, dtype=torch.int64)
        domain_B = ones_BL[:, 0] * 0
        return Batch(input_BL=token_BM[:, 1:], target_BP=token_BM[:, :-1], weight_BP=ones_BL, domain_B=domain_B)

    def train_batch(self, batch_size, seed, step, part=ALL):
        span = range(batch_size)[part]
        whole = self.draw(batch_size, seed, step)
        return whole.part(Span(start=span.start, length=len(span), total=batch_size))

    def eval_batches(self, split, batch_size):
        return [self.draw(batch_size, split)]

    def build_embedding(self, d_model):
        return TokenEmbedding(16, d_model)

    def build_head(self, d_model):
        return TokenHead(d_model, 16, bias=False)

    def loss(self, output, batch):
        loss_T = functional.cross_entropy(output.flatten(0, 1), batch.target_BP.reshape(-1), reduction="none")
        return loss_T.view_as(batch.target_BP)

    def compute_quality(self, sums):
        return average_by_domain("nats", sums["nats"], sums["weight"], self.domains)
"""


def write_broken(plugin: Any, text: str, old: str, new: str, name: str) -> str:
    """Write a plug-in with one mistake and return its path."""
    assert text.count(old) == 1, old
    # A text that was loaded before is not loaded again: every test has its own.
    path: str = plugin.write(f"{text.replace(old, new)}# {plugin.folder}\n", name=name)
    return path


def assert_one_line(error: BaseException, words: Sequence[str], file: str) -> None:
    """Check that an error is one line that names the file and the rule."""
    assert "\n" not in str(error)
    for word in [*words, Path(file).name]:
        assert word in str(error)
