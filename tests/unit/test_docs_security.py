"""docs/security.md: each guarantee names tests that exist; guarantees about data that no other test shows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.command_line import ROOT

from moebench.errors import UsageError
from moebench.tasks.cache import _meta_checksum, load_or_create
from moebench.tasks.tables import read_content


def test_every_guarantee_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    texts = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 20
    assert not {*named} - defined
    guarantees = page.split("## Untrusted input")[1].split("## What is trusted")[0]
    rows = [line for line in guarantees.splitlines() if line.startswith("| ")][1:]
    assert all("`test_" in row.rsplit("|", 2)[1] for row in rows)


@pytest.mark.parametrize("name", ["/dev/zero", "..", "."])
def test_a_table_cannot_name_a_device(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not a plain file"):
        read_content(name, tmp_path)
    assert read_content("missing.wav", tmp_path) == tmp_path / "missing.wav"


def test_prepared_data_hold_no_objects_and_no_paths(tmp_path: Path) -> None:
    def create() -> tuple[dict[str, object], dict[str, np.ndarray]]:
        created.append(1)
        return {}, {"x": np.arange(3)}

    created: list[int] = []
    entry = tmp_path / "cache" / "entry"
    load_or_create(entry, create)
    np.save(entry / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert load_or_create(entry, create)[1]["x"].tolist() == [0, 1, 2]
    meta = json.loads((entry / "meta.json").read_text())
    np.save(tmp_path / "secret.npy", np.arange(3))
    meta["checksums"] = {"../../secret": meta["checksums"]["x"]}
    (entry / "meta.json").write_text(json.dumps(meta | {"checksum": _meta_checksum(meta)}))
    assert "x" in load_or_create(entry, create)[1]
    assert len(created) == 3
