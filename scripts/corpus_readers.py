"""Readers of the files in source packages: each returns plain text without the markup that repeats."""

import gzip
import html
import re
from collections.abc import Iterator

SKIPPED = {"script", "style", "nav", "header", "footer", "aside", "head", "info", "noscript", "button", "svg"}
"""Elements without text of their own; `info` is the authors of a Mallard page."""
SKIPPED_CLASSES = {"sphinxsidebar", "related", "navheader", "navfooter", "toplang", "bottomlang", "footer", "toc"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "wbr"}
BLOCKS = {
    "p",
    "div",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "li",
    "dt",
    "dd",
    "tr",
    "pre",
    "table",
    "ul",
    "ol",
    "dl",
    "br",
}
BLOCKS |= {"section", "title", "item", "note", "steps", "page"}

IGNORED = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1>|<\?.*?\?>|<!\w[^>]*>", re.DOTALL | re.IGNORECASE)
TAG = re.compile(r"<(/?)([A-Za-z][\w:-]*)([^>]*)>")
CLASS = re.compile(r"""\bclass=["']([^"']*)""")


def read_markup(data: str) -> str:
    """Return the text of an HTML or Mallard page, one line for each paragraph."""
    parts: list[str] = []
    still_open: list[tuple[str, bool]] = []
    num_skipped = num_pre = 0
    for piece in re.split(r"(<[^>]*>)", IGNORED.sub("", data)):
        tag = TAG.match(piece)
        if not tag:
            if not num_skipped:
                text = html.unescape(piece)
                parts.append(text if num_pre else re.sub(r"\s+", " ", text))
            continue
        name = tag[2].lower()
        if name in BLOCKS:
            parts.append("\n")
        if name in VOID or piece.endswith("/>"):
            continue
        if not tag[1]:
            classes = CLASS.search(tag[3])
            is_skipped = name in SKIPPED or bool(classes and SKIPPED_CLASSES & {*classes[1].split()})
            still_open.append((name, is_skipped))
            num_skipped, num_pre = num_skipped + is_skipped, num_pre + (name == "pre")
        elif any(name == other for other, _ in still_open):
            closed = ""
            while closed != name:  # elements that were never closed end with the one around them
                closed, is_skipped = still_open.pop()
                num_skipped, num_pre = num_skipped - is_skipped, num_pre - (closed == "pre")
    return tidy("".join(parts))


def read_man(data: str) -> str:
    """Return the text of a manual page: paragraphs and headings, without fonts, requests and comments."""
    lines = []
    for line in data.splitlines():
        if re.match(r"['.]\s*\\\"|^'\\\"", line):
            continue
        request = re.match(r"['.]\s*([A-Za-z]\w*)\s*(.*)", line)
        if not request:
            lines.append(line)
        elif request[1] in ("SH", "SS", "TH", "Sh", "Ss"):
            lines += ["", request[2].replace('"', ""), ""]
        elif request[1] in ("PP", "P", "LP", "TP", "IP", "Pp", "sp", "HP", "It"):
            lines += ["", request[2].split('"')[1] if request[1] == "IP" and '"' in request[2] else ""]
        elif re.fullmatch(r"[BIR]{1,2}|SM|SB|Nm|Fl|Ar|Xr|Nd|Em|Sy|Pa|Dv|Va|Li|Cm|Ic|Op", request[1]):
            parts = re.findall(r'"([^"]*)"|(\S+)', request[2])
            joint = "" if len(request[1]) == 2 and request[1].isupper() else " "
            lines.append(joint.join(quoted or plain for quoted, plain in parts))
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[,/&|^%:)]|\\s[+-]?\d+|\\\".*", "", "\n".join(lines))
    text = re.sub(r"\\\((..)", lambda m: MARKS.get(m[1], ""), text)
    text = re.sub(r"\\\[(\w+)\]", lambda m: MARKS.get(m[1], ""), text)
    text = re.sub(r"\\(.)", lambda m: {"e": "\\", "t": "\t"}.get(m[1], m[1]), text)
    return tidy(text)


MARKS = {"aq": "'", "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "em": "—", "en": "–", "bu": "•", "co": "©", "dq": '"'}
MARKS |= {"bs": "\\", "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "mu": "×", "+-": "±", "hy": "-"}


def tidy(text: str) -> str:
    """Return the text without spaces at line ends and with at most one empty line in a row."""
    lines = (line.rstrip() for line in text.replace("\r\n", "\n").replace("\f", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def decode(data: bytes, name: str) -> str | None:
    """Return the text of a file, also of a compressed one; None if it is not UTF-8 or has NUL bytes.

    In dictionaries, which are one file each, single bytes that are not UTF-8 are replaced.
    """
    try:
        if name.endswith((".gz", ".dz")):
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig", errors="replace" if name.endswith(".dz") else "strict")
    except (OSError, UnicodeDecodeError, EOFError):
        return None
    return None if "\0" in text else text


def cut(text: str, max_bytes: int, boundary: str = "\n") -> Iterator[str]:
    """Yield pieces of at most `max_bytes`, cut before the last `boundary` that fits, or else at a line end."""
    data, start = text.encode(), 0
    while len(data) - start > max_bytes:
        piece = data[start : start + max_bytes].decode(errors="ignore")
        end = max(piece.rfind(boundary), 0) or max(piece.rfind("\n"), 0) or len(piece)
        yield piece[:end]
        start += len(piece[:end].encode())
    yield data[start:].decode()
