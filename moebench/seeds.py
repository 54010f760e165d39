"""Seeds derived from their purpose: equal parts give equal seeds, different parts unrelated ones."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True, eq=False)
class DeferredGenerator:
    """A generator that is made on first use: where nothing is drawn, the compiler does not meet one."""

    parts: tuple[object, ...]
    device: torch.device

    @cached_property
    def generator(self) -> torch.Generator:
        """The generator, the same one each time."""
        return make_generator(*self.parts, device=self.device)


def as_generator(generator: torch.Generator | DeferredGenerator) -> torch.Generator:
    """Return the generator, made now if it was not used yet."""
    return generator.generator if isinstance(generator, DeferredGenerator) else generator
