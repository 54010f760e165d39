"""A run as a model over tokens: routed as in its own evaluation, one item at a time where items would meet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moebench.analysis.benchmarks.token_model import PaddedInputs, Score, pad_inputs, score_targets
from moebench.analysis.benchmarks.windows import Window
from moebench.analysis.trained_run import TrainedRun
from moebench.causality import find_leak, must_be_causal
from moebench.compatibility import Combination
from moebench.errors import UsageError
from moebench.schema import CellConfig
from moebench.tasks.deferred_logits import DeferredLogits
from moebench.tasks.language import Language
from moebench.tasks.task import TASKS
from moebench.tasks.text.tokens import Tokenizer
from moebench.training.evaluation import batch_context, evaluation_mode, training_precision
from moebench.training.model import Model


def require_scorable(config: CellConfig) -> None:
    """Raise UsageError for a cell that gives no probability of a token after a text.

    A cell is scored as its evaluation routes: a router that reads later tokens in training alone is allowed.
    """
    name, router = config.task.name, config.router.name
    if not issubclass(TASKS.get(name).item, Language):
        raise UsageError(f"task.name: '{name}' predicts no next token (allowed: language)")
    combination = Combination.of(config)
    causality = combination.router.facts.causality
    is_causal_here = bool(causality.in_evaluation) and combination.never_drops
    leak = find_leak(combination)
    if must_be_causal(combination) and leak and not is_causal_here:
        raise UsageError(f"{leak}; a text has no probability under such a model")
    if causality.batch_dependent and not causality.draws_in_evaluation:
        raise UsageError(
            f"router.name: '{router}' routes a sequence by the other sequences of its batch; an item by itself has no"
            f" score ({causality.reason})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RunEncoder:
    """The tokenizer of a run."""

    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        tokens: list[int] = self.tokenizer.encode(text)[0].tolist()
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; bytes of a character that is not complete become replacement characters."""
        return self.tokenizer.decode_bytes(np.array(tokens, dtype=np.int64)).decode(errors="replace")


class RunModel:
    """The model of a run of next-token prediction."""

    def __init__(self, config: CellConfig, task: Language, model: Model) -> None:
        """Raises UsageError as `require_scorable` does."""
        require_scorable(config)
        combination = Combination.of(config)
        self.config, self.task, self.model = config, task, model
        self.device = next(model.parameters()).device
        self.encoder = RunEncoder(tokenizer=task.text.tokenizer)
        self.max_length = task.sequence_length
        # Slots of a capacity are shared by a batch; draws are made by the place in a batch.
        self.is_sequential = not combination.never_drops or combination.router.facts.causality.draws_in_evaluation

    @classmethod
    def load(cls, run: TrainedRun) -> "RunModel":
        """Return the model with the weights of the last checkpoint of a run."""
        assert isinstance(run.task, Language)
        torch.set_num_threads(run.config.train.threads)
        return cls(run.config, run.task, run.load_model())

    @property
    def start(self) -> tuple[int, ...]:
        """The separator, which precedes every document in training."""
        return (self.previous,)

    @property
    def previous(self) -> int:
        """The separator."""
        return self.task.text.separator

    @property
    def stops(self) -> frozenset[int]:
        """The separator, which also begins the next document."""
        return frozenset((self.previous,))

    def find_domain(self, name: object) -> int:
        """Return the index of a domain of the data; for any other, one that counts as held out of training."""
        known = self.task.domains
        return known.index(str(name)) if name in known else self.task.num_trained_domains

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Return the score of each window of a batch."""
        inputs = pad_inputs(windows, self.previous)
        with evaluation_mode(self.model), training_precision(self.config.train, self.device):
            return score_targets(windows, self._compute_vectors(inputs, windows), self._project)

    def predict(self, windows: Sequence[Window]) -> list[int]:
        """Return the most probable token after the inputs of each window of a batch."""
        inputs = pad_inputs(windows, self.previous, only_last=True)
        with evaluation_mode(self.model), training_precision(self.config.train, self.device):
            best: list[int] = self._project(self._compute_vectors(inputs, windows)).argmax(-1).tolist()
        return best

    def _compute_vectors(self, inputs: PaddedInputs, windows: Sequence[Window]) -> Tensor:
        """Return what the head reads at the predicted positions, [N, D]."""
        domain_B = torch.tensor([window.domain for window in windows])
        token_BM = torch.nn.functional.pad(inputs.token_BL, (0, 1))  # the target of the last position, which is unused
        batch = self.task.make_batch(token_BM, torch.zeros_like(token_BM), domain_B, _refuse_draws)
        batch = replace(batch, valid_BL=inputs.valid_BL).to(self.device)
        ctx = batch_context(batch, training=False, seed=self.config.seed, micro_batch=windows[0].noise)
        x_BLD, _ = self.model.compute_hidden(batch, ctx)
        return x_BLD[inputs.row_N, inputs.column_N]

    def _project(self, vector_ND: Tensor) -> Tensor:
        output = self.model.head(vector_ND)
        logits_NV: Tensor = output.project() if isinstance(output, DeferredLogits) else output
        return logits_NV


def _refuse_draws(number: int) -> Tensor:
    raise AssertionError("next-token prediction draws nothing")
