"""Addresses that cannot work are refused in one line, and nothing secret of an address is shown."""

from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.tracking.address import check_uri, default_uri, redact_text, redact_uri, sqlite_path


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///rel.db", "a relative path; write sqlite:////"),
        ("sqlite:///:memory:", "gone after the run"),
        ("sqlite:///", "gone after the run"),
        ("sqlite://host/x.db", "not a file"),
        ("sqlite:////nowhere/x.db", "folder /nowhere does not exist"),
        ("sqlite:////tmp/x.db?mode=ro", "write %3F"),
        ("http://", "has no host"),
        ("http://host:99999", "allowed: 1 to 65535"),
        ("http://host:0", "allowed: 1 to 65535"),
        ("http://user:secret@[::1", "not an address"),
        ("postgresql+nodriver://user:secret@host/db", "no driver of this name"),
        ("postgres://user:secret@host/db", "Did you mean 'postgresql'"),
    ],
)
def test_address_that_cannot_work_is_refused_without_its_password(uri: str, reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        check_uri(uri)
    assert reason in str(refusal.value)
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("uri", ["http://host", "https://u:p@host:5000/path", "http://[::1]:5000"])
def test_address_of_a_server_is_accepted(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:pass%2Fword@host:5000/t0ken?api_key=k3y#part", "https://host:5000/..."),
        ("https://user:pass/word@host:5000", "https://host:5000"),
        ("postgresql://user:password@host/db?password=k3y", "postgresql://host/db"),
        ("http://user:password@[::1", "http://[::1"),
        ("user:password@host?token=k3y", "host"),
    ],
)
def test_address_is_shown_without_secrets(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


def test_message_of_a_library_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "bearer-t0ken")
    uri = "https://user:pass%2Fword@host:5000/path-t0ken?api_key=k3yk3y"
    text = f"{uri}: no answer of /path-t0ken/api/2.0?name=x for user, pass/word, bearer-t0ken; k3yk3y; http://a:b@host"
    shown = redact_text(text, uri)
    assert not [secret for secret in ("t0ken", "word", "k3y", "user", "a:b") if secret in shown]
    assert "https://host:5000" in shown


@pytest.mark.parametrize("name", ["a?b", "a#b", "%41", "a b", "ünï 漢"])
def test_path_of_the_database_is_quoted(name: str) -> None:
    assert sqlite_path(default_uri(Path("/tmp") / name)) == Path("/tmp") / name / "mlflow.db"
    assert not {"?", "#", " "} & set(default_uri(Path("/tmp") / name))
