"""Images as sequences of patches, their embedding, and the classification head."""

import torch
from torch import Generator, Tensor, nn


def extract_patches(pixel_BHWC: Tensor, patch: int) -> Tensor:
    """Return the patches of P × P pixels, row by row, each flattened as rows, columns, channels: [B, L, P·P·C]."""
    batch, height, width, channels = pixel_BHWC.shape
    rows, columns = height // patch, width // patch
    cut = pixel_BHWC.view(batch, rows, patch, columns, patch, channels)
    return cut.transpose(2, 3).reshape(batch, rows * columns, patch * patch * channels)


MAX_ROWS = 8
"""In larger grids of patches, neighbours share a position label."""


def patch_labels(rows: int, *, with_class_token: bool) -> tuple[tuple[str, ...], Tensor]:
    """Return the names of the positions in an image of rows × rows patches, and the position label_L of each token.

    The class token, which comes first, has its own position, the last.
    """
    num_labelled = min(rows, MAX_ROWS)
    names = [f"row {row + 1}, column {column + 1}" for row in range(num_labelled) for column in range(num_labelled)]
    label_R = torch.arange(rows) * num_labelled // rows
    label_L = (label_R[:, None] * num_labelled + label_R).flatten()
    if with_class_token:
        label_L = torch.cat([label_L.new_tensor([len(names)]), label_L])
        names.append("class token")
    return tuple(names), label_L


def pool(x_BLD: Tensor, pooling: str) -> Tensor:
    """Return one vector x_BD per image: the mean over its sequence, or the class token, which comes first."""
    return x_BLD.mean(1) if pooling == "mean" else x_BLD[:, 0]


class PatchEmbedding(nn.Module):
    """x = W patch + b + a learned position embedding, preceded by the class token if there is one."""

    def __init__(self, num_patches: int, width: int, d_model: int, *, with_class_token: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, d_model)
        self.place_LD = nn.Parameter(torch.empty(num_patches + with_class_token, d_model))
        self.with_class_token = with_class_token

    def init_weights(self, generator: Generator) -> None:
        """Draw the projection with variance 1 / fan-in, and position embeddings with standard deviation `POSITION_STD`.

        The class token is its position embedding: it has no content of its own.
        """
        nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.place_LD, std=POSITION_STD, generator=generator)

    def forward(self, patch_BLX: Tensor) -> Tensor:
        """Return x_BLD."""
        x_BLD: Tensor = self.linear(patch_BLX)
        if self.with_class_token:
            x_BLD = torch.cat([x_BLD.new_zeros(x_BLD.shape[0], 1, x_BLD.shape[2]), x_BLD], dim=1)
        return x_BLD + self.place_LD

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs per token of a sequence of `length`."""
        return 2 * self.linear.weight.numel() * (length - self.with_class_token) // length


POSITION_STD = 0.5
"""Initial standard deviation of position embeddings; projected patches have variance near 1."""


class ClassHead(nn.Module):
    """Pool a sequence and project it to the classes."""

    def __init__(self, d_model: int, num_classes: int, pooling: str) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, num_classes)
        self.pooling = pooling

    def init_weights(self, generator: Generator) -> None:
        """Set the parameters to zero: the first prediction is uniform, ln C nats per image."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return logits [B, C]."""
        logits: Tensor = self.linear(pool(x_BLD, self.pooling))
        return logits

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs per token: the projection is computed once per image of `length` tokens."""
        return 2 * self.linear.weight.numel() // length
