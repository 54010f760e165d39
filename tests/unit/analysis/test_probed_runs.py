"""Probes of real models of every task: kinds of labels, controls, contexts and galleries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.task_data import write_data
from support.training_cases import TINY
from typing_extensions import override

from moebench.analysis.specialisation.contexts import build_context_report, mark_token
from moebench.analysis.specialisation.gallery import build_gallery_report
from moebench.analysis.specialisation.information_report import build_information_table
from moebench.analysis.specialisation.measure import ProbeOptions, RunInformation, measure_run
from moebench.analysis.trained_run import TrainedRun
from moebench.config import merge_settings, resolve
from moebench.errors import UsageError
from moebench.runs.folder import RunFolder
from moebench.training.model import Model, prepare_task

TEXT_KINDS = {"domain", "position", "token", "token_id", "previous_id", "next_id", "word_class"}
KINDS = {
    "language": TEXT_KINDS,
    "masked_language": TEXT_KINDS,
    "span_corruption": TEXT_KINDS | {"sentinel"},
    "vision": {"class", "position", "brightness"},
    "speech": {"domain", "position", "loudness", "character"},
    "keyword": {"class", "position", "loudness"},
    "clustered": {"cluster"},
}
OPTIONS = ProbeOptions(num_permutations=19)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunOfZeroSteps(TrainedRun):
    """A run whose trained model is the untrained one."""

    @override
    def load_model(self) -> Model:
        return self.build_untrained_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return write_data(tmp_path_factory.mktemp("probed_data"))


def open_run(data: dict[str, dict[str, Any]], cache: Path, task: str, router: Any = "top_k", **more: Any) -> TrainedRun:
    router = {"name": router} if isinstance(router, str) else router
    plain = {"model": TINY["model"], "train": TINY["train"], "layout": TINY["layout"], "router": router}
    config = resolve(merge_settings(plain, {"task": {"name": task, **data[task], **more}}))
    folder = RunFolder(cache / "run")
    return RunOfZeroSteps(folder=folder, cell={"arm": "arm"}, config=config, task=prepare_task(config, cache))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probed_cache")


@pytest.mark.parametrize("task", [*KINDS])
def test_kinds_and_controls_of_every_task(task: str, data: dict[str, dict[str, Any]], cache: Path) -> None:
    measured = measure_run(open_run(data, cache, task), OPTIONS)
    assert set(measured.kinds) - {"domain"} == KINDS[task] - {"domain"}
    for kind, layers in measured.kinds.items():
        for value in layers.values():
            controls = {"untrained", "random"} | ({"hash"} if "token_id" in measured.kinds else set())
            assert set(value.controls) == controls
            assert value.controls["untrained"].plug_in == value.trained.plug_in  # nothing was trained
            low, high = value.controls["random"].null_interval
            assert low - 0.1 <= value.controls["random"].corrected <= high + 0.1, kind
    if "token_id" in measured.kinds:
        assert all(v.controls["hash"].of_routing == pytest.approx(1) for v in measured.kinds["token_id"].values())
    table = build_information_table(measured)
    assert len(table.rows) == sum(map(len, measured.kinds.values()))
    assert ("hash" in [column.header for column in table.columns]) == ("token_id" in measured.kinds)


def last_layer(measured: RunInformation, kind: str) -> Any:
    return [*measured.kinds[kind].values()][-1]


def test_the_oracle_of_clusters_knows_all_of_them(data: dict[str, dict[str, Any]], cache: Path) -> None:
    run = open_run(data, cache, "clustered", "oracle", num_clusters=TINY["layout"]["num_experts"])
    value = last_layer(measure_run(run, OPTIONS), "cluster")
    assert value.trained.of_label == pytest.approx(1)
    assert value.trained.of_routing == pytest.approx(1)


def test_a_hash_router_is_found_by_its_tokens(data: dict[str, dict[str, Any]], cache: Path) -> None:
    measured = measure_run(open_run(data, cache, "language", "hash"), OPTIONS)
    by_token = last_layer(measured, "token_id").trained
    assert by_token.token_information - by_token.corrected == pytest.approx(0, abs=1e-9)  # H(expert | token)
    for kind in ("domain", "previous_id", "next_id"):
        assert last_layer(measured, kind).given_token.corrected == pytest.approx(0, abs=1e-9)


def test_a_domain_router_is_found_beyond_vocabulary(data: dict[str, dict[str, Any]], cache: Path) -> None:
    value = last_layer(measure_run(open_run(data, cache, "language", "domain"), OPTIONS), "domain")
    assert value.trained.of_label == pytest.approx(1)
    assert value.given_token is None  # so few sequences have hardly another order of domains given their tokens


def test_a_random_router_says_nothing(data: dict[str, dict[str, Any]], cache: Path) -> None:
    measured = measure_run(open_run(data, cache, "clustered", "random"), ProbeOptions(num_permutations=99))
    value = last_layer(measured, "cluster").trained
    low, high = value.null_interval
    assert low - 0.02 <= value.corrected <= high + 0.02


@pytest.mark.parametrize("router", ["soft_moe", "smear", "expert_choice"])
def test_routing_without_a_choice_of_experts(router: str, data: dict[str, dict[str, Any]], cache: Path) -> None:
    measured = measure_run(open_run(data, cache, "masked_language", router), OPTIONS)
    for layers in measured.kinds.values():
        for value in layers.values():
            assert -0.2 < value.trained.corrected <= value.trained.ceiling + 1e-9


def test_contexts_of_bytes(data: dict[str, dict[str, Any]], cache: Path) -> None:
    run = open_run(data, cache, "language", "hash")
    report = build_context_report(run, None, 10_000)
    num_experts = TINY["layout"]["num_experts"]
    assert len(report.tables) == num_experts
    assert sum(expert["share"] for expert in report.values["experts"]) == pytest.approx(1)
    for expert in report.values["experts"]:
        gates = [context["gate"] for context in expert["contexts"]]
        assert gates == sorted(gates, reverse=True)
        tokens = {token["token"] for token in expert["tokens"]}
        assert all("⟦" in context["text"] for context in expert["contexts"])
        assert len(tokens) == len(expert["tokens"])
    with pytest.raises(UsageError, match=r"--layer: 'x'"):
        build_context_report(run, "x", 10_000)


@pytest.mark.parametrize(
    ("before", "piece", "after", "text"),
    [
        (b"the ", b"cat", b" sat", "the ⟦cat⟧ sat"),
        (b"a\n", b" b", b"\tc", "a↵⟦␣b⟧→c"),
        ("日".encode(), "本".encode(), "語".encode(), "日⟦本⟧語"),
        ("мир".encode()[:3], "мир".encode()[3:4], "мир".encode()[4:], "м⟦и byte b8⟧р"),
        (b"", "мир".encode()[1:2], b"", "⟦bc⟧"),
        (b"x", b"", b"y", "x⟦end of text⟧y"),
        (b"a" * 50, b"b", b"c" * 50, "a" * 32 + "⟦b⟧" + "c" * 16),
    ],
)
def test_a_token_in_its_text(before: bytes, piece: bytes, after: bytes, text: str) -> None:
    assert mark_token(before, piece, after) == text


@pytest.mark.parametrize(
    ("task", "suffix"), [("vision", "png"), ("speech", "svg"), pytest.param("keyword", "png", marks=pytest.mark.slow)]
)
def test_galleries(task: str, suffix: str, data: dict[str, dict[str, Any]], cache: Path, tmp_path: Path) -> None:
    file = tmp_path / f"gallery.{suffix}"
    report = build_gallery_report(open_run(data, cache, task), None, 10_000, file)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else content.startswith(b"<?xml")
    experts = report.values["experts"]
    assert len(experts) == TINY["layout"]["num_experts"]
    assert sum(expert["share"] for expert in experts) == pytest.approx(1)
    kind = {"vision": "brightness", "speech": "character", "keyword": "class"}[task]
    assert all(0 < share <= 1 for expert in experts for _, share in expert["labels"][kind])


def test_a_picture_is_the_image_and_the_box_its_patch(data: dict[str, dict[str, Any]], cache: Path) -> None:
    from moebench.analysis.specialisation.routed_tokens import route_batches, select_batches
    from moebench.analysis.specialisation.snippets import read_image_patches

    run = open_run(data, cache, "vision", pooling="class_token")
    chosen = select_batches(run.task, 4, 1000)
    stacks, _ = route_batches(run.load_model(), chosen.batches, run.config)
    batches = [batch for _, batch in chosen.batches]
    snippets = read_image_patches(run.task, batches, stacks[""], {})  # type: ignore[arg-type]
    assert snippets.read(0).box is None  # the class token
    second = snippets.read(2)  # the second patch of the first row
    assert second.box == (3.5, -0.5, 4, 4)
    pixel_HWC = run.task.images.test.pixel_NHWC[0]  # type: ignore[attr-defined]
    assert second.picture == pytest.approx(pixel_HWC.squeeze() / 255, abs=1e-5)


def test_galleries_and_contexts_need_their_kind_of_data(
    data: dict[str, dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the task vision has no text"):
        build_context_report(open_run(data, cache, "vision"), None, 1000)
    with pytest.raises(UsageError, match="the task language has neither images nor recordings"):
        build_gallery_report(open_run(data, cache, "language"), None, 1000, tmp_path / "x.png")
    with pytest.raises(UsageError, match=r"--label: 'phone'"):
        measure_run(open_run(data, cache, "speech"), ProbeOptions(num_permutations=2, label="phone"))
    assert not [*tmp_path.iterdir()]
