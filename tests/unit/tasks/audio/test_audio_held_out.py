"""Recordings of domains that are held out of training: splits and invalid configurations."""

from pathlib import Path

import pytest
from support.task_data import WORDS, write_words

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.tasks.audio.clips import AudioDataConfig, source_digest
from moebench.tasks.keyword import Keyword
from moebench.tasks.speech import Speech
from moebench.training.evaluation import evaluate
from moebench.training.model import build_initialised_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def speech(folder, tmp_path_factory) -> Speech:
    config = Speech.Config(data=AudioDataConfig(path=str(folder), held_out_domains=["b"]))
    return Speech.prepare(config, tmp_path_factory.mktemp("cache"))


def read_transcripts(task: Speech, split: str) -> list[str]:
    part = getattr(task.audio, split)
    return ["".join(task.audio.symbols[s] for s in part.symbols(i)) for i in range(len(part.domain_U))]


def test_training_and_validation_have_none_of_it_and_the_test_has_all(speech, folder, tmp_path):
    assert (speech.domains, speech.num_held_out) == (("a", "c", "b"), 1)
    plain = Speech.prepare(Speech.Config(data=AudioDataConfig(path=str(folder))), tmp_path)
    for split in ("train", "validation"):
        assert read_transcripts(speech, split) == [word for word in read_transcripts(plain, split) if word[0] != "b"]
    assert read_transcripts(speech, "test") == read_transcripts(plain, "test")
    assert {word[0] for word in read_transcripts(speech, "test")} == {"a", "b", "c"}
    kinds = [set((batch.domain_B < 2).tolist()) for batch in speech.eval_batches("test", 2)]
    assert kinds == sorted(kinds, key=lambda kind: False in kind)
    assert all(len(kind) == 1 for kind in kinds)


def test_the_error_rate_is_of_the_trained_domains(speech):
    raw = {"task": {"name": "speech"}, "model": {"d_model": 8, "num_layers": 1, "num_heads": 2, "ffn_width": 16}}
    config = resolve(raw | {"layout": {"n": 1, "num_experts": 4, "expert_width": 8}, "router": "switch"})
    batches = speech.eval_batches("test", 2)
    inside = sum(int(batch.domain_B.max() < 2) for batch in batches)
    model = build_initialised_model(config, speech)
    full, known, others = (
        evaluate(model, speech, part, 0, "cpu") for part in (batches, batches[:inside], batches[inside:])
    )
    for metric in ("cer", "wer", "nats"):
        assert full.quality[metric] == pytest.approx(known.quality[metric], rel=1e-12)
        assert full.quality[f"{metric}/out_of_domain"] == pytest.approx(others.quality[f"{metric}/b"], rel=1e-12)
    assert full.load == known.load | others.load


def test_invalid_held_out_domains_are_refused(folder, tmp_path):
    words = AudioDataConfig(path=str(folder), held_out_domains=["d"])
    with pytest.raises(UsageError, match=r"task\.data\.held_out_domains: 'd' is unknown.* Allowed: a, b, c"):
        Speech.prepare(Speech.Config(data=words), tmp_path)
    with pytest.raises(UsageError, match="each domain once"):
        AudioDataConfig(held_out_domains=["en", "en"])
    table = folder / "words.csv"
    table.write_text("file,label,language\n" + "\n".join(f"{w[0]}/{w}.wav,{w[0]},{w[0]}" for w in WORDS))
    labels = AudioDataConfig(path=str(table), target_column="label", held_out_domains=["b"])
    with pytest.raises(UsageError, match=r"task\.data\.held_out_domains: class 'b' is then missing in train"):
        Keyword.prepare(Keyword.Config(data=labels), tmp_path)
    table.unlink()


def test_the_cache_key_contains_the_held_out_domains(folder):
    digests = [source_digest(AudioDataConfig(path=str(folder), held_out_domains=d), "transcript") for d in ([], ["a"])]
    assert digests[0] != digests[1]
