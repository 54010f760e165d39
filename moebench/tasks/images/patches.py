"""Images as sequences: squares, the vectors that they become, and what the head makes of them."""

import torch
from torch import Generator, Tensor, nn


def patches_of(pixel_BHWC: Tensor, patch: int) -> Tensor:
    """Return the squares of P × P pixels, row by row, each laid out as rows, columns, channels: [B, L, P·P·C]."""
    batch, height, width, channels = pixel_BHWC.shape
    rows, columns = height // patch, width // patch
    cut = pixel_BHWC.view(batch, rows, patch, columns, patch, channels)
    return cut.transpose(2, 3).reshape(batch, rows * columns, patch * patch * channels)


MOST_ROWS = 8
"""Of larger grids of squares, neighbours share a place."""


def patch_labels(rows: int, *, with_class_token: bool) -> tuple[tuple[str, ...], Tensor]:
    """Return the names of the places in an image of rows × rows squares, and the place label_L of each vector.

    The class token, which stands first, has a place of its own, the last.
    """
    kept = min(rows, MOST_ROWS)
    names = [f"row {row + 1}, column {column + 1}" for row in range(kept) for column in range(kept)]
    place_R = torch.arange(rows) * kept // rows
    label_L = (place_R[:, None] * kept + place_R).flatten()
    if with_class_token:
        label_L = torch.cat([label_L.new_tensor([len(names)]), label_L])
        names.append("class token")
    return tuple(names), label_L


def pooled(x_BLD: Tensor, pooling: str) -> Tensor:
    """Return one vector x_BD for each image: the mean over its sequence, or the class token, which stands first."""
    return x_BLD.mean(1) if pooling == "mean" else x_BLD[:, 0]


class PatchEmbedding(nn.Module):
    """x = W patch + b + a learned vector of the place; before them the class token, if there is one."""

    def __init__(self, num_patches: int, width: int, d_model: int, *, with_class_token: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, d_model)
        self.place_LD = nn.Parameter(torch.empty(num_patches + with_class_token, d_model))
        self.with_class_token = with_class_token

    def init_weights(self, generator: Generator) -> None:
        """Draw the map with variance 1 / fan-in, and the places as large: where a square lies says as much as its grey.

        The class token is its place's vector: it has no content of its own.
        """
        nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.place_LD, std=PLACE_STD, generator=generator)

    def forward(self, patch_BLX: Tensor) -> Tensor:
        """Return x_BLD."""
        x_BLD: Tensor = self.linear(patch_BLX)
        if self.with_class_token:
            x_BLD = torch.cat([x_BLD.new_zeros(x_BLD.shape[0], 1, x_BLD.shape[2]), x_BLD], dim=1)
        return x_BLD + self.place_LD

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per vector of a sequence of `length`."""
        return 2 * self.linear.weight.numel() * (length - self.with_class_token) // length


PLACE_STD = 0.5
"""Of the vectors of places at the start, where the content has a variance near 1."""


class ClassHead(nn.Module):
    """Pools a sequence and projects it to the classes."""

    def __init__(self, d_model: int, num_classes: int, pooling: str) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, num_classes)
        self.pooling = pooling

    def init_weights(self, generator: Generator) -> None:
        """Start at zero: the first prediction is uniform, ln C nats per image."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return logits [B, C]."""
        logits: Tensor = self.linear(pooled(x_BLD, self.pooling))
        return logits

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per vector: once for each image of `length` vectors."""
        return 2 * self.linear.weight.numel() // length
