"""What training does to images: small shifts and mirroring, as a function of the seed and the step."""

from dataclasses import dataclass

import numpy as np
import torch

from moebench.routing.seeds import generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Augmentation:
    """What happens to each image of a batch."""

    shift_B2: np.ndarray
    """Pixels down and right (int64)."""
    mirrored_B: np.ndarray
    """bool: left becomes right, before the shift."""

    @classmethod
    def drawn(cls, batch_size: int, largest_shift: int, seed: int, step: int) -> "Augmentation":
        """Draw for the whole batch of a step: every process that holds a part of it draws the same."""
        draw = generator("augmentation", seed, step)
        shift_B2 = torch.randint(-largest_shift, largest_shift + 1, (batch_size, 2), generator=draw)
        mirrored_B = torch.rand(batch_size, generator=draw) < 0.5
        return cls(shift_B2=shift_B2.numpy(), mirrored_B=mirrored_B.numpy())

    def of(self, part: slice, may_mirror_B: np.ndarray) -> "Augmentation":
        """Return what happens to a part of the batch, where mirroring is allowed for some images alone."""
        return Augmentation(shift_B2=self.shift_B2[part], mirrored_B=self.mirrored_B[part] & may_mirror_B)

    def __call__(self, pixel_BHWC: np.ndarray) -> np.ndarray:
        """Return the changed images; what comes in from outside is black."""
        _, height, width, _ = pixel_BHWC.shape
        row_BH = np.arange(height) - self.shift_B2[:, :1]
        column_BW = np.arange(width) - self.shift_B2[:, 1:]
        inside_BHW = _within(row_BH, height)[:, :, None] & _within(column_BW, width)[:, None, :]
        column_BW = np.where(self.mirrored_B[:, None], width - 1 - column_BW, column_BW)
        image_B11 = np.arange(len(pixel_BHWC))[:, None, None]
        moved_BHWC = pixel_BHWC[
            image_B11, row_BH.clip(0, height - 1)[:, :, None], column_BW.clip(0, width - 1)[:, None, :]
        ]
        return np.where(inside_BHW[..., None], moved_BHWC, np.uint8(0))


def _within(place: np.ndarray, size: int) -> np.ndarray:
    return np.asarray((place >= 0) & (place < size))
