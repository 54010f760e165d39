"""One MoE layer in a plain PyTorch training loop: python examples/layer.py [STEPS]

The layer replaces the feed-forward part of a small model that learns to add two digits modulo 10.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

import moebench

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300


class Model(nn.Module):
    """An embedding of each digit, an MoE layer with a residual connection, a linear head."""

    def __init__(self, d_model: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, d_model)
        self.norm = nn.RMSNorm(2 * d_model)
        self.moe = moebench.moe_layer(
            2 * d_model,
            num_experts=8,
            router={"name": "top_k", "top_k": 2},
            layout={"ffn_width": 256, "capacity_factor_train": 1.5},
        )
        self.head = nn.Linear(2 * d_model, 10)

    def forward(self, digits_B2: Tensor, step: int | None = None) -> tuple[Tensor, moebench.MoERecord]:
        """Return the logits of the sum, and what the layer's router did."""
        x_BD = self.embedding(digits_B2).flatten(1)
        y_BD, record = self.moe(self.norm(x_BD), step=step)
        return self.head(x_BD + y_BD), record


def main() -> None:
    """Train, then print the accuracy and the load of each expert."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        digits_B2 = torch.randint(10, (128, 2))
        logits, record = model(digits_B2, step)
        task_loss = functional.cross_entropy(logits, digits_B2.sum(1) % 10)
        loss = task_loss + moebench.balance_loss(record)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.moe.after_step(record)  # nothing for top_k; updates the bias of `loss_free`
        if step % 50 == 0:
            print(f"step {step}: loss {task_loss.item():.3f}, dropped {record.num_dropped} assignments")
    model.eval()
    digits_B2 = torch.cartesian_prod(torch.arange(10), torch.arange(10))
    with torch.no_grad():
        logits, record = model(digits_B2)
    accuracy = (logits.argmax(1) == digits_B2.sum(1) % 10).float().mean()
    print(f"accuracy {accuracy:.2f}, load of each expert {record.kept.load_E.tolist()}")


if __name__ == "__main__":
    main()
