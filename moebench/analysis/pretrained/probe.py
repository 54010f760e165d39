"""Probe a model of transformers: load it, run it over a text, and measure what its experts say about labels."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moebench.analysis.pretrained.collect import Collection, LayerAssignments, collect
from moebench.analysis.pretrained.labels import TokenNames, build_columns
from moebench.analysis.pretrained.options import PretrainedOptions
from moebench.analysis.pretrained.texts import read_texts
from moebench.analysis.pretrained.windows import ProbeText, build_causal, build_encoder_decoder, cut_windows
from moebench.analysis.specialisation.information import Assignments
from moebench.analysis.specialisation.routed_tokens import RoutedLayer, RoutedTokens
from moebench.analysis.specialisation.token_labels import LabelColumn
from moebench.errors import UsageError
from moebench.pretrained.families import CONFIG
from moebench.pretrained.folder import PretrainedFolder, open_pretrained
from moebench.pretrained.model import choose_dtype, load_model
from moebench.pretrained.tokenizer import PretrainedTokenizer, read_tokenizer

LENGTH_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedProbe:
    """A model and what its routers did on a text."""

    folder: PretrainedFolder
    dtype: torch.dtype
    collection: Collection
    names: TokenNames
    sentinels: tuple[int, ...]
    unused: tuple[str, ...]
    """Stored weights that the architecture does not have."""

    @property
    def stacks(self) -> tuple[str | None, ...]:
        """The stacks of the model that have experts: None for the only one, encoder, decoder."""
        return tuple(dict.fromkeys(layer.name.half for layer in self.collection.layers))

    def list_layers(self, stack: str | None) -> list[LayerAssignments]:
        """Return the MoE layers of a stack."""
        return [layer for layer in self.collection.layers if layer.name.half == stack]

    def columns(self, stack: str | None) -> dict[str, LabelColumn]:
        """Return the labels of the tokens of a stack, by kind."""
        text = self.collection.text
        return build_columns(self.collection.select_tokens(stack), text.domains, self.names, self.sentinels)

    def to_routed_tokens(self, stack: str | None) -> RoutedTokens:
        """Return the tokens of a stack in the form of those of a run."""
        counted = self.collection.select_tokens(stack)
        return RoutedTokens(
            sequence_T=counted.sequence_N.numpy(),
            position_T=counted.position_N.numpy(),
            layers={
                str(layer.name): RoutedLayer(
                    assignments=to_assignments(layer.expert_NK, layer.num_experts),
                    gate_N=layer.weight_NK.double().flatten().numpy(),
                )
                for layer in self.list_layers(stack)
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what the model is and how it was read, as JSON-ready values."""
        collection = self.collection
        return {
            "model_type": self.folder.family.model_type,
            "parameters": self.folder.num_parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": {
                str(layer.name): {"experts": layer.num_experts, "experts_per_token": layer.expert_NK.shape[1]}
                for layer in collection.layers
            },
            "sequences": len(collection.text.domain_B),
            "domains": list(collection.text.domains),
            "loss_nats": collection.nats,
            "bits_per_byte": collection.bits_per_byte,
            "unused_weights": list(self.unused),
        }


def to_assignments(expert_NK: torch.Tensor, num_experts: int) -> Assignments:
    """Return the choices of a router in the form that information is measured from."""
    num_tokens, num_chosen = expert_NK.shape
    return Assignments(
        token_N=torch.arange(num_tokens).repeat_interleave(num_chosen).numpy(),
        expert_N=expert_NK.flatten().numpy(),
        num_tokens=num_tokens,
        num_experts=num_experts,
    )


@lru_cache(maxsize=1)
def probe_pretrained(subject: str, options: PretrainedOptions, cache: Path) -> PretrainedProbe:
    """Return the probe of the folder that `hf:PATH` names; the sections of one report share it.

    Raises UsageError as `open_pretrained`, `read_tokenizer`, `read_texts` and `load_model` do: all that can be checked
    is checked before the weights are loaded.
    """
    folder = open_pretrained(subject)
    dtype = choose_dtype(folder, options.dtype)
    tokenizer = read_tokenizer(folder)
    names = TokenNames(tokenizer.pieces, tokenizer.tokens, folder.vocab_size)
    text = _build_text(folder, tokenizer, options, cache)
    model = load_model(folder, options.dtype)
    byte_count_V = torch.tensor([len(piece) for piece in names.pieces])
    collection = collect(model, text, byte_count_V, batch_size=options.batch_size)
    return PretrainedProbe(
        folder=folder,
        dtype=dtype,
        collection=collection,
        names=names,
        sentinels=tokenizer.sentinels,
        unused=model.unused,
    )


def _build_text(
    folder: PretrainedFolder, tokenizer: PretrainedTokenizer, options: PretrainedOptions, cache: Path
) -> ProbeText:
    config = folder.config
    num_special = len(tokenizer.prefix) + len(tokenizer.suffix)
    limit = next((config[key] for key in LENGTH_KEYS if isinstance(config.get(key), int)), None)
    length = options.sequence_length if limit is None else min(options.sequence_length, limit - num_special)
    documents = read_texts(options.data, options.max_tokens, cache)
    windows, domain_B, domains = cut_windows(documents, tokenizer, length=max(length, 1), max_tokens=options.max_tokens)
    if folder.family.is_encoder_decoder:
        main, decoder = build_encoder_decoder(windows, tokenizer, _find_start(folder))
    else:
        main, decoder = build_causal(windows, tokenizer), None
    return ProbeText(main=main, decoder=decoder, domain_B=torch.tensor(domain_B), domains=domains)


def _find_start(folder: PretrainedFolder) -> int:
    """Return the id that begins what a decoder reads."""
    start = next((folder.config[key] for key in ("decoder_start_token_id", "pad_token_id") if key in folder.config), 0)
    if type(start) is not int or not 0 <= start < folder.vocab_size:
        raise UsageError(
            f"{folder.path / CONFIG}: decoder_start_token_id is {start!r}, not an id below {folder.vocab_size}"
        )
    return start
