"""What the experts of one layer say about one kind of label, beside the controls of the layer."""

from dataclasses import dataclass
from typing import Any

from moebench.analysis.specialisation.control_routing import route_by_hash, route_randomly
from moebench.analysis.specialisation.given_token import measure_given_token
from moebench.analysis.specialisation.information import Assignments, Information, Ints, measure_information
from moebench.analysis.specialisation.permutations import permute_sequences
from moebench.analysis.specialisation.routed_tokens import RoutedTokens
from moebench.analysis.specialisation.token_labels import LabelColumn
from moebench.seeds import derive_seed

CONTROLS = ("untrained", "hash", "random")


@dataclass(frozen=True, kw_only=True)
class LayerInformation:
    """Information of one layer about one kind of label."""

    trained: Information
    controls: dict[str, Information]
    """Control -> the same for its routing; without those that do not apply."""
    given_token: Information | None
    """Information given the token's id; None where it is not known (`measure_given_token`)."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        given = {} if self.given_token is None else {"given_token": self.given_token.to_dict()}
        return {
            **self.trained.to_dict(),
            **given,
            "controls": {name: control.to_dict() for name, control in self.controls.items()},
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlledLayer:
    """One layer with its controls: an untrained router, experts by a hash of the token, and random ones."""

    name: str
    seed: int
    sequence_T: Ints
    trained: Assignments
    controls: dict[str, Assignments]
    token_ids: tuple[Ints, int] | None
    """Number of each token, and how many numbers there are; None where the input is not made of tokens."""

    @classmethod
    def build(
        cls, name: str, tokens: RoutedTokens, untrained: Assignments, token_ids: tuple[Ints, int] | None, seed: int
    ) -> "ControlledLayer":
        """Add the controls to the layer `name`; `seed` draws the hash, the random experts and the permutations."""
        trained = tokens.layers[name].assignments
        draw = derive_seed("probe", seed, name)
        controls = {"untrained": untrained}
        if token_ids is not None:
            controls["hash"] = route_by_hash(*token_ids, trained, draw)
        controls["random"] = route_randomly(trained, draw)
        return cls(
            name=name, seed=seed, sequence_T=tokens.sequence_T, trained=trained, controls=controls, token_ids=token_ids
        )


def measure_layer(
    layer: ControlledLayer, column: LabelColumn, num_permutations: int, num_of_controls: int | None = None
) -> LayerInformation:
    """Return the information of a layer about one kind of label; `num_of_controls`: permutations of each control."""
    label_T, num_labels = column.label_T, len(column.values)
    permute = permute_sequences(label_T, layer.sequence_T)
    seed = derive_seed("probe", layer.seed, column.name)  # in all layers the same
    of_controls = num_permutations if num_of_controls is None else num_of_controls
    return LayerInformation(
        trained=measure_information(label_T, num_labels, layer.trained, permute, (num_permutations, seed)),
        controls={
            name: measure_information(label_T, num_labels, assignments, permute, (of_controls, seed))
            for name, assignments in layer.controls.items()
        },
        given_token=None
        if layer.token_ids is None
        else measure_given_token(column, layer.trained, layer.token_ids, layer.sequence_T, (num_permutations, seed)),
    )
