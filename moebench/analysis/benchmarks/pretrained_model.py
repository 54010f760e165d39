"""A model of transformers in a local folder as a model over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moebench.analysis.benchmarks.token_model import PaddedInputs, Score, pad_inputs, score_targets
from moebench.analysis.benchmarks.windows import Window
from moebench.errors import UsageError
from moebench.pretrained.families import CONFIG, OWN_FORMAT
from moebench.pretrained.folder import PretrainedFolder
from moebench.pretrained.model import load_model
from moebench.pretrained.tokenizer import PretrainedTokenizer, read_tokenizer

LENGTH_KEYS = ("max_position_embeddings", "n_positions")
DEFAULT_LENGTH = 2048
"""Tokens that a model reads at once where its configuration has no limit; as lm-eval."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderEncoder:
    """The tokenizer of a folder."""

    tokenizer: PretrainedTokenizer

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        tokens: list[int] = self.tokenizer.encode(text).tolist()
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones and ids that are rows of the model alone."""
        known = [token for token in tokens if token < len(self.tokenizer.tokens)]
        return self.tokenizer.text.decode_bytes(np.array(known, dtype=np.int64)).decode(errors="replace")


class PretrainedTokenModel:
    """A causal model of transformers; each sequence is routed by itself, dropless."""

    is_sequential = False

    def __init__(self, folder: PretrainedFolder, dtype: str, max_length: int | None = None) -> None:
        """`max_length`: tokens to read at once, at most what the model allows. Raises UsageError for other models."""
        if folder.family.is_encoder_decoder:
            raise UsageError(f"{folder.path}: a {folder.family.title} model has an encoder (allowed: causal models)")
        if folder.family.model_type == OWN_FORMAT:
            raise UsageError(
                f"{folder.path}: is an export with --format safetensors, which transformers cannot load (allowed: the"
                " run itself, by its id, and exports with --format hf, where transformers has the model)"
            )
        self.folder = folder
        self.tokenizer = read_tokenizer(folder)
        self.encoder = FolderEncoder(tokenizer=self.tokenizer)
        limit = next((folder.config[key] for key in LENGTH_KEYS if isinstance(folder.config.get(key), int)), None)
        self.max_length = min(max_length or limit or DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        self.previous = self._find_previous()
        self.module = load_model(folder, dtype).module

    @property
    def start(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts before a text."""
        return self.tokenizer.prefix

    def _find_previous(self) -> int:
        """Return the token that begins a sequence, or else the one that ends it."""
        ids = [*self.tokenizer.prefix[-1:], *(self.folder.config.get(key) for key in ("bos_token_id", "eos_token_id"))]
        known = [token for token in ids if type(token) is int and 0 <= token < self.folder.vocab_size]
        if not known:
            raise UsageError(f"{self.folder.path / CONFIG}: has neither bos_token_id nor eos_token_id below vocab_size")
        return known[0]

    @cached_property
    def stops(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        ends = self.folder.config.get("eos_token_id")
        return frozenset(token for token in (ends if isinstance(ends, list) else [ends]) if type(token) is int)

    def find_domain(self, name: object) -> int:
        """Return 0: such models know no domains."""
        return 0

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Return the score of each window of a batch."""
        with torch.no_grad():
            vector_ND = self._compute_vectors(pad_inputs(windows, self.previous))
            return score_targets(windows, vector_ND, self.module.get_output_embeddings())

    def predict(self, windows: Sequence[Window]) -> list[int]:
        """Return the most probable token after the inputs of each window of a batch."""
        with torch.no_grad():
            vector_ND = self._compute_vectors(pad_inputs(windows, self.previous, only_last=True))
            best: list[int] = self.module.get_output_embeddings()(vector_ND).argmax(-1).tolist()
        return best

    def _compute_vectors(self, inputs: PaddedInputs) -> Tensor:
        mask_BL = None if inputs.valid_BL is None else inputs.valid_BL.long()
        options = {"input_ids": inputs.token_BL, "attention_mask": mask_BL, "use_cache": False}
        hidden_BLD: Tensor = self.module.base_model(**options).last_hidden_state
        return hidden_BLD[inputs.row_N, inputs.column_N]
