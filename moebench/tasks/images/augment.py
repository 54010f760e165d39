"""Augmentation of training images: small shifts and mirroring, a function of the seed and the step."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from moebench.seeds import make_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Augmentation:
    """Shift and mirroring of each image of a batch."""

    shift_B2: np.ndarray
    """Pixels down and right (int64)."""
    mirrored_B: np.ndarray
    """Whether the image is mirrored left to right before the shift (bool)."""

    @classmethod
    def draw(cls, batch_size: int, largest_shift: int, seed: int, step: int) -> "Augmentation":
        """Draw the augmentation of the whole batch of a step, the same in every process."""
        draw = make_generator("augmentation", seed, step)
        shift_B2 = torch.randint(-largest_shift, largest_shift + 1, (batch_size, 2), generator=draw)
        mirrored_B = torch.rand(batch_size, generator=draw) < 0.5
        return cls(shift_B2=shift_B2.numpy(), mirrored_B=mirrored_B.numpy())

    def select(self, part: slice, may_mirror_B: np.ndarray) -> "Augmentation":
        """Return the augmentation of a part of the batch, with mirroring only where it is allowed."""
        return Augmentation(shift_B2=self.shift_B2[part], mirrored_B=self.mirrored_B[part] & may_mirror_B)

    def __call__(self, pixel_BHWC: np.ndarray) -> np.ndarray:
        """Return the augmented images; pixels from outside the image are black."""
        reach = int(np.abs(self.shift_B2).max(initial=0))
        if self.mirrored_B.any():
            pixel_BHWC = np.where(self.mirrored_B[:, None, None, None], pixel_BHWC[:, :, ::-1], pixel_BHWC)
        if reach == 0:
            return pixel_BHWC
        _, height, width, _ = pixel_BHWC.shape
        padded_BXYC = np.pad(pixel_BHWC, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
        # A shifted image is a window of the padded one, so that whole rows are copied.
        window_BXYCHW = sliding_window_view(padded_BXYC, (height, width), axis=(1, 2))
        down_B, right_B = (reach - self.shift_B2).T
        return np.moveaxis(window_BXYCHW[np.arange(len(down_B)), down_B, right_B], 1, -1)
