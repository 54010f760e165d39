"""The data of Chen et al. 2022 (definition 3.1): four patches; one carries the label and one the cluster."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

NUM_CLUSTERS = 4
NUM_PATCHES = 4
PATCH_LENGTH = 50
SCALE = 10.0
"""Factor on all patches, as in the released data."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One of the four published settings; the other ranges are the same in all of them."""

    name: str
    highest_feature_noise: float
    """Upper end of the uniform factor on the feature noise; the lower one is 0.5."""
    noise_std: float
    """Norm of the Gaussian noise patch, about: its components have this standard deviation over sqrt(PATCH_LENGTH)."""


SETTINGS = (
    Setting(name="S1", highest_feature_noise=3.0, noise_std=1.0),
    Setting(name="S2", highest_feature_noise=3.0, noise_std=2.0),
    Setting(name="S3", highest_feature_noise=2.0, noise_std=1.0),
    Setting(name="S4", highest_feature_noise=2.0, noise_std=2.0),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """T examples; an example is one token for the router."""

    x_TD: Tensor
    """The patches of each example side by side, D = NUM_PATCHES · PATCH_LENGTH."""
    label_T: Tensor
    """int64, 0 or 1."""
    cluster_T: Tensor
    """int64, 0 ... NUM_CLUSTERS - 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Orthonormal directions: for each cluster that of its label and that of its centre."""

    feature_YI: Tensor
    centre_YI: Tensor

    @classmethod
    def draw(cls, generator: Generator) -> "Directions":
        """Draw the directions uniformly."""
        random_IY = torch.randn(PATCH_LENGTH, 2 * NUM_CLUSTERS, generator=generator)
        direction_YI = torch.linalg.qr(random_IY).Q.T
        return cls(feature_YI=direction_YI[:NUM_CLUSTERS], centre_YI=direction_YI[NUM_CLUSTERS:])


def draw_examples(setting: Setting, directions: Directions, num_examples: int, generator: Generator) -> Examples:
    """Draw examples of a setting.

    With the sign y of the label and the cluster k, the patches are, in random order: α y v_k with α ~ U(0.5, 2), which
    holds the label; β c_k with β ~ U(1, 2), the centre; γ ε v_k' with γ ~ U(0.5, highest), a random sign ε and another
    cluster k', which misleads a network that does not know k; Gaussian noise.
    """
    signs = 2 * torch.randint(2, (2, num_examples), generator=generator) - 1
    sign_T, other_sign_T = signs
    cluster_T = torch.randint(NUM_CLUSTERS, (num_examples,), generator=generator)
    other_T = (cluster_T + torch.randint(1, NUM_CLUSTERS, (num_examples,), generator=generator)) % NUM_CLUSTERS
    uniform_3T = torch.rand(3, num_examples, generator=generator)
    lows = torch.tensor([0.5, 1.0, 0.5])
    highs = torch.tensor([2.0, 2.0, setting.highest_feature_noise])
    alpha_T, beta_T, gamma_T = lows[:, None] + (highs - lows)[:, None] * uniform_3T
    noise_TI = torch.randn(num_examples, PATCH_LENGTH, generator=generator) * setting.noise_std * PATCH_LENGTH**-0.5
    patches_TPI = torch.stack(
        [
            (alpha_T * sign_T)[:, None] * directions.feature_YI[cluster_T],
            beta_T[:, None] * directions.centre_YI[cluster_T],
            (gamma_T * other_sign_T)[:, None] * directions.feature_YI[other_T],
            noise_TI,
        ],
        dim=1,
    )
    order_TP = torch.rand(num_examples, NUM_PATCHES, generator=generator).argsort(1)
    patches_TPI = patches_TPI.gather(1, order_TP[..., None].expand_as(patches_TPI))
    return Examples(x_TD=SCALE * patches_TPI.flatten(1), label_T=(sign_T + 1) // 2, cluster_T=cluster_T)
