"""Banks of other experts: deeper ones, ones without a network, and banks whose experts differ."""

import itertools
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from moebench.experts.bank import Bank
from moebench.experts.dropout import Dropout
from moebench.experts.feed_forward import ExpertBank, draw
from moebench.experts.layout import ExpertShape
from moebench.experts.widths import Widths


def bank_of(
    shapes: Sequence[ExpertShape],
    widths: Widths,
    d_model: int,
    activation: str,
    out_scale: float = 1.0,
    *,
    recompute: bool = False,
) -> Bank:
    """Return the bank of feed-forward and network-free experts of these shapes, in their order."""
    groups: list[Bank] = []
    for shape, equal in itertools.groupby(shapes):
        number = len(list(equal))
        if shape.kind == "ffn":
            width = widths.of(shape.width)
            banks = [
                ExpertBank(d_model, width, number, activation, out_scale, recompute=recompute)
                for _ in range(shape.depth)
            ]
            groups.append(banks[0] if shape.depth == 1 else DeepBank(banks))
        else:
            groups.append(WITHOUT_NETWORK[shape.kind](d_model, number, out_scale))
    return groups[0] if len(groups) == 1 else MixedBank(groups)


class DeepBank(Bank):
    """Experts of several networks one after another: h ← h + FFN_i(h), y = h - x. One network is a plain expert."""

    def __init__(self, banks: Sequence[Bank]) -> None:
        super().__init__()
        self.banks = nn.ModuleList(banks)
        self.num_experts = banks[0].num_experts

    def init_weights(self, generator: Generator) -> None:
        """Nothing of its own: the banks draw."""

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RD, rows sorted by expert."""
        y_RD: Tensor | None = None
        for bank in self._banks:
            step_RD = bank.rows(x_RD if y_RD is None else x_RD + y_RD, load_E, dropout)
            y_RD = step_RD if y_RD is None else y_RD + step_RD
        assert y_RD is not None
        return y_RD

    def merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_GSD: each of the networks is merged on its own."""
        h_GSD = x_GSD
        for bank in self._banks:
            h_GSD = h_GSD + bank.merged(h_GSD, weight_GE, dropout)
        return h_GSD - x_GSD

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return what one expert computes."""
        h_RD = x_RD
        for bank in self._banks:
            h_RD = h_RD + bank.expert(h_RD, index)
        return h_RD - x_RD

    def elements_per_row(self) -> int:
        """Numbers that a row for another process carries, there and back: it stays there for all networks."""
        return self._banks[0].elements_per_row()

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row through each expert: the sum over its networks."""
        return tuple(map(sum, zip(*(bank.flops_per_row_E() for bank in self._banks), strict=True)))

    @property
    def _banks(self) -> list[Bank]:
        return [bank for bank in self.banks if isinstance(bank, Bank)]


class MixedBank(Bank):
    """Experts of different kinds: groups side by side, each computed as one bank on its slice of the rows."""

    reads_loads = True

    def __init__(self, groups: Sequence[Bank]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.num_experts = sum(group.num_experts for group in groups)

    def init_weights(self, generator: Generator) -> None:
        """Nothing of its own: the groups draw."""

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RD, rows sorted by expert."""
        load_GE = self._by_group(load_E)
        size_G = torch.stack([load.sum() for load in load_GE]).tolist()
        parts = zip(self._groups, torch.split(x_RD, size_G), load_GE, strict=True)
        return torch.cat([group(rows, load, dropout) for group, rows, load in parts])

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return what one expert computes."""
        for group in self._groups:
            if index < group.num_experts:
                return group.expert(x_RD, index)
            index -= group.num_experts
        raise IndexError(index)

    def elements_sent(self, rows_E: Tensor) -> int:
        """Return how many numbers a forward pass sends to other processes: those of its groups."""
        parts = zip(self._groups, self._by_group(rows_E), strict=True)
        return sum(group.elements_sent(rows) for group, rows in parts)

    def count_computed_rows(self, own_E: Tensor, shared_E: Tensor) -> int:
        """Return how many rows this process computes: those of its groups."""
        parts = zip(self._groups, self._by_group(own_E), self._by_group(shared_E), strict=True)
        return sum(group.count_computed_rows(own, shared) for group, own, shared in parts)

    def _by_group(self, value_E: Tensor) -> tuple[Tensor, ...]:
        return torch.split(value_E, [group.num_experts for group in self._groups])

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row through each expert."""
        return tuple(itertools.chain.from_iterable(group.flops_per_row_E() for group in self._groups))

    @property
    def _groups(self) -> list[Bank]:
        return [group for group in self.groups if isinstance(group, Bank)]


class ZeroBank(Bank):
    """Zero experts (MoE++, arXiv:2410.07348): y = 0; the token skips the layer."""

    stays = True

    def __init__(self, d_model: int, num_experts: int, out_scale: float = 1.0) -> None:
        super().__init__()
        self.num_experts = num_experts

    def init_weights(self, generator: Generator) -> None:
        """Nothing to draw."""

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x_RD)

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x_RD)

    def flops_per_row_E(self) -> tuple[int, ...]:
        """No FLOPs."""
        return (0,) * self.num_experts


class CopyBank(ZeroBank):
    """Copy experts (MoE++): y = x; what the network makes of the token is the router's weight."""

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return x."""
        return x_RD

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return x."""
        return x_RD


class ConstantBank(Bank):
    """Constant experts (MoE++, eq. 5): y = a_1 x + a_2 v with [a_1, a_2] = softmax(W_c x) and a trained vector v."""

    reads_loads = True
    stays = True

    def __init__(self, d_model: int, num_experts: int, out_scale: float = 1.0) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.out_scale = out_scale
        self.w_mix_ED2 = nn.Parameter(torch.empty(num_experts, d_model, 2))
        self.vector_ED = nn.Parameter(torch.empty(num_experts, d_model))

    def init_weights(self, generator: Generator) -> None:
        """Draw the vector at the scale of a network's output."""
        draw(self.w_mix_ED2, self.w_mix_ED2.shape[1] ** -0.5, generator)
        draw(self.vector_ED, self.out_scale, generator)

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RD, rows sorted by expert."""
        parts = enumerate(torch.split(x_RD, load_E.tolist()))
        return torch.cat([self.expert(rows, index) for index, rows in parts])

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return what one expert computes."""
        mix_R2 = (x_RD @ self.w_mix_ED2[index]).softmax(-1)
        y_RD: Tensor = mix_R2[..., :1] * x_RD + mix_R2[..., 1:] * self.vector_ED[index]
        return y_RD.to(x_RD.dtype)

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row: the product that makes the mix; the mix itself, like norms, is not counted."""
        return (2 * self.w_mix_ED2[0].numel(),) * self.num_experts


WITHOUT_NETWORK: dict[str, type[ZeroBank] | type[ConstantBank]] = {
    "zero": ZeroBank,
    "copy": CopyBank,
    "constant": ConstantBank,
}
