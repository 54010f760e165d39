"""Span corruption: the example of the paper, lossless targets, and fixed lengths."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.training_cases import tiny_config, write_text
from torch import Tensor

from moebench.errors import UsageError
from moebench.tasks.language import Language, uniform_draws
from moebench.tasks.span_corruption import SpanCorruption, corrupt, noise_mask
from moebench.training.model import prepare_task

SENTINEL = 1000


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def make_task(text: Path, folder: Path, **options: object) -> SpanCorruption:
    task = {"name": "span_corruption", "sequence_length": 20, "eval_windows": 2, **options}
    prepared = prepare_task(tiny_config(text, task=task), folder)
    assert isinstance(prepared, SpanCorruption)
    return prepared


def restore_text(input_L: list[int], target_P: list[int], is_sentinel: range) -> list[int]:
    """Insert the spans of the target in place of their sentinels in the input."""
    span_of: dict[int, list[int]] = {}
    for token in target_P:
        if token in is_sentinel:
            span_of[token] = []
        else:
            span_of[list(span_of)[-1]].append(token)
    text_L: list[int] = []
    for token in input_L:
        text_L += span_of[token] if token in is_sentinel else [token]
    return text_L


def test_the_example_of_the_paper() -> None:
    # Thank you [for inviting] me to your party [last] week -> Thank you <X> me to your party <Y> week,
    # and <X> for inviting <Y> last <Z> (figure 2 there).
    sentence = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    noise_BL = torch.tensor([[False, False, True, True, False, False, False, False, True, False]])
    bytes_BL = torch.tensor([[len(word) for word in sentence]])
    input_BL, target_BP, byte_BP = corrupt(torch.arange(10)[None], bytes_BL, noise_BL, SENTINEL)
    names = [*sentence, *[""] * 990, "<X>", "<Y>", "<Z>"]
    assert [names[i] for i in input_BL[0]] == ["Thank", "you", "<X>", "me", "to", "your", "party", "<Y>", "week"]
    assert [names[i] for i in target_BP[0]] == ["<X>", "for", "inviting", "<Y>", "last", "<Z>"]
    assert byte_BP.tolist() == [[0, 3, 8, 0, 4, 0]]


def test_the_example_of_the_paper_ending_with_a_span() -> None:
    noise_BL = torch.tensor([[False, True, True, False, True]])
    input_BL, target_BP, byte_BP = corrupt(torch.arange(5)[None], torch.ones(1, 5).long(), noise_BL, SENTINEL)
    assert input_BL.tolist() == [[0, 1000, 3, 1001]]
    assert target_BP.tolist() == [[1000, 1, 2, 1001, 4, 1002]]
    assert byte_BP.tolist() == [[0, 1, 1, 0, 1, 0]]


@given(st.integers(2, 60), st.data())
def test_the_mask_has_the_requested_tokens_and_spans(length: int, data: st.DataObject) -> None:
    num_noise = data.draw(st.integers(1, length - 1))
    num_spans = data.draw(st.integers(1, min(num_noise, length - num_noise)))
    noise_BL = noise_mask(length, num_noise, num_spans, uniform_draws(5, length, num_noise, num_spans))
    assert noise_BL.shape == (5, length)
    assert (noise_BL.sum(1) == num_noise).all()
    starts_B = (noise_BL[:, 1:] & ~noise_BL[:, :-1]).sum(1)
    assert (starts_B == num_spans).all()
    assert not noise_BL[:, 0].any()
    assert noise_BL[:, -1].all()


def test_all_divisions_are_equally_likely() -> None:
    # 4 tokens of text and 3 of noise in two spans: 3 · 2 divisions, each 1,000 times expected, standard deviation 29.
    noise_BL = noise_mask(7, 3, 2, uniform_draws(6000, "all"))
    _, counts = noise_BL.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 1000 - 5 * 29
    assert counts.max() < 1000 + 5 * 29


def test_input_and_target_determine_the_text(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path, noise_density=0.3)
    text_BL = Language(task.config, task.text).train_batch(16, 3, 1).target_BP
    batch = task.train_batch(16, 3, 1)
    sentinels = range(task.first_sentinel, task.start_id)
    for input_L, target_P, text_L in zip(batch.input_BL, batch.target_BP, text_BL, strict=True):
        assert restore_text(input_L.tolist(), target_P.tolist(), sentinels) == text_L.tolist()


def test_lengths_and_ids_by_hand(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)  # 3 of 20 tokens are removed, in one span
    assert (task.sequence_length, task.decoder_length, task.tokens_per_sequence) == (18, 5, 23)
    assert (task.first_sentinel, task.start_id, task.vocab_size) == (257, 259, 260)
    batch = task.train_batch(4, 0, 0)
    assert batch.input_BL.shape == (4, 18)
    assert batch.target_BP.shape == batch.decoder_input_BP.shape == (4, 5)
    assert (batch.decoder_input_BP[:, 0] == 259).all()
    assert torch.equal(batch.decoder_input_BP[:, 1:], batch.target_BP[:, :-1])
    assert batch.weight_BP.sum(1).tolist() == (batch.target_BP[:, 1:4] != 256).sum(1).tolist()
    num_windows = task.text.train.num_windows
    assert task.token_count_V[257:].tolist() == [num_windows, 0, num_windows]
    large = SpanCorruption.Config(sequence_length=512)  # T5's: 77 tokens in 26 spans
    assert (large.num_noise, large.num_spans) == (77, 26)


def test_spans_are_a_function_of_seed_and_step(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)
    first = task.train_batch(8, 3, 5)
    part = task.train_batch(8, 3, 5, slice(2, 5))
    assert torch.equal(part.input_BL, first.input_BL[2:5])
    assert torch.equal(part.target_BP, first.target_BP[2:5])
    evaluations: list[Tensor] = [
        torch.cat([batch.input_BL for batch in task.eval_batches("test", size)]) for size in (100, 3)
    ]
    assert torch.equal(*evaluations)
    digests = {task.eval_digest, make_task(text, tmp_path, mean_span=2.0).eval_digest}
    digests |= {make_task(text, tmp_path, noise_density=0.5).eval_digest, Language(task.config, task.text).eval_digest}
    assert len(digests) == 4


def test_the_metric_divides_the_code_length_of_the_target_by_the_bytes_of_the_text(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path)
    batch = task.train_batch(4, 0, 0)
    output = torch.zeros(4, 5, 260)
    sums = task.compute_sums(output, batch)
    nats = 5 * torch.tensor(260.0).log()  # a uniform guess, for each of the five positions
    torch.testing.assert_close(sums["nats"], nats.double().expand(4), rtol=1e-6, atol=0)
    quality = task.compute_quality({name: torch.stack([value.sum(), value.sum()]) for name, value in sums.items()})
    by_hand = float(4 * nats / torch.tensor(2.0).log() / batch.weight_BP.sum())
    assert quality == pytest.approx({f"span_bits_per_byte{d}": by_hand for d in ("", "/ab", "/xyz")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_density": 0.0}, r"task\.noise_density must be greater than 0 and below 1, got 0"),
        ({"noise_density": 1.0}, r"task\.noise_density must be greater than 0 and below 1, got 1"),
        ({"mean_span": 0.5}, r"task\.mean_span must be at least 1, got 0\.5"),
    ],
)
def test_options_out_of_range_are_refused(text: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_task(text, tmp_path, **options)
