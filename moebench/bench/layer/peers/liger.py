"""liger-kernel: its fused experts in Triton behind a softmax top-k gate in plain torch; dropless, on a GPU only.

The library has no router: indices and weights are given to it.
"""

from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
from torch import Tensor, nn
from torch.nn import functional

from moebench.bench.layer.problem import Candidate, Problem, Skipped

NAME = "liger-kernel"


class LigerLayer(nn.Module):
    """Softmax top-k with renormalised weights, then its experts: weights are [E, out, in]."""

    def __init__(self, gate_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, top_k: int) -> None:
        super().__init__()
        self.gate_ED = nn.Parameter(gate_ED.clone())
        self.w_in_EFD = nn.Parameter(w_in_EDF.transpose(1, 2).contiguous())
        self.w_out_EDF = nn.Parameter(w_out_EFD.transpose(1, 2).contiguous())
        self.top_k = top_k

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return y_TD."""
        scores_TE = functional.linear(x_TD.float(), self.gate_ED.float()).softmax(-1)
        weight_TK, expert_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        y_TD: Tensor = LigerFusedMoEFunction.apply(
            x_TD, self.w_in_EFD, self.w_out_EDF, expert_TK.int(), weight_TK.to(x_TD.dtype)
        )
        return y_TD


def build_candidates(problem: Problem) -> list[Candidate | Skipped]:
    """Return its layer on rows with SwiGLU."""
    if not problem.is_gated:
        return []
    if problem.device.type != "cuda":
        return [Skipped(name=NAME, reason="its kernels need a GPU")]
    bank = problem.bank
    module = LigerLayer(problem.gate_ED, bank.w_in_EDF.detach(), bank.w_out_EFD.detach(), problem.shape.top_k)
    return [Candidate(name=NAME, module=module, forward=module)]
