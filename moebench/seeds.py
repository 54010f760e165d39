"""Seeds derived from what they are for: the same parts give the same seed, other parts an unrelated one."""

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from any printable parts, for example (run seed, "router", step, layer)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator seeded by `derive_seed(*parts)`.

    Counter-based randomness: a step that is resumed or recomputed draws the same numbers, and no generator state
    has to be saved or kept in step between arms.
    """
    return torch.Generator(device).manual_seed(derive_seed(*parts))
