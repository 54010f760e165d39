"""The plain layer with torch's grouped_mm: sort, gather, two grouped products, weighted index_add, autograd."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moebench.bench.layer.problem import Candidate, Problem, Skipped
from moebench.experts.activation import activate

NAME = "plain grouped_mm"


class PlainGroupedMM(nn.Module):
    """A softmax top-k layer in plain torch: the reference for memory where no other library is installed."""

    def __init__(self, gate_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, top_k: int, activation: str) -> None:
        super().__init__()
        self.gate_ED = nn.Parameter(gate_ED.clone())
        self.w_in_EDF = nn.Parameter(w_in_EDF.clone())
        self.w_out_EFD = nn.Parameter(w_out_EFD.clone())
        self.top_k = top_k
        self.activation = activation

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return y_TD."""
        scores_TE = functional.linear(x_TD.float(), self.gate_ED.float()).softmax(-1)
        weight_TK, expert_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        expert_R, assignment_R = expert_TK.reshape(-1).sort(stable=True)
        token_R = assignment_R // self.top_k
        offsets_E = torch.histc(expert_R.float(), len(self.gate_ED), 0, len(self.gate_ED) - 1).cumsum(0).int()
        hidden_RF = functional.grouped_mm(x_TD[token_R], self.w_in_EDF, offs=offsets_E)
        y_RD = functional.grouped_mm(activate(hidden_RF, self.activation), self.w_out_EFD, offs=offsets_E)
        weighted_RD = y_RD * weight_TK.reshape(-1)[assignment_R].unsqueeze(-1).to(y_RD.dtype)
        return torch.zeros_like(x_TD).index_add_(0, token_R, weighted_RD)


def build_plain_layer(problem: Problem) -> Candidate | Skipped:
    """Return the plain layer with the row's weights."""
    bank, size = problem.bank, problem.x_TD.element_size()
    widths = (problem.shape.d_model, *bank.w_in_EDF.shape[2:], problem.shape.hidden)
    if any(width * size % 16 for width in widths):
        return Skipped(name=NAME, reason="grouped_mm needs rows of a multiple of 16 bytes")
    module = PlainGroupedMM(
        problem.gate_ED, bank.w_in_EDF.detach(), bank.w_out_EFD.detach(), problem.shape.top_k, problem.shape.activation
    )
    return Candidate(name=NAME, module=module, forward=module)
