"""Seeds derived from their purpose: equal parts give equal seeds, different parts unrelated ones."""

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed derived from printable parts, for example `(run_seed, "router", step, layer)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator seeded with `derive_seed(*parts)`.

    A generator per purpose makes randomness stateless: a step that is resumed or recomputed draws the same numbers,
    and no generator state has to be saved or kept aligned between arms.
    """
    return torch.Generator(device).manual_seed(derive_seed(*parts))
