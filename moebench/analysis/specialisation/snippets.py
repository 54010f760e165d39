"""Inputs of single tokens as pictures: a patch in its image, a moment in its spectrogram."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moebench.analysis.specialisation.routed_tokens import RoutedTokens
from moebench.analysis.specialisation.token_labels import LabelColumn
from moebench.tasks.audio.task import AudioTask
from moebench.tasks.task import Batch
from moebench.tasks.vision import Vision

AROUND = 6
"""Positions of a recording on each side of the token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snippet:
    """The picture of one token."""

    picture: np.ndarray
    """[rows, columns] or [rows, columns, 3]."""
    box: tuple[float, float, float, float] | None
    """Left, top, width and height of the token in pixels of the picture; None: the token has no place in it."""
    caption: str


@dataclass(frozen=True, kw_only=True)
class Snippets:
    """How the tokens of a set are drawn."""

    read: Callable[[int], Snippet]
    """Token -> its picture."""
    caption: str
    """What a picture shows."""
    is_spectrogram: bool


def read_image_patches(
    task: Vision, batches: Sequence[Batch], tokens: RoutedTokens, columns: Mapping[str, LabelColumn]
) -> Snippets:
    """Return the images of the tokens, in which the token's patch is marked."""
    images = [image for batch in batches for image in batch.input_BL.cpu().numpy()]
    patch, size = task.config.patch, task.config.data.size
    rows, has_class_token = size // patch, task.config.pooling == "class_token"
    class_column = columns.get("class")

    def read(token: int) -> Snippet:
        sequence, position = int(tokens.sequence_T[token]), int(tokens.position_T[token]) - has_class_token
        pixel_LX = images[sequence] * task.std_X + task.mean_X
        picture = pixel_LX.reshape(rows, rows, patch, patch, -1).transpose(0, 2, 1, 3, 4).reshape(size, size, -1)
        box = (position % rows * patch - 0.5, position // rows * patch - 0.5, patch, patch) if position >= 0 else None
        name = class_column.values[class_column.label_T[token]] if class_column else ""
        return Snippet(picture=picture.clip(0, 1).squeeze(), box=box, caption=name)

    return Snippets(read=read, caption="the image of the token, its patch in a box", is_spectrogram=False)


def read_spectrograms(
    task: AudioTask, batches: Sequence[Batch], tokens: RoutedTokens, columns: Mapping[str, LabelColumn]
) -> Snippets:
    """Return the log-mel spectrograms around the tokens, in which the token's frames are marked."""
    config = task.config
    stack, context, mels = config.stack, config.context, config.data.num_mels
    sounds = [sound for batch in batches for sound in batch.input_BL.cpu().numpy()]
    length_S = np.bincount(tokens.sequence_T)
    kinds = [columns[name] for name in ("domain", "character", "class") if name in columns]

    def read(token: int) -> Snippet:
        sound, position = sounds[tokens.sequence_T[token]], int(tokens.position_T[token])
        frame_LFM = sound.reshape(len(sound), stack + 2 * context, mels)[:, context : context + stack]
        spoken = frame_LFM[: length_S[tokens.sequence_T[token]]].reshape(-1, mels).astype(np.float64)
        padded = np.pad(spoken, ((AROUND * stack, AROUND * stack), (0, 0)), constant_values=np.nan)
        start = position * stack
        picture = padded[start : start + (2 * AROUND + 1) * stack].T
        names = [column.values[column.label_T[token]] for column in kinds]
        box = (AROUND * stack - 0.5, -0.5, stack, mels)
        return Snippet(picture=picture, box=box, caption=" ".join(names))

    seconds = (2 * AROUND + 1) * stack / 100
    return Snippets(
        read=read,
        caption=f"log-mel spectrogram of {seconds:.2f} s, low bands below; the token's {10 * stack} ms in a box",
        is_spectrogram=True,
    )
