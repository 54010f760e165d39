from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moebench.errors import UsageError
from moebench.tasks.text.coverage import Coverage, count_wrong_bytes
from moebench.tasks.text.tokens import ByteTokenizer, SubwordTokenizer, load_tokenizer

HARD = [
    "",
    "plain words, and more.",
    "  leading and trailing   ",
    "tabs\tand\n\nnew lines\r\n",
    "emoji 👩‍👩‍👧 🇩🇪 👍🏽 end",
    "combining e\u0301 a\u030a\u0323 ﬁ Å",
    "日本語 and עברית \u00a0\u2003 spaces",
    "unknown \U0001f9ff\U00010348 characters",
]


def byte_level() -> Tokenizer:
    """Return a byte-level BPE, as GPT-2 and Llama 3 have; one emoji is several tokens with the same offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the words and the more words of the text " * 5], trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """Return a tokenizer that normalises, drops white space, has an unknown token and no end token."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "and": 3, "words": 7}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "byte_level", "word_piece"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return SubwordTokenizer(byte_level() if request.param == "byte_level" else word_piece())


@pytest.mark.parametrize("text", HARD)
def test_byte_counts_add_up_to_the_text(tokenizer, text):
    token_N, count_N = tokenizer.encode(text)
    assert len(token_N) == len(count_N)
    assert count_N.sum() == len(text.encode())
    assert (count_N >= 0).all()
    assert ((token_N >= 0) & (token_N < tokenizer.vocab_size)).all()


@given(st.text(max_size=60))
def test_byte_counts_add_up_for_any_text(text):
    for tokenizer in (ByteTokenizer(), SUBWORD, WORDS):
        token_N, count_N = tokenizer.encode(text)
        # A text of white space alone has no tokens in the tokenizer that drops it.
        assert count_N.sum() == (len(text.encode()) if len(token_N) else 0)
        assert len(token_N) or tokenizer is WORDS or not text


def test_bytes_by_hand():
    token_N, count_N = ByteTokenizer().encode("aé")
    assert token_N.tolist() == [97, 0xC3, 0xA9]
    assert count_N.tolist() == [1, 1, 1]
    assert (ByteTokenizer.vocab_size, ByteTokenizer.separator) == (257, 256)


def test_gaps_count_for_the_next_token_and_the_end_for_the_last():
    # " and" is 4 bytes with its space; "  é" 2 spaces + 2 bytes; the last space falls to the last token.
    token_N, count_N = WORDS.encode("words and  é ")
    assert token_N.tolist() == [7, 3, 0]
    assert count_N.tolist() == [5, 4, 5]


def test_pieces_of_an_emoji_count_it_once():
    token_N, count_N = SUBWORD.encode("👍")
    assert len(token_N) > 1
    assert count_N.tolist() == [4] + [0] * (len(token_N) - 1)


def test_separator_is_found_or_added():
    assert SUBWORD.separator == byte_level().token_to_id("<|endoftext|>")
    assert SUBWORD.vocab_size == byte_level().get_vocab_size()
    # Ids 0, 3 and 7: the vocabulary has holes, 8 is the first free id.
    assert (WORDS.separator, WORDS.vocab_size) == (8, 9)


def test_truncation_of_the_file_is_ignored():
    trained = byte_level()
    trained.enable_truncation(4)
    trained.enable_padding(length=50)
    token_N, count_N = SubwordTokenizer(trained).encode("the words " * 30)
    assert len(token_N) > 4
    assert count_N.sum() == 300


def test_load_by_name_file_and_folder(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    from_file, from_folder = load_tokenizer(str(tmp_path / "tokenizer.json")), load_tokenizer(str(tmp_path))
    assert np.array_equal(from_file.encode(HARD[4])[0], from_folder.encode(HARD[4])[0])
    assert load_tokenizer("bytes").vocab_size == 257


def test_bad_tokenizers_are_named(tmp_path: Path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("bad.json", "cannot be read"),
        ("empty", "no tokenizer.json"),
        ("gone.json", "does not exist"),
    ):
        with pytest.raises(UsageError, match=f"task.data.tokenizer: .*{words}"):
            load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("text", HARD)
def test_bytes_are_lost_by_none_that_has_all_of_them(text):
    for tokenizer in (ByteTokenizer(), SUBWORD):
        assert tokenizer.decode(tokenizer.encode(text)[0]) == text


def test_unknown_ids_decode_to_nothing():
    assert WORDS.decode(WORDS.encode("words and é words")[0]) == " words and words"  # it has no decoder of its own
    unigram = SubwordTokenizer(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0)))
    assert unigram.decode(unigram.encode("abz")[0]) == "ab"


def test_characters_without_spaces_between_them_are_restored():
    tokenizer = Tokenizer(models.BPE())  # the library's own decoding would put spaces between its tokens
    tokenizer.train_from_iterator(["abc abd abe"], trainers.BpeTrainer(show_progress=False, vocab_size=9))
    bare = SubwordTokenizer(tokenizer)
    assert bare.decode(bare.encode("ab cab  d")[0]) == "ab cab  d"
    assert bare.decode(bare.encode("ab xyz d")[0]) == "ab  d"


@pytest.mark.parametrize(
    ("text", "decoded", "wrong"),
    [
        ("abc", "abc", 0),
        ("Ab C", "ab c", 2),  # two letters in another case
        ("a\nb\tc  d", "a b c d", 3),  # a line, a tab and one of two spaces
        ("été", "ete", 4),  # two letters of two bytes
        ("e\u0301", "é", 3),  # e and an accent of two bytes
        ("日本", "本", 3),
        ("a.b", "a . b", 2),  # added: the original spacing cannot be recovered
        ("a.b  c", "a . b c", 2),  # one space lost and two added: three pairs lost and four added
        ("a b", "b a", 1),  # not the same, however one counts
        ("abc", "", 3),
        ("abc", " abc", 0),  # one space before the whole text is no loss
        (" abc", "abc", 1),
        (" abc", " abc", 0),
    ],
)
def test_wrong_bytes_by_hand(text, decoded, wrong):
    assert count_wrong_bytes(text, decoded) == wrong


def test_coverage_of_a_domain(capsys):
    coverage = Coverage()
    coverage.check("t.json", "a")
    coverage.add("x" * 4000, "x" * 4000)
    coverage.add("the words of Boole\n" + "y" * 981, "the words of boole\n" + "y" * 981)
    assert (coverage.num_bytes, coverage.num_wrong, coverage.share) == (5000, 1, 0.9998)
    coverage.check("t.json", "a")
    shown = r"'ords of Boole\nyyyyyyyyyy' comes back as 'ords of boole\nyyyyyyyyyy'"
    assert capsys.readouterr().err == f"task.data: 't.json' keeps 99.9800 % of the bytes of domain 'a': {shown}\n"
    coverage.add("ABCDE", "abcde")  # 6 of 5005 bytes: 99.88 %
    with pytest.raises(UsageError) as caught:
        coverage.check("t.json", "a")
    assert str(caught.value) == (
        f"task.data.tokenizer: 't.json' keeps 99.88 % of the bytes of domain 'a': {shown}. Allowed: at least 99.9 %,"
        " such as 'bytes', or a tokenizer that falls back to bytes and changes neither case nor white space"
    )


@pytest.mark.parametrize(
    "model", [models.WordLevel({"a": 0}), models.WordPiece({"a": 0}), models.Unigram([("a", -1.0)])], ids=repr
)
def test_unknown_characters_without_a_token_for_them_are_one_line(model):
    with pytest.raises(UsageError, match=r"^task\.data\.tokenizer: 'mine\.json' cannot encode 'a b' \(") as caught:
        SubwordTokenizer(Tokenizer(model), "mine.json").encode("a b")
    assert "\n" not in str(caught.value)


def test_vocabularies_that_no_table_fits_are_one_line():
    with pytest.raises(UsageError, match=r"'mine\.json' has the id 1000000000; allowed: ids from 0 to 4194303"):
        SubwordTokenizer(Tokenizer(models.WordLevel({"[UNK]": 0, "a": 10**9}, unk_token="[UNK]")), "mine.json")
    for model in (models.BPE(), models.WordLevel({}), models.Unigram([])):
        with pytest.raises(UsageError, match=r"'mine\.json' has no tokens; allowed"):
            SubwordTokenizer(Tokenizer(model), "mine.json")


@given(st.text(max_size=60))
def test_ids_of_a_byte_level_vocabulary_have_the_bytes_of_the_text(text):
    count_V = SUBWORD.byte_count_V
    ((token_N, counts),) = SUBWORD.encode_texts([text])
    assert counts is None
    assert count_V[token_N].sum() == len(text.encode())
    assert SUBWORD.decode_bytes(token_N) == text.encode()


def test_bytes_of_ids_are_not_claimed_where_text_may_change():
    def changed(change) -> SubwordTokenizer:
        tokenizer = byte_level()
        change(tokenizer)
        return SubwordTokenizer(tokenizer)

    def set_pre_tokenizer(*steps):
        return lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence(list(steps)))

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert changed(set_pre_tokenizer(pre_tokenizers.Digits(), level)).byte_count_V is not None
    for change in (
        lambda t: setattr(t, "normalizer", normalizers.NFC()),
        set_pre_tokenizer(pre_tokenizers.Split(" ", "removed"), level),
        set_pre_tokenizer(pre_tokenizers.Whitespace(), level),
        set_pre_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: t.add_tokens([AddedToken("<x>", lstrip=True)]),
    ):
        assert changed(change).byte_count_V is None
    assert WORDS.byte_count_V is None


def test_a_separator_written_in_a_text_is_text_where_asked_for():
    text = "a<|endoftext|>b"
    plain, as_text = SubwordTokenizer(byte_level()), SubwordTokenizer(byte_level(), special_as_text=True)
    assert plain.separator in plain.encode(text)[0]
    ((token_N, _),) = as_text.encode_texts([text])
    assert as_text.separator not in token_N
    assert as_text.decode_bytes(token_N) == text.encode()


def test_added_tokens_are_read_as_they_are_written():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<é>"])
    added = SubwordTokenizer(tokenizer)
    ((token_N, _),) = added.encode_texts(["the<é> words"])
    assert tokenizer.token_to_id("<é>") in token_N
    assert added.decode_bytes(token_N) == "the<é> words".encode()
    assert added.byte_count_V[token_N].sum() == 13


def test_dropout_of_a_tokenizer_is_for_its_training():
    path_free = byte_level()
    path_free.model.dropout = 0.5
    still = SubwordTokenizer(path_free)
    assert len({tuple(still.encode("the words of the text")[0]) for _ in range(20)}) == 1
    assert still.byte_count_V is not None


SUBWORD = SubwordTokenizer(byte_level())
WORDS = SubwordTokenizer(word_piece())
