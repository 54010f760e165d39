"""Trivial baselines of transcription: one constant answer for every recording, chosen on the training split."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from moebench.tasks.audio.transcripts import count_word_errors
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.measure import EVAL_BATCH, Values
from moebench.tasks.domain_metrics import average_by_domain

if TYPE_CHECKING:
    from moebench.tasks.speech import Speech

MAX_TEXTS = 400
"""Training transcripts, evenly spaced, on which answers are compared."""
MAX_ANSWERS = 400
"""Transcripts that are tried as answers: the most frequent ones, of equally frequent ones the shortest."""
MAX_LETTERS, MAX_LENGTH = 12, 12
"""Most frequent characters that an answer is built from, and its largest length."""


def compute_transcription_baselines(task: "Speech", split: str) -> list[TrivialBaseline]:
    """Return two constant answers, in character and word error rates; the better one in training is the reference."""
    audio = task.audio
    train = [_to_text(audio.train.symbols(index), audio.symbols) for index in range(len(audio.train.domain_U))]
    sample = PaddedTexts([train[index * len(train) // n] for n in [min(MAX_TEXTS, len(train))] for index in range(n)])
    answers = {
        "constant transcript": choose_transcript(train, sample),
        "constant letters": build_answer(train, sample),
    }
    best = min(answers, key=lambda name: sample.compute_error_rate(answers[name]))
    meanings = {
        "constant transcript": "the training transcript with the lowest error rate, for every recording",
        "constant letters": "the frequent letters whose text has the lowest error rate in training, built greedily",
    }
    return [
        TrivialBaseline(
            name=name,
            meaning=f"{meanings[name]}: '{answer}'",
            values=_evaluate(task, split, answer),
            is_reference=name == best,
        )
        for name, answer in answers.items()
    ]


class PaddedTexts:
    """Texts as an array, for edit distances to one answer at a time."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.length_U = np.array([len(text) for text in texts])
        self.code_US = np.full((len(texts), max(self.length_U, default=0)), -1, np.int32)
        for row, text in enumerate(texts):
            self.code_US[row, : len(text)] = [ord(character) for character in text]

    def count_errors(self, answer: str) -> Values:
        """Return the edit distance of the answer to each text: a row of all their tables at a time."""
        num_columns = self.code_US.shape[1] + 1
        column_T = np.arange(num_columns, dtype=np.int32)
        distance_UT = np.tile(column_T, (len(self.code_US), 1))
        for row, character in enumerate(answer, 1):
            first_U1 = np.full((len(distance_UT), 1), row, np.int32)
            replaced_US = distance_UT[:, :-1] + (self.code_US != ord(character))
            best_US = np.minimum(replaced_US, distance_UT[:, 1:] + 1)
            # Insertions: the minimum over k <= t of best[k] + (t - k).
            relative_UT = np.concatenate([first_U1, best_US], axis=1) - column_T
            distance_UT = np.minimum.accumulate(relative_UT, axis=1) + column_T
        errors_U: Values = distance_UT[np.arange(len(distance_UT)), self.length_U]
        return errors_U

    def compute_error_rate(self, answer: str) -> float:
        """Return the character error rate of the answer."""
        return float(self.count_errors(answer).sum() / max(self.length_U.sum(), 1))


def choose_transcript(train: Sequence[str], sample: PaddedTexts) -> str:
    """Return the transcript with the lowest error rate among the most frequent and shortest ones."""
    counts = Counter(train)
    answers = sorted(counts, key=lambda text: (-counts[text], len(text), text))[:MAX_ANSWERS]
    return min(answers, key=sample.compute_error_rate)


def build_answer(train: Iterable[str], sample: PaddedTexts) -> str:
    """Return a text built by inserting, wherever it lowers the error rate most, one of the most frequent characters."""
    letters = [letter for letter, _ in Counter("".join(train)).most_common(MAX_LETTERS)]
    answer = ""
    while len(answer) < MAX_LENGTH:
        longer = {answer[:at] + letter + answer[at:] for at in range(len(answer) + 1) for letter in letters}
        best = min(sorted(longer), key=sample.compute_error_rate)
        if sample.compute_error_rate(best) >= sample.compute_error_rate(answer):
            break
        answer = best
    return " ".join(answer.split())


def _to_text(symbol_S: Values, characters: Sequence[str]) -> str:
    return "".join(characters[symbol] for symbol in symbol_S.tolist())


def _evaluate(task: "Speech", split: str, answer: str) -> Mapping[str, float]:
    """Return the character and word error rates of an answer on the evaluation set."""
    sums = np.zeros((4, len(task.domains)))
    for batch in task.eval_batches(split, EVAL_BATCH):
        texts = [_to_text(row[row > 0] - 1, task.audio.symbols) for row in batch.target_BP.numpy()]
        columns: tuple[Sequence[int] | Values, ...] = (
            PaddedTexts(texts).count_errors(answer),
            [len(text) for text in texts],
            count_word_errors([answer] * len(texts), texts),
            [len(text.split()) for text in texts],
        )
        for row, values in enumerate(columns):
            sums[row] += np.bincount(batch.domain_B.numpy(), weights=values, minlength=len(task.domains))
    errors_D, size_D, word_errors_D, words_D = torch.from_numpy(sums)
    return {
        **average_by_domain("cer", errors_D, size_D, task.domains, task.num_held_out),
        **average_by_domain("wer", word_errors_D, words_D, task.domains, task.num_held_out),
    }
