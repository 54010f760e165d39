"""The embedded tokenizer: every byte, the same file from the same text, and chosen by its name."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from moebench.errors import UsageError
from moebench.tasks.text.embedded_tokenizer import BPE, BPE_FILE, SEPARATOR, VOCAB_SIZE, train_bpe
from moebench.tasks.text.sources import TextDataConfig, source_digest
from moebench.tasks.text.tokens import SubwordTokenizer, load_tokenizer

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def tokenizer() -> SubwordTokenizer:
    loaded = load_tokenizer(BPE)
    assert isinstance(loaded, SubwordTokenizer)
    return loaded


def test_it_has_every_byte_and_the_separator(tokenizer):
    assert tokenizer.vocab_size == VOCAB_SIZE == 4096  # the separator is one of them
    assert tokenizer.pieces()[tokenizer.separator] == b""
    assert {bytes([value]) for value in range(256)} <= set(tokenizer.pieces())


def test_no_text_is_lost(tokenizer):
    every_width = "".join(map(chr, [*range(1, 0x300), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F610)]))
    for text in (every_width, "  two  spaces\r\n\tand a tab\n\n\n", "Ünïcödé 日本語 😀", "e\u0301 \u00e9"):
        token_N, count_N = tokenizer.encode(text)
        assert tokenizer.decode(token_N) == text
        assert count_N.sum() == len(text.encode())
        pieces = tokenizer.pieces()
        assert b"".join(pieces[token] for token in token_N) == text.encode()


def test_english_has_several_bytes_to_a_token(tokenizer):
    token_N, _ = tokenizer.encode(" the people of the United States")
    assert len(token_N) == 6


def test_training_is_deterministic():
    texts = [" ".join(f"w{n % 37}x{n % 11}" for n in range(start, 4000)) for start in (0, 17)]
    first, second = (train_bpe(texts, 400).to_str() for _ in range(2))
    assert first == second
    assert f'"{SEPARATOR}":0' in first


def test_it_is_the_default_and_part_of_the_id():
    assert TextDataConfig().tokenizer == BPE
    assert source_digest(TextDataConfig()) == source_digest(TextDataConfig(tokenizer=str(BPE_FILE)))
    assert source_digest(TextDataConfig()) != source_digest(TextDataConfig(tokenizer="bytes"))


def test_a_wrong_name_is_told_the_right_one(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read by an import
    with pytest.raises(UsageError, match=r"Did you mean 'bpe4096'\? Allowed: 'bpe4096', 'bytes', a tokenizer.json"):
        load_tokenizer("bpe4069")


@pytest.mark.slow
def test_the_script_makes_the_same_file():
    spec = importlib.util.spec_from_file_location("build_tokenizer", ROOT / "scripts" / "build_tokenizer.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.train() == BPE_FILE.read_text("utf-8")
    assert np.array_equal(load_tokenizer(BPE).encode("a b")[0], load_tokenizer(str(BPE_FILE)).encode("a b")[0])
