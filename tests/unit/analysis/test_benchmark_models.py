"""Models as a benchmark asks them: scores are those of an evaluation, and depend on nothing else in the batch."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.benchmark_runs import WORDS, build_run_model

from moebench.analysis.benchmarks.run_model import RunModel, require_scorable
from moebench.analysis.benchmarks.text_model import Prompt, TextModel, TextPair
from moebench.analysis.benchmarks.token_model import Score
from moebench.analysis.benchmarks.windows import Window
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experts.layout import LAYOUTS
from moebench.routing.router import ROUTERS
from moebench.training.evaluation import evaluate

REFUSED = {
    "expert_choice": "is not causal: whether an expert takes a token depends on later tokens",
    "expert_choice_by_position": "routes a sequence by the other sequences of its batch; an item",
    "hash_future": "is not causal: the expert depends on the next token",
    "mixture_of_tokens": "routes a sequence by the other sequences of its batch",
    "sentence_level": "is not causal: the mean is over the whole sequence",
    "smear": "is not causal: the merge depends on the mean of the whole sequence",
    "soft_moe": "is not causal: every slot is a mean over the whole sequence",
    "two_sided": "is not causal: whether an expert takes a token depends on later tokens",
}
"""Router -> why a text has no score."""
NEED_LABELS = ("oracle",)
"""Routers that no cell on text can have."""
PAIRS = [
    TextPair(context="the mill stood by", continuation=" a river"),
    TextPair(context="", continuation="winter came and its miller counted sacks of flour", domain="b"),
    TextPair(context="each day until winter came, and the miller counted", continuation=" sacks", domain="a"),
    TextPair(context="a", continuation="b"),
]


def list_scorable() -> list[str]:
    """Return the routers that a cell of next-token prediction can have and score."""
    names = []
    for entry in ROUTERS.entries():
        try:
            require_scorable(resolve({"router": {"name": entry.name}}))
            names.append(entry.name)
        except UsageError:
            continue
    return [name for name in names if name not in NEED_LABELS]


@pytest.mark.parametrize("router", list_scorable())
def test_scores_do_not_depend_on_the_batch(tmp_path: Path, router: str) -> None:
    model = build_run_model(tmp_path, router={"name": router}, layout={"num_experts": 16})
    alone = [TextModel(model, 1).score_pairs([pair])[0] for pair in PAIRS]
    together = TextModel(model, 8).score_pairs(PAIRS)
    reversed_ = TextModel(model, 3).score_pairs(PAIRS[::-1])[::-1]
    for one, batch, other in zip(alone, together, reversed_, strict=True):
        assert batch.log_probability == pytest.approx(one.log_probability, abs=2e-4)
        assert other.log_probability == pytest.approx(one.log_probability, abs=2e-4)
        assert (batch.is_greedy, batch.is_truncated) == (one.is_greedy, one.is_truncated)
    assert [score.is_truncated for score in together] == [True, True, True, False]


@pytest.mark.parametrize("layout", LAYOUTS.names())
def test_layouts_are_scored_alike_in_any_batch(tmp_path: Path, layout: str) -> None:
    layers = {"num_layers": 4}
    model = build_run_model(
        tmp_path, router={"name": "top_k"}, layout={"name": layout, "n": None, "num_experts": 8}, model=layers
    )
    alone = [TextModel(model, 1).score_pairs([pair])[0].log_probability for pair in PAIRS]
    together = [score.log_probability for score in TextModel(model, 8).score_pairs(PAIRS)]
    assert together == pytest.approx(alone, abs=2e-4)


@pytest.mark.parametrize("router", REFUSED)
def test_routers_without_a_score_of_a_text_are_refused(router: str) -> None:
    with pytest.raises(UsageError, match=f"router.name: '{router}'.*") as refused:
        require_scorable(resolve({"router": {"name": router}}))
    assert REFUSED[router] in str(refused.value)


def test_every_router_is_scored_or_refused_for_a_known_reason() -> None:
    assert {entry.name for entry in ROUTERS.entries()} == {*list_scorable(), *REFUSED, *NEED_LABELS}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"name": "masked_language"}}, "task.name: 'masked_language' predicts no next token"),
        (
            {"router": {"name": "top_k"}, "layout": {"capacity_factor_eval": 1.0, "drop_order": "score"}},
            "layout.drop_order: 'score' lets later tokens push out earlier ones",
        ),
        (
            {"router": {"name": "sinkhorn"}, "layout": {"capacity_factor_eval": 1.0}},
            "'sinkhorn' is not causal",
        ),
    ],
)
def test_cells_without_a_score_of_a_text_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        require_scorable(resolve(sections))
    assert message in str(refused.value)


def test_slots_of_a_capacity_are_not_shared_by_items(tmp_path: Path) -> None:
    layout = {"capacity_factor_eval": 0.5, "drop_order": "position"}
    model = build_run_model(tmp_path, router={"name": "switch"}, layout=layout)
    assert model.is_sequential
    alone = [TextModel(model, 8).score_pairs([pair])[0] for pair in PAIRS]
    assert TextModel(model, 8).score_pairs(PAIRS) == alone


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_texts_in_any_batch(shared_model: RunModel, data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
    texts = data.draw(st.lists(st.tuples(words, words.map(lambda text: f" {text}.")), min_size=1, max_size=6))
    pairs = [TextPair(context=context, continuation=continuation) for context, continuation in texts]
    size = data.draw(st.integers(2, 8))
    batch = TextModel(shared_model, size).score_pairs(pairs)
    for pair, score in zip(pairs, batch, strict=True):
        alone = TextModel(shared_model, 1).score_pairs([pair])[0]
        assert score.log_probability == pytest.approx(alone.log_probability, abs=2e-4)


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory: pytest.TempPathFactory) -> RunModel:
    return build_run_model(tmp_path_factory.mktemp("model"), router={"name": "top_k"})


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe4096"])
def test_a_text_has_the_bits_of_an_evaluation(tmp_path: Path, tokenizer: str) -> None:
    """The windows of a document from its beginning are those of the evaluation set, and so is the sum of their nats."""
    folder = tmp_path / "text"
    folder.mkdir()
    words = random.Random(0).choices(WORDS, k=4000)
    (folder / "one.txt").write_text(" ".join(words))  # one document: its last tenth is the test split
    task = {"data": {"path": str(folder), "tokenizer": tokenizer}, "eval_windows": None}
    model = build_run_model(tmp_path, router={"name": "top_k"}, task={"sequence_length": 24, **task})
    batches = model.task.eval_batches("test", 4)
    expected = evaluate(model.model, model.task, batches, model.config.seed, "cpu").quality["bits_per_byte"]
    windows = model.task.text.test.num_windows
    token_N = model.task.text.test.tokens.read(1, 1 + 24 * windows)  # without the separator, which precedes the text
    text = model.encoder.decode(token_N)
    assert model.encoder.encode(text) == token_N.tolist()
    (score,) = TextModel(model, 4).score_texts([text])
    assert -score.log_probability / math.log(2) / len(text.encode()) == pytest.approx(expected, rel=1e-6)


def test_a_continuation_has_the_probability_that_the_logits_give(shared_model: RunModel) -> None:
    """The log p(" sacks" | "counted") from the logits of one pass over all tokens."""
    tokens = [256, *b"counted sacks"]
    batch = shared_model.task.make_batch(
        torch.tensor([[*tokens, 0]]), torch.zeros(1, len(tokens) + 1), torch.tensor([2]), lambda n: torch.zeros(n)
    )
    from moebench.training.evaluation import batch_context, evaluation_mode

    with evaluation_mode(shared_model.model):
        logits_LV = shared_model.model(batch, batch_context(batch, training=False, seed=0))[0][0]
    log_p = logits_LV.log_softmax(-1)
    expected = sum(float(log_p[position, token]) for position, token in enumerate(tokens[8:], 7))
    (score,) = TextModel(shared_model, 4).score_pairs([TextPair(context="counted", continuation=" sacks")])
    assert score.log_probability == pytest.approx(expected, abs=1e-4)
    # A space at the end of the context belongs to the continuation.
    (moved,) = TextModel(shared_model, 4).score_pairs([TextPair(context="counted ", continuation="sacks")])
    assert moved == score


class Counter:
    """A model that continues 1, 2, 3 ... whatever it is asked, and notes what it reads."""

    is_sequential = False
    max_length = 4
    start = (0,)
    previous = 0
    stops = frozenset((99,))

    def __init__(self) -> None:
        self.encoder = self
        self.read: list[tuple[int, ...]] = []

    def encode(self, text: str) -> list[int]:
        return [int(part) for part in text.split()]

    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))

    def find_domain(self, name: object) -> int:
        return 0

    def score(self, windows: Any) -> list[Score]:
        self.read += [(*window.inputs, -1, *window.targets) for window in windows]
        return [Score(log_probability=-float(len(window.targets)), is_greedy=True) for window in windows]

    def predict(self, windows: list[Window]) -> list[int]:
        return [window.inputs[-1] + 1 for window in windows]


def test_greedy_generation_ends_where_it_is_told() -> None:
    prompts = [
        Prompt(text="1 2", until=("6",), max_tokens=10),
        Prompt(text="7", until=(), max_tokens=3),
        Prompt(text="1 2 3 4 5 96", until=("7 98",), max_tokens=10),  # one token of it ends the text before
        Prompt(text="1", until=("zz",), max_tokens=5),
    ]
    texts = TextModel(Counter(), 2).generate(prompts)
    assert texts == [("3 4 5 ", False), ("8 9 10", False), ("9", True), ("2 3 4 5 6", False)]
    assert TextModel(Counter(), 1).generate(prompts) == texts
    ends = [Prompt(text="97", until=(), max_tokens=9)]
    assert TextModel(Counter(), 1).generate(ends) == [("98", False)]  # 99 ends a text


def test_long_contexts_lose_their_beginning_and_long_continuations_are_cut_into_windows() -> None:
    model = Counter()
    pairs = [
        TextPair(context="1 2 3 4 5", continuation=" 6 7"),
        TextPair(context="1", continuation=" 2 3 4 5 6 7"),
    ]
    scores = TextModel(model, 1).score_pairs(pairs)
    assert [(score.log_probability, score.is_truncated) for score in scores] == [(-2, True), (-6, True)]
    assert set(model.read) == {(3, 4, 5, 6, -1, 6, 7), (1, 2, 3, 4, -1, 2, 3, 4, 5), (3, 4, 5, 6, -1, 6, 7)}


def test_a_whole_text_that_is_cut_into_windows_is_not_truncated() -> None:
    model = Counter()
    assert [score.is_truncated for score in TextModel(model, 1).score_texts(["1 2 3 4 5 6 7", "1 2"])] == [False, False]
    assert len(model.read) > 2  # the first text takes several windows


def test_a_token_across_the_border_is_scored_with_the_continuation() -> None:
    """The texts "5" and "56" are tokens of their own: the joined text has another token where the context ends."""
    model = Counter()
    pairs = [TextPair(context="3 4 5", continuation="6"), TextPair(context="3 4 5", continuation="6 7")]
    scores = TextModel(model, 1).score_pairs(pairs)
    assert [score.log_probability for score in scores] == [-1, -2]
    assert sorted(model.read) == [(0, 3, 4, -1, 56), (0, 3, 4, 56, -1, 56, 7)]


@pytest.mark.parametrize("context", ["", "1 2", " "])
def test_a_continuation_without_tokens_is_refused(context: str) -> None:
    with pytest.raises(UsageError, match=f"the continuation '' after '{context}' has no tokens"):
        TextModel(Counter(), 1).score_pairs([TextPair(context=context, continuation="")])


def test_padding_changes_nothing(shared_model: RunModel) -> None:
    short = Window(inputs=(256, *b"the mill"), targets=tuple(b"mill "))
    long = Window(inputs=(256, *b"the miller counted"), targets=tuple(b"ed sacks"))
    alone, together = shared_model.score([short]), shared_model.score([short, long])
    assert together[0].log_probability == pytest.approx(alone[0].log_probability, abs=1e-5)
    assert shared_model.predict([short, long])[0] == shared_model.predict([short])[0]


def test_values_that_are_not_finite_are_one_line(tmp_path: Path) -> None:
    model = build_run_model(tmp_path, router={"name": "top_k"})
    with torch.no_grad():
        next(iter(model.model.head.parameters())).fill_(math.nan)
    with pytest.raises(UsageError, match="log-probabilities that are not finite"):
        TextModel(model, 1).score_pairs(PAIRS[:1])


def test_decoding_half_a_character(tmp_path: Path) -> None:
    model = build_run_model(tmp_path, router={"name": "top_k"})
    assert model.encoder.decode(np.array([*"é".encode()[:1], 97])) == "�a"
