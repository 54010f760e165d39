"""The probe of models of transformers: labels, planted structure, controls, loads and contexts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pretrained_models import TEXT, write_model
from torch import nn

from moebench.analysis.pretrained.contexts import build_pretrained_contexts
from moebench.analysis.pretrained.measure import measure_pretrained
from moebench.analysis.pretrained.options import PretrainedOptions
from moebench.analysis.pretrained.probe import PretrainedProbe, probe_pretrained
from moebench.analysis.pretrained.report import build_load_table, measure_loads, tabulate_labels
from moebench.analysis.specialisation.measure import ProbeOptions
from moebench.errors import UsageError

OTHER = "9 + 8 = 17; 21 - 4 = 17; (6 * 7) / 2 = 21; 3.14 <= 22/7; x[0] = {1, 2, 3}; 100% != 99%. "
FEW = ProbeOptions(num_permutations=20)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder of two domains."""
    folder = tmp_path / "text"
    for name, text in (("prose", TEXT), ("sums", OTHER)):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.txt").write_text(text * 20)
        (folder / name / "1.txt").write_text((text * 20)[17:])
    return folder


def probe(tmp_path: Path, data: Path, model_type: str, change: Any = None, **options: Any) -> PretrainedProbe:
    write_model(tmp_path / "model", model_type, change, **options)
    settings = PretrainedOptions(data=str(data), max_tokens=1500, sequence_length=50)
    return probe_pretrained(f"hf:{tmp_path / 'model'}", settings, tmp_path / "cache")


def route_by_token(model: nn.Module) -> None:
    """Make the first layer see the embedding of a token alone, so that the token determines the experts."""
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()


def test_planted_structure_is_found(tmp_path: Path, data: Path) -> None:
    """Routed by the token alone, the token determines the experts, and nothing else is known given the token."""
    probed = probe(tmp_path, data, "mixtral", route_by_token)
    kinds = measure_pretrained(probed, FEW).kinds
    first = {kind: layers["0"] for kind, layers in kinds.items()}
    assert first["token_id"].trained.of_routing == pytest.approx(1, abs=1e-6)  # entropy of experts given the token: 0
    for kind in ("domain", "position", "previous_id", "next_id"):
        given = first[kind].given_token
        assert given is not None
        assert given.corrected == pytest.approx(0, abs=1e-6)
    assert first["domain"].trained.corrected > first["domain"].trained.null_interval[1]  # its tokens are others
    for layers in kinds.values():
        for layer in layers.values():
            low, high = layer.controls["random"].null_interval
            assert low - 0.05 < layer.controls["random"].corrected < high + 0.05


def test_the_control_of_other_routers_knows_the_token_too(tmp_path: Path, data: Path) -> None:
    """A linear router that has learned nothing separates tokens as well as a random trained one does."""
    probed = probe(tmp_path, data, "olmoe", route_by_token)
    layer = measure_pretrained(probed, ProbeOptions(num_permutations=20, label="token_id")).kinds["token_id"]["0"]
    assert layer.controls["untrained"].of_routing == pytest.approx(1, abs=1e-6)
    assert layer.controls["hash"].of_routing == pytest.approx(1, abs=1e-6)


def test_labels_are_those_of_the_text(tmp_path: Path, data: Path) -> None:
    probed = probe(tmp_path, data, "qwen3_moe")
    columns, counted = probed.columns(None), probed.collection.select_tokens(None)
    assert sorted(columns) == ["domain", "next_id", "position", "previous_id", "token", "token_id", "word_class"]
    assert columns["domain"].values == ("prose", "sums")
    assert len({len(column.label_T) for column in columns.values()}) == 1
    assert 1400 < len(counted) <= 1500
    pieces = probed.names.pieces
    text = b"".join(pieces[token] for token in counted.token_N[counted.sequence_N == 0].tolist()).decode()
    assert text in TEXT * 20
    named = {kind: [columns[kind].values[label] for label in columns[kind].label_T[:50]] for kind in columns}
    assert named["previous_id"][1:] == named["token_id"][:-1]
    assert named["next_id"][:-1] == named["token_id"][1:]
    assert named["previous_id"][0] == named["next_id"][-1] == "outside the window"
    assert named["position"][0] == "1/8"
    assert named["position"][-1] == "8/8"
    share = np.bincount(columns["domain"].label_T) / len(counted)
    assert share == pytest.approx([0.5, 0.5], abs=0.05)  # domains have equal shares


def test_tables_add_up_to_the_loads(tmp_path: Path, data: Path) -> None:
    probed = probe(tmp_path, data, "deepseek_v2")
    loads, tables = measure_loads(probed), tabulate_labels(probed)
    assert "token_id" in tables
    for table in tables.values():
        assert {layer: table_YE.sum(0).tolist() for layer, table_YE in table.layers.items()} == {
            layer: values["load"] for layer, values in loads.items()
        }
    assert all(0 < values["coactivation"] <= 1 for values in loads.values())
    [row] = build_load_table(loads, "2").rows
    assert row[0] == "2"
    assert row[5] == "0.0 %"


def test_switch_has_tables_of_encoder_and_decoder_and_of_its_sentinels(tmp_path: Path, data: Path) -> None:
    probed = probe(tmp_path, data, "switch_transformers")
    assert probed.stacks == ("encoder", "decoder")
    encoder, decoder = probed.collection.select_tokens("encoder"), probed.collection.select_tokens("decoder")
    sentinels = set(probed.sentinels)
    assert len(sentinels) == 20
    for sequence in range(3):  # T5's span corruption: the spans of the decoder fill the gaps of the encoder
        read = encoder.token_N[encoder.sequence_N == sequence].tolist()
        target = decoder.token_N[decoder.sequence_N == sequence].tolist()
        spans: dict[int, list[int]] = {}
        for token in target:
            if token in sentinels:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        filled = [part for token in read for part in (spans.get(token, [None]) if token in sentinels else [token])]
        text = b"".join(probed.names.pieces[token] for token in filled if token is not None).decode()
        assert text in TEXT * 20 or text in OTHER * 20 or text[:40] in TEXT * 20 + OTHER * 20
    tables = tabulate_labels(probed)
    assert list(tables["sentinel"].layers) == ["encoder.1", "encoder.3", "decoder.1", "decoder.3"]
    assert {name.split(".")[0] for name in measure_pretrained(probed, FEW).kinds["token_id"]} == {"encoder", "decoder"}
    loads = measure_loads(probed)
    assert any(values["dropped"] for values in loads.values())
    assert loads["encoder.1"]["coactivation"] is None  # one expert per token


def test_contexts_have_the_token_in_its_text(tmp_path: Path, data: Path) -> None:
    probed = probe(tmp_path, data, "mixtral", route_by_token)
    report = build_pretrained_contexts(probed, "0")
    assert len(report.values["experts"]) == 8
    for expert in report.values["experts"]:
        common = {token["token"] for token in expert["tokens"]}
        assert len(expert["contexts"]) <= 5
        for context in expert["contexts"]:
            marked = context["text"].split("⟦")[1].split("⟧")[0]
            plain = context["text"].replace("⟦", "").replace("⟧", "").replace("␣", " ")
            assert plain in TEXT * 20 or plain in OTHER * 20
            assert marked in common or len(common) == 6
    with pytest.raises(UsageError, match=r"--layer: '7' is unknown\. Allowed: 0, 1, 2"):
        build_pretrained_contexts(probed, "7")


def test_an_unknown_kind_of_label_is_refused(tmp_path: Path, data: Path) -> None:
    probed = probe(tmp_path, data, "olmoe")
    with pytest.raises(UsageError, match=r"--label: 'domian' is unknown\. Did you mean 'domain'"):
        measure_pretrained(probed, ProbeOptions(num_permutations=5, label="domian"))


def test_text_without_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UsageError, match="--data: the text has no sequence of at least 4 tokens"):
        probe(tmp_path, tmp_path / "short.txt", "olmoe")
    with pytest.raises(UsageError, match="--data: "):
        probe(tmp_path, tmp_path / "none.txt", "olmoe")
