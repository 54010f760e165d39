"""Addresses of trackers: which can work, and how they are shown without anything secret."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from moebench.commands import format_command
from moebench.errors import UsageError, suggest

NO_TRACKER = "none"
_SQL = ("postgresql", "mysql", "mssql")
_SCHEMES = ("sqlite", "http", "https", *_SQL, "databricks")
_SQLITE = "sqlite:///"
_SECRET_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_USER_IN_URL = re.compile(r"(?<=://)[^\s/@'\"]+@")
_QUERY_IN_URL = re.compile(r"(?<=[^\s?'\"])\?[^\s?'\"=]+=[^\s'\")]*")


def default_uri(results: Path) -> str:
    """Return the address of the SQLite database inside a results folder."""
    return sqlite_uri(results / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """Return the address of a SQLite database, with the special characters of its path quoted."""
    return f"{_SQLITE}{quote(str(path.absolute()))}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite address, None for a server."""
    return Path(unquote(uri[len(_SQLITE) :])) if uri.startswith(_SQLITE) else None


def format_sync(results: Path, uri: str | None = None) -> str:
    """Return the command that sends what is pending, in back quotes; an address that may hold a secret is not in it."""
    if uri is None or uri == default_uri(results) or uri == os.environ.get("MOEBENCH_TRACKER"):
        return f"`{format_command('sync', results=results)}`"
    if redact_uri(uri) == uri:
        return f"`{format_command('sync', '--tracker', uri, results=results)}`"
    return f"`{format_command('sync', results=results)}` with the same --tracker"


def connection_uri(uri: str) -> str:
    """Return the address as MLflow must get it."""
    # For `sqlite:` MLflow creates the folders of the path as written, before special characters are unquoted.
    return f"sqlite+pysqlite{uri.removeprefix('sqlite')}" if uri.startswith(_SQLITE) and "%" in uri else uri


def check_uri(uri: str) -> None:
    """Raise UsageError for an address that can never work, without contacting it."""
    reason = _find_defect(uri)
    if reason:
        raise UsageError(f"--tracker {redact_uri(uri)}: {reason}")


def require_tracker(uri: str) -> None:
    """Raise UsageError for the name of no tracker, where a command needs one."""
    if uri == NO_TRACKER:
        raise UsageError(
            f"--tracker {NO_TRACKER}: there is nothing to send to or to show (allowed: an MLflow URI; without"
            " --tracker, the database in the results folder)"
        )


def redact_uri(uri: str) -> str:
    """Return the address for files and messages: without user, password, query, and a server's path.

    Each of them may contain a key. Works for malformed addresses too.
    """
    if sqlite_path(uri) is not None:
        return uri.partition("?")[0]
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return re.split(r"[?#]", uri.rpartition("@")[2])[0]
    host, path = _split_host(rest)
    if scheme.partition("+")[0] in _SQL:
        return f"{scheme}://{host}{re.split(r'[?#]', path)[0]}"
    return f"{scheme}://{host}" + ("/..." if path.strip("/") else "")


def redact_text(text: str, uri: str) -> str:
    """Return a message of a library without the secrets of the address and of MLflow's environment variables."""
    text = text.replace(uri, redact_uri(uri))
    for secret in sorted(_list_secrets(uri), key=len, reverse=True):
        text = text.replace(secret, "...")
    return _QUERY_IN_URL.sub("", _USER_IN_URL.sub("", text))


def _split_host(rest: str) -> tuple[str, str]:
    """Split what follows `://` into host and path; user and password are dropped, even with a `/` in them."""
    rest = rest.rpartition("@")[2] if "@" in re.split(r"[?#]", rest)[0] else rest
    match = re.match(r"[^/?#]*", rest)
    end = match.end() if match else 0
    return rest[:end], rest[end:]


def _list_secrets(uri: str) -> Iterator[str]:
    """Yield the parts of an address that may be a secret, as they are and unquoted."""
    if sqlite_path(uri) is None:
        _, _, rest = uri.partition("://")
        host, path = _split_host(rest)
        user, at, _ = rest.rpartition("@") if rest.rpartition("@")[2].startswith(host) else ("", "", "")
        if at:
            for part in (user, *user.split(":", 1)):
                yield from _spellings(part)
        base = path.partition("?")[0].partition("#")[0].strip("/")
        if base and uri.startswith("http"):
            yield from _spellings(base)
        for _, value in parse_qsl(path.partition("?")[2].partition("#")[0]):
            yield from _spellings(value)
    for name in _SECRET_VARIABLES:
        yield from _spellings(os.environ.get(name, ""))


def _spellings(secret: str) -> Iterator[str]:
    # Shorter ones are in too many other words, and their addresses are redacted by pattern.
    yield from {text for text in (secret, unquote(secret), quote(secret, safe="")) if len(text) > 2}


def _find_defect(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        # The text of urlsplit quotes a part of the address.
        return "not a port number (allowed: 1 to 65535)" if "ort" in str(error) else "not an address (brackets?)"
    kind = parts.scheme.partition("+")[0]
    if not kind:
        return f"has no scheme. Allowed: {NO_TRACKER}, or an address with {', '.join(_SCHEMES)}"
    if kind not in _SCHEMES:
        return (
            f"'{kind}' is not a kind of tracker.{suggest(kind, _SCHEMES)} Allowed: {NO_TRACKER}, {', '.join(_SCHEMES)}"
        )
    if kind == "sqlite":
        return _find_sqlite_defect(uri)
    if kind == "databricks":
        return _find_databricks_defect(uri)
    if not parts.hostname:
        return f"has no host; write {kind}://HOST"
    if port == 0:
        return "port 0 (allowed: 1 to 65535)"
    return _find_driver_defect(uri) if kind in _SQL else _find_http_defect(parts)


def _find_http_defect(parts: SplitResult) -> str | None:
    if "+" in parts.scheme:
        return f"'{parts.scheme}' is not a kind of tracker. Did you mean '{parts.scheme.partition('+')[0]}'?"
    return "has a space in its host" if re.search(r"\s", parts.netloc) else None


def _find_sqlite_defect(uri: str) -> str | None:
    form = f"write {_SQLITE}/FOLDER/NAME.db"
    if not uri.startswith(_SQLITE):
        return f"not a file; {form}"
    if re.search(r"[?#]", uri):
        return f"'?' and '#' are not allowed; in the name of a file write %3F and %23 ({form})"
    path = sqlite_path(uri)
    assert path is not None
    if str(path) in (":memory:", "."):
        return f"a database in memory is gone after the run; {form}"
    if not path.is_absolute():
        return f"a relative path; write {sqlite_uri(path)}"
    if path.is_dir():
        return f"is a folder; {form}"
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist"
    if not os.access(path.parent, os.W_OK):
        return f"its folder {path.parent} cannot be written"
    return None


def _find_driver_defect(uri: str) -> str | None:
    """Return why the database's Python driver cannot be used, None if it can."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = make_url(uri)
        url.get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        return f"its driver {error.name} is not installed"
    except SQLAlchemyError:
        return f"'{urlsplit(uri).scheme}' has no driver of this name"
    return None if url.database else "has no database; write KIND://HOST/DATABASE"


def _find_databricks_defect(uri: str) -> str | None:
    """Return why there is no access to Databricks, None if there is; imports MLflow."""
    from moebench.tracking.quiet import silence_mlflow

    try:
        with silence_mlflow():
            from mlflow.utils.databricks_utils import get_databricks_host_creds

            get_databricks_host_creds(uri)
    except Exception:
        # The reasons of MLflow quote the configuration.
        return "no credentials for it: configure the Databricks SDK, or set DATABRICKS_HOST and DATABRICKS_TOKEN"
    return None
