"""The tokenizer that moebench brings: a byte-level BPE trained on the training split of the embedded text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

BPE = "bpe4096"
"""Its name in `task.data.tokenizer`."""
BPE_FILE = Path(__file__).parent.parent / "data" / f"{BPE}.json"
VOCAB_SIZE = 4096
"""256 bytes, so that no text is lost, the separator and 3,839 merges."""
SEPARATOR = "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Return a byte-level BPE of the `tokenizers` library; the same texts and library give the same tokenizer.

    Words are divided as in GPT-2 (Radford et al. 2019, section 2.2), so that no token crosses from letters to digits or
    punctuation.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
