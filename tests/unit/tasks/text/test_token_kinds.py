"""Kinds of tokens by their bytes, in the notation of each type of tokenizer."""

from pathlib import Path

import pytest
import torch
from support.training_cases import write_text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moebench.tasks.text.kinds import TOKEN_KINDS, TokenKinds
from moebench.tasks.text.sources import TextDataConfig
from moebench.tasks.text.tokens import ByteTokenizer, SubwordTokenizer
from moebench.tasks.text.windows import prepare

LETTERS = {"word start": "s", "inside word": "i", "digit": "9", "punctuation": ".", "space": "_", "special": "x"}


def spell_kinds(kinds: TokenKinds, token_L: list[int]) -> str:
    """Return one letter for the kind of each token."""
    token_BL = torch.tensor([token_L])
    return "".join(LETTERS[TOKEN_KINDS[kind]] for kind in kinds.label(token_BL, token_BL)[0].tolist())


def test_bytes_by_hand() -> None:
    kinds = TokenKinds.from_pieces(ByteTokenizer().pieces())
    for text, expected in (
        ("two words", "sii_siiii"),
        ("a1b, don't", "s9s._sii.s"),  # a letter behind anything but a letter begins a word
        ("été\n\n3.5", "siiii__9.9"),  # bytes beyond ASCII count as letters
    ):
        assert spell_kinds(kinds, list(text.encode())) == expected
    assert spell_kinds(kinds, [ord("a"), 256, ord("a")]) == "sxs"
    assert spell_kinds(kinds.pad_vocab(260), [ord("a"), 259, ord("b"), ord("c")]) == "sxsi"


def test_the_previous_token_is_that_of_the_text() -> None:
    kinds = TokenKinds.from_pieces(ByteTokenizer().pieces()).pad_vocab(258)
    read_BL, text_BL = torch.tensor([[97, 257, 99]]), torch.tensor([[97, 98, 99]])  # a?c of abc
    assert [TOKEN_KINDS[kind] for kind in kinds.label(read_BL, text_BL)[0].tolist()] == [
        "word start", "special", "inside word"
    ]  # fmt: skip


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"Ġthe": 0, "re": 1, "Ċ": 2, "Ġ7": 3, "Ã": 4, "Ġ(": 5}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["日本"])
    return tokenizer


def sentence_piece() -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE({"<unk>": 0, "▁the": 1, "re": 2, "<0x0A>": 3, "▁7": 4, "▁": 5}, [], unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##re": 2, ",": 3, "7": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("[SEP]", special=True)])
    return tokenizer


BYTE_LEVEL = [b" the", b"re", b"\n", b" 7", b"\xc3", b" (", b"", "日本".encode()]
SENTENCE_PIECE = [b"", b" the", b"re", b"\n", b" 7", b" ", b""]
WORD_PIECE = [b"", b" the", b"re", b" ,", b" 7", b""]


@pytest.mark.parametrize(
    ("trained", "pieces", "sentence", "expected"),
    [
        (byte_level(), BYTE_LEVEL, [0, 1, 2, 1, 3, 5, 6, 1], "si_s9.xs"),
        (sentence_piece(), SENTENCE_PIECE, [1, 2, 3, 2, 4, 5, 0, 6], "si_s9_xx"),
        (word_piece(), WORD_PIECE, [1, 1, 2, 3, 4, 0, 5], "ssi.9xx"),
    ],
    ids=["byte_level", "sentence_piece", "word_piece"],
)
def test_vocabularies_by_hand(trained: Tokenizer, pieces: list[bytes], sentence: list[int], expected: str) -> None:
    read = SubwordTokenizer(trained).pieces()
    assert read == pieces
    assert spell_kinds(TokenKinds.from_pieces(read), sentence) == expected


def test_kinds_are_cached_separately_from_the_text(tmp_path: Path) -> None:
    config, cache = TextDataConfig(path=str(write_text(tmp_path)), tokenizer="bytes"), tmp_path / "cache"
    first, second = (prepare(config, cache, 8) for _ in range(2))
    assert torch.equal(first.kinds.alone_V, second.kinds.alone_V)
    assert torch.equal(first.kinds.open_V, second.kinds.open_V)
    (folder,) = cache.glob("kinds-*-1")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()  # a cache of an earlier version has none
    third = prepare(config, cache, 8)
    assert third.digest == first.digest
    assert spell_kinds(third.kinds, list(b"a b")) == "s_s"
