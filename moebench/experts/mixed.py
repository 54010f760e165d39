"""Banks of deep experts, of experts without a network, and of experts that differ."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.experts.activation import Dropout
from moebench.experts.bank import Bank
from moebench.experts.biased import BiasedExpertBank
from moebench.experts.feed_forward import ExpertBank, NetworkStyle
from moebench.experts.layout import ExpertShape
from moebench.experts.widths import Widths
from moebench.routing.linear_map import INPUT_FIRST, TABLE, LinearMap


def build_bank(shapes: Sequence[ExpertShape], widths: Widths, style: NetworkStyle, *, recompute: bool = False) -> Bank:
    """Return the bank of feed-forward and network-free experts of these shapes, in their order."""
    groups: list[Bank] = []
    bank_class, d_model, out_scale = BiasedExpertBank if style.bias else ExpertBank, style.d_model, style.out_scale
    for shape, equal in itertools.groupby(shapes):
        number = len(list(equal))
        if shape.kind == "ffn":
            width = widths.of(shape.width)
            banks = [
                bank_class(d_model, width, number, style.activation, out_scale=out_scale, recompute=recompute)
                for _ in range(shape.depth)
            ]
            groups.append(banks[0] if shape.depth == 1 else DeepBank(banks))
        else:
            groups.append(WITHOUT_NETWORK[shape.kind](d_model, number, out_scale))
    return groups[0] if len(groups) == 1 else MixedBank(groups)


class DeepBank(Bank):
    """Experts of several networks one after another: h ← h + FFN_i(h), y = h - x."""

    def __init__(self, banks: Sequence[Bank]) -> None:
        super().__init__()
        self.banks = nn.ModuleList(banks)
        self.num_experts = banks[0].num_experts

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        y_RD: Tensor | None = None
        for bank in self._banks:
            step_RD = bank.rows(x_RD if y_RD is None else x_RD + y_RD, load_E, dropout)
            y_RD = step_RD if y_RD is None else y_RD + step_RD
        assert y_RD is not None
        return y_RD

    @override
    def compute_merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        h_GSD = x_GSD  # each network is merged separately
        for bank in self._banks:
            h_GSD = h_GSD + bank.compute_merged(h_GSD, weight_GE, dropout)
        return h_GSD - x_GSD

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        h_RD = x_RD
        for bank in self._banks:
            h_RD = h_RD + bank.expert(h_RD, index)
        return h_RD - x_RD

    @override
    def elements_per_row(self) -> int:
        return self._banks[0].elements_per_row()  # a row stays with its expert for all networks

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*(bank.flops_per_row_E() for bank in self._banks), strict=True)))

    @property
    def _banks(self) -> list[Bank]:
        return [bank for bank in self.banks if isinstance(bank, Bank)]


class MixedBank(Bank):
    """Experts of different kinds: groups side by side, each computed as one bank on its slice of the rows."""

    needs_loads_on_host = True

    def __init__(self, groups: Sequence[Bank]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.num_experts = sum(group.num_experts for group in groups)

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        load_GE = self._by_group(load_E)
        size_G = torch.stack([load.sum() for load in load_GE]).tolist()
        parts = zip(self._groups, torch.split(x_RD, size_G), load_GE, strict=True)
        return torch.cat([group(rows, load, dropout) for group, rows, load in parts])

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        for group in self._groups:
            if index < group.num_experts:
                return group.expert(x_RD, index)
            index -= group.num_experts
        raise IndexError(index)

    @override
    def elements_sent(self, rows_E: Tensor) -> int:
        parts = zip(self._groups, self._by_group(rows_E), strict=True)
        return sum(group.elements_sent(rows) for group, rows in parts)

    @override
    def count_computed_rows(self, own_E: Tensor, shared_E: Tensor) -> int:
        parts = zip(self._groups, self._by_group(own_E), self._by_group(shared_E), strict=True)
        return sum(group.count_computed_rows(own, shared) for group, own, shared in parts)

    def _by_group(self, value_E: Tensor) -> tuple[Tensor, ...]:
        return torch.split(value_E, [group.num_experts for group in self._groups])

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(group.flops_per_row_E() for group in self._groups))

    @property
    def _groups(self) -> list[Bank]:
        return [group for group in self.groups if isinstance(group, Bank)]


class ZeroBank(Bank):
    """Zero experts (MoE++, arXiv:2410.07348): y = 0; the token skips the layer."""

    is_replicated = True

    def __init__(self, d_model: int, num_experts: int, out_scale: float = 1.0) -> None:
        super().__init__()
        self.num_experts = num_experts

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        return torch.zeros_like(x_RD)

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        return torch.zeros_like(x_RD)

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return (0,) * self.num_experts


class CopyBank(ZeroBank):
    """Copy experts (MoE++): y = x, so the layer's output is the token times the router's weight."""

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        return x_RD

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        return x_RD


class ConstantBank(Bank):
    """Constant experts (MoE++, eq. 5): y = a_1 x + a_2 v with [a_1, a_2] = softmax(W_c x) and a trained vector v."""

    needs_loads_on_host = True
    is_replicated = True

    def __init__(self, d_model: int, num_experts: int, out_scale: float = 1.0) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.out_scale = out_scale
        self.w_mix_ED2 = nn.Parameter(torch.empty(num_experts, d_model, 2))
        self.vector_ED = nn.Parameter(torch.empty(num_experts, d_model))

    @override
    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.w_mix_ED2, std=self.w_mix_ED2.shape[1] ** -0.5, generator=generator)
        nn.init.normal_(self.vector_ED, std=self.out_scale, generator=generator)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where the maps are: the vectors are entries of a table, decayed like one."""
        return {"w_mix_ED2": replace(INPUT_FIRST, is_gate=True), "vector_ED": TABLE}

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        rows = enumerate(torch.split(x_RD, load_E.tolist()))
        return torch.cat([self.expert(x_rD, index) for index, x_rD in rows])

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        mix_R2 = (x_RD @ self.w_mix_ED2[index]).softmax(-1)
        y_RD: Tensor = mix_R2[..., :1] * x_RD + mix_R2[..., 1:] * self.vector_ED[index]
        return y_RD.to(x_RD.dtype)

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return (2 * self.w_mix_ED2[0].numel(),) * self.num_experts  # like norms, the mix itself is not counted


WITHOUT_NETWORK: dict[str, type[ZeroBank] | type[ConstantBank]] = {
    "zero": ZeroBank,
    "copy": CopyBank,
    "constant": ConstantBank,
}
