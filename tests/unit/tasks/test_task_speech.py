"""The tasks on audio end to end in one process, on synthetic tones."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from support.task_data import WORDS, write_words
from torch import Tensor

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.tasks.audio.clips import AudioDataConfig
from moebench.tasks.audio.utterances import prepare
from moebench.tasks.keyword import Keyword
from moebench.tasks.speech import Speech
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def speech(folder, tmp_path_factory) -> Speech:
    config = Speech.Config(data=AudioDataConfig(path=str(folder)), time_mask_frames=4)
    return Speech.prepare(config, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def keyword(folder, tmp_path_factory) -> Keyword:
    config = Keyword.Config(data=AudioDataConfig(path=str(folder)))
    return Keyword.prepare(config, tmp_path_factory.mktemp("cache"))


def read_transcripts(task: Speech, split: str) -> list[str]:
    part = getattr(task.audio, split)
    return ["".join(task.audio.symbols[s] for s in part.symbols(i)) for i in range(len(part.domain_U))]


def make_logits(task: Speech, text: str, length: int) -> Tensor:
    """Return logits [1, L, V] whose best classes are a text, with blanks after each character."""
    classes = [c for letter in text for c in (1 + task.audio.symbols.index(letter), 0)]
    best_L = torch.tensor([*classes, *[0] * length][:length])
    return 9.0 * torch.nn.functional.one_hot(best_L, task.num_classes).float()[None]


def test_splits_are_a_partition_of_the_words(speech):
    splits = [read_transcripts(speech, split) for split in ("train", "validation", "test")]
    assert sorted(word for words in splits for word in words) == WORDS
    assert speech.domains == ("a", "b", "c")
    assert all({word[0] for word in words} == {"a", "b", "c"} for words in splits)
    assert len(splits[0]) >= 20


@pytest.mark.slow
def test_splits_of_the_embedded_pack_share_no_text(tmp_path):
    audio = prepare(AudioDataConfig(), tmp_path, "transcript")
    splits = (audio.train, audio.validation, audio.test)
    texts = [{tuple(part.symbols(i)) for i in range(len(part.domain_U))} for part in splits]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    assert audio.left_out == {"with digits in the transcript": 169}
    assert sum(len(part.domain_U) for part in splits) == 2462 - 169
    assert audio.domains == ("en", "es", "fr", "it", "ru")
    assert len(audio.symbols) == 76
    minutes = [part.num_frames_U.sum() / 6000 for part in splits]
    assert minutes == pytest.approx([51.1, 6.4, 6.4], abs=0.1)


def test_batches(speech):
    batch = speech.train_batch(5, seed=0, step=3)
    assert batch.input_BL.dtype == torch.float32
    assert batch.input_BL.shape[2] == (4 + 2 * 4) * 40
    assert batch.valid_BL.any(0).all()  # padded to the longest and no further
    assert batch.valid_BL.sum() == speech.count_positions(5, 0, 3)
    assert batch.count_BP.tolist() == batch.weight_BP.tolist() == [[3]] * 5
    assert batch.token_id_BL is None
    # A process gets its part of the same batch, padded to the length of the whole batch.
    part = speech.train_batch(5, 0, 3, slice(2, 4))
    for name in ("input_BL", "target_BP", "valid_BL", "count_BP", "domain_B"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[2:4]), name
    assert torch.equal(speech.train_batch(5, 0, 3).input_BL, batch.input_BL)
    assert speech.sequence_length == round(np.ceil(speech.audio.train.num_frames_U / 4).mean())


def test_only_training_is_masked(folder, tmp_path):
    data = AudioDataConfig(path=str(folder))
    plain = Speech.prepare(Speech.Config(data=data, band_masks=0, time_masks=0), tmp_path)
    masked = Speech.prepare(Speech.Config(data=data, band_masks=1, time_masks=0), tmp_path)
    assert not torch.equal(plain.train_batch(4, 0, 0).input_BL, masked.train_batch(4, 0, 0).input_BL)
    for one, other in zip(plain.eval_batches("test", 4), masked.eval_batches("test", 4), strict=True):
        assert torch.equal(one.input_BL, other.input_BL)
    assert plain.eval_digest == masked.eval_digest


def test_ctc_by_hand(speech):
    (batch,) = (b for b in speech.eval_batches("test", 1)[:1])
    length = batch.input_BL.shape[1]
    text = "".join(speech.audio.symbols[c - 1] for c in batch.target_BP[0].tolist())
    num_classes = speech.num_classes
    uniform = torch.zeros(1, length, num_classes)
    # Every path of L uniform classes has probability V^-L. Paths that spell n characters, r of which repeat the one
    # before: choose(L + n - r, 2n) of them (a place for each border of a run of blanks or of a character).
    repeats = sum(x == y for x, y in pairwise(text))
    paths = math.comb(length + len(text) - repeats, 2 * len(text))
    expected = length * math.log(num_classes) - math.log(paths)
    assert speech.loss(uniform, batch).item() == pytest.approx(expected, rel=1e-5)
    assert speech.transcribe(make_logits(speech, text, length), batch) == [text]


def test_a_transcript_that_is_too_long_has_no_loss(folder, tmp_path):
    config = Speech.Config(data=AudioDataConfig(path=str(folder)), stack=16)
    task = Speech.prepare(config, tmp_path)
    batches = task.eval_batches("train", 1)
    # The shortest words have 30 frames, 2 positions of 16: too few for 3 letters.
    short = [b for b in batches if b.input_BL.shape[1] < 3]
    assert short
    for batch in short:
        assert batch.count_BP.tolist() == [[0]]
        assert batch.weight_BP.tolist() == [[3]]
        output = torch.zeros(1, batch.input_BL.shape[1], task.num_classes)
        assert task.loss(output, batch).tolist() == [[0.0]]
        sums = task.compute_sums(output, batch)
        assert (sums["nats"].tolist(), sums["characters"].tolist()) == ([0.0], [3.0])


def test_error_rates_by_hand(speech):
    batches = speech.eval_batches("test", 1)
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        text = "".join(speech.audio.symbols[c - 1] for c in batch.target_BP[0].tolist())
        answer = text if number else text[:1]  # the first utterance lacks two letters, so its word is wrong
        output = make_logits(speech, answer, batch.input_BL.shape[1])
        for name, value in speech.compute_sums(output, batch).items():
            zeros = torch.zeros(3, dtype=torch.float64)
            totals[name] = totals.get(name, zeros).index_add(0, batch.domain_B, value.double())
    quality = speech.compute_quality(totals)
    assert quality["cer"] == pytest.approx(2 / (3 * len(batches)))
    assert quality["wer"] == pytest.approx(1 / len(batches))
    wrong = speech.domains[batches[0].domain_B.item()]
    assert [name for name in speech.domains if quality[f"cer/{name}"] > 0] == [wrong]


@pytest.mark.parametrize("router", ["dense", "switch", "expert_choice"])
@pytest.mark.parametrize("name", ["speech", "keyword"])
def test_padding_changes_neither_output_nor_loss(speech, keyword, name, router):
    task = {"speech": speech, "keyword": keyword}[name]
    cell = {"d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 16}
    config = resolve({"task": {"name": name}, "model": cell, "router": router, "layout": {"num_experts": 4}})
    model = build_initialised_model(config, task).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    (batch_of_all,) = task.eval_batches("test", 99)
    assert not batch_of_all.valid_BL.all()
    output_BLV, _ = model(batch_of_all, batch_context(batch_of_all, training=False, seed=0))
    loss_BP = task.loss(output_BLV, batch_of_all)
    for row, batch in enumerate(task.eval_batches("test", 1)):
        length = batch.input_BL.shape[1]
        alone_LV = model(batch, batch_context(batch, training=False, seed=0))[0][0]
        if router == "expert_choice":  # chooses among the batch: only padding must not take part
            assert torch.isfinite(loss_BP).all()
            continue
        assert torch.allclose(output_BLV[row, :length], alone_LV, atol=1e-5)
        assert torch.allclose(loss_BP[row], task.loss(alone_LV[None], batch)[0], atol=1e-4)


def test_values_at_padding_do_not_matter(speech):
    cell = {"d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 16}
    for router in ("switch", "expert_choice"):
        config = resolve({"task": "speech", "model": cell, "router": router, "layout": {"num_experts": 4}})
        model = build_initialised_model(config, speech)
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        batch = speech.train_batch(6, 0, 1)
        assert not batch.valid_BL.all()
        noise = torch.randn(batch.input_BL.shape, generator=torch.Generator().manual_seed(1))
        other = torch.where(batch.valid_BL[..., None], batch.input_BL, noise)
        ctx = batch_context(batch, training=True, seed=0)
        losses = [
            speech.loss(model(type(batch)(**vars(batch) | {"input_BL": x}), ctx)[0], batch)
            for x in (batch.input_BL, other)
        ]
        assert torch.allclose(*losses, atol=1e-4)


def test_classes_are_predicted_from_the_mean_of_valid_positions(keyword):
    assert keyword.audio.symbols == ("a", "b", "c")
    (batch,) = keyword.eval_batches("test", 99)
    assert batch.count_BP is None
    size, length = batch.valid_BL.shape
    output_BLV = torch.zeros(size, length, 3)
    output_BLV[torch.arange(size), 0, batch.target_BP[:, 0]] = 1.0  # one position for the right class
    output_BLV[~batch.valid_BL] = torch.tensor([50.0, 0.0, -50.0])  # large logits at padding
    assert keyword.compute_sums(output_BLV, batch)["correct"].all()
    num_valid_B = batch.valid_BL.sum(1)
    # Logits 1/n for the right class, 0 for the two others.
    expected_B = torch.log(torch.exp(1 / num_valid_B) + 2) - 1 / num_valid_B
    assert torch.allclose(keyword.loss(output_BLV, batch)[:, 0], expected_B)
    sums = {"correct": torch.tensor([2.0]), "weight": torch.tensor([3.0]), "nats": torch.tensor([1.5])}
    quality = keyword.compute_quality(sums)
    assert (quality["accuracy"], quality["nats"], quality["accuracy/all"]) == (
        pytest.approx(2 / 3),
        0.5,
        pytest.approx(2 / 3),
    )


def test_a_class_of_two_clips_is_refused(tmp_path):
    for number, name in enumerate(("yes/1", "yes/2", "yes/3", "no/1", "no/2")):
        file = tmp_path / f"{name}.wav"
        file.parent.mkdir(exist_ok=True)
        soundfile.write(file, np.sin(np.arange(800) / (number + 2)), 8000)
    with pytest.raises(
        UsageError, match=r"class 'no' has 2 group\(s\) of different clips; train, validation and test need 3"
    ):
        Keyword.prepare(Keyword.Config(data=AudioDataConfig(path=str(tmp_path))), tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "key"),
    [({"stack": 0}, "stack"), ({"context": -1}, "context"), ({"eval_utterances": 0}, "eval_utterances")],
)
def test_meaningless_options_are_refused(options, key):
    with pytest.raises(UsageError, match=f"task.{key} must be"):
        Speech.Config(**options)
