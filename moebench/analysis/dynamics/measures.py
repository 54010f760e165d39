"""How two routings of the same tokens agree, which experts go together, how similar experts are.

A routing is a table `member_TE` (bool): token t goes to expert e.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from moebench.experts.bank import Bank, local_shard
from moebench.experts.mixed import DeepBank, MixedBank
from moebench.models.whole_model import StackBank


def compute_agreement(first_TE: Tensor, second_TE: Tensor) -> float:
    """Return the mean over tokens of 2 |A ∩ B| / (|A| + |B|), A and B the experts of a token in two routings.

    With k experts for every token it is |A ∩ B| / k, the router saturation of OLMoE (arXiv:2409.02060, section 5.1) if
    the second routing is the final one. Tokens without an expert in both count nowhere; 1 where no token has one.
    """
    size_T = (first_TE.sum(1) + second_TE.sum(1)).double()
    shared_T = 2 * (first_TE & second_TE).sum(1).double()
    served_T = size_T > 0
    return float((shared_T[served_T] / size_T[served_T]).mean()) if served_T.any() else 1.0


def compute_chance_agreement(first_TE: Tensor, second_TE: Tensor) -> float:
    """Return the expected agreement if the tokens of one routing were in random order: what equal loads alone give."""
    first, second = _count_by_size(first_TE), _count_by_size(second_TE)
    expected, num_pairs = 0.0, 0.0
    for size, (num_tokens, load_E) in first.items():
        for other_size, (num_other, other_E) in second.items():
            if size + other_size > 0:
                expected += 2 * float(load_E @ other_E) / (size + other_size)
                num_pairs += num_tokens * num_other
    return expected / num_pairs if num_pairs else 1.0


def _count_by_size(member_TE: Tensor) -> dict[int, tuple[int, Tensor]]:
    """Return number of experts -> how many tokens have that number, and the loads of these tokens."""
    size_T = member_TE.sum(1)
    return {
        size: (int((size_T == size).sum()), member_TE[size_T == size].sum(0).double()) for size in set(size_T.tolist())
    }


def find_changed_tokens(first_TE: Tensor, second_TE: Tensor) -> Tensor:
    """Return which tokens have other experts in the second routing, bool [T]."""
    return (first_TE != second_TE).any(1)


def find_last_changes(tables: Sequence[Tensor]) -> list[float]:
    """Return for each routing but the last the share of tokens whose experts change after it.

    It is one minus the distribution of the last fluctuation (StableMoE, arXiv:2204.08396, figure 2), from below: what
    changes between two checkpoints and back is not seen.
    """
    changed = [find_changed_tokens(before, after) for before, after in pairwise(tables)]
    return [float(torch.stack(changed[position:]).any(0).double().mean()) for position in range(len(changed))]


def compute_coactivation(member_TE: Tensor) -> Tensor:
    """Return N_ij / N_i, fp64 [E, E]: of the tokens of expert i, the share that expert j has too.

    OLMoE, arXiv:2409.02060, section 5.2. The diagonal is 1; rows of experts without a token are NaN.
    """
    table_TE = member_TE.double()
    joint_EE = table_TE.T @ table_TE
    return joint_EE / joint_EE.diagonal().unsqueeze(1)


def average_strongest_partner(member_TE: Tensor) -> float | None:
    """Return the mean over experts of the highest co-activation with another expert; None where no two go together."""
    if member_TE.shape[1] < 2 or int(member_TE.sum(1).max()) < 2:
        return None
    share_EE = compute_coactivation(member_TE)
    share_EE = share_EE[~share_EE.isnan().any(1)].clone()
    loaded_E = member_TE.any(0).nonzero().squeeze(1)
    share_EE[torch.arange(len(loaded_E)), loaded_E] = -1
    return float(share_EE.max(1).values.mean())


def swap_experts(member_TE: Tensor, generator: Generator, rounds: int) -> Tensor:
    """Return a random routing in which every expert keeps its load and every token its number of experts.

    In each round tokens meet in random pairs; the experts that only one of a pair has are dealt out again at random
    (the curveball algorithm, doi:10.1038/ncomms5114). After enough rounds every routing with these loads and numbers is
    equally likely.
    """
    member_TE = member_TE.clone()
    num_pairs = len(member_TE) // 2
    for _ in range(rounds):
        order_T = torch.randperm(len(member_TE), generator=generator)
        left_P, right_P = order_T[:num_pairs], order_T[num_pairs : 2 * num_pairs]
        left_PE, right_PE = member_TE[left_P], member_TE[right_P]
        single_PE = left_PE ^ right_PE
        # The experts of a single token in random order: the first |A \ B| of them go to the left one.
        key_PE = torch.rand(single_PE.shape, generator=generator).masked_fill(~single_PE, 2.0)
        rank_PE = key_PE.argsort(1).argsort(1)
        to_left_PE = single_PE & (rank_PE < (left_PE & ~right_PE).sum(1, keepdim=True))
        member_TE[left_P] = (left_PE & right_PE) | to_left_PE
        member_TE[right_P] = (left_PE & right_PE) | (single_PE & ~to_left_PE)
    return member_TE


def list_expert_weights(bank: Bank) -> list[Tensor]:
    """Return the weights of each group of experts of one shape, fp64 [E, weights]; experts without weights are left."""
    if isinstance(bank, MixedBank):
        return [table for group in bank.groups if isinstance(group, Bank) for table in list_expert_weights(group)]
    if isinstance(bank, StackBank):
        stacks = [torch.cat([_flatten(value) for value in stack.parameters()]) for stack in bank.stacks]
        return [torch.stack(stacks)]
    modules: list[nn.Module] = [*bank.banks] if isinstance(bank, DeepBank) else [bank]
    stacked = [local_shard(value).detach().double().flatten(1) for module in modules for value in module.parameters()]
    return [torch.cat(stacked, 1)] if stacked else []


def _flatten(value: Tensor) -> Tensor:
    return value.detach().double().flatten()


def compute_pair_similarity(groups: Sequence[Tensor]) -> float | None:
    """Return the mean cosine between the weights of two experts, over all pairs of one shape; None without a pair."""
    total, num_pairs = 0.0, 0
    for weight_EX in groups:
        num_experts = len(weight_EX)
        sum_X = nn.functional.normalize(weight_EX, dim=1).sum(0)
        # |Σ u|² = E + 2 Σ_{i<j} u_i · u_j for unit vectors u.
        total += (float(sum_X @ sum_X) - num_experts) / 2
        num_pairs += num_experts * (num_experts - 1) // 2
    return total / num_pairs if num_pairs else None


def compute_matched_similarity(groups: Sequence[Tensor], final: Sequence[Tensor]) -> float | None:
    """Return the mean cosine of each expert with itself in the final model; None where experts have no weights."""
    cosines = [
        nn.functional.cosine_similarity(weight_EX, final_EX, dim=1)
        for weight_EX, final_EX in zip(groups, final, strict=True)
    ]
    return float(torch.cat(cosines).mean()) if cosines else None
