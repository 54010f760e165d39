"""`moebench prepare` under SIGKILL, and with files that unpack to gigabytes."""

import gzip
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from support.command_line import CommandLine
from support.prepared_text import draw_rows, folder_content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_KILLS = 5


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        texts = (row["text"] for row in draw_rows(6_000, seed=number))
        (folder / f"{number}.txt").write_text("\n".join(texts))


def test_kills_at_random_times_change_no_byte(cli: CommandLine) -> None:
    write_texts(cli.folder / "large")
    prepare = ("prepare", "large", "--tokenizer", "train:1000", "--split-by", "block", "--shard-bytes", "50000")
    begin_s = time.monotonic()
    assert cli(*prepare, "--out", "whole", timeout=300).code == 0
    whole_s = time.monotonic() - begin_s
    rng, kept = random.Random(3), []
    for _ in range(NUM_KILLS):
        process = cli.start(*prepare, "--out", "killed", "--workers", "3")
        time.sleep(rng.uniform(0.3, 0.9) * whole_s)
        process.send_signal(signal.SIGKILL)
        cli.wait(process)
        kept.append(len(list((cli.folder / "killed").glob("shard-*.json"))))
    ended = cli(*prepare, "--out", "killed", timeout=300)
    assert ended.code == 0, ended.err
    assert kept == sorted(kept) or kept[-1] == 0  # shards stay; with the manifest their records go
    assert folder_content(cli.folder / "killed") == folder_content(cli.folder / "whole")


@pytest.mark.parametrize(
    ("ending", "before", "after"),
    [(".jsonl", b'{"text": "', b'"}\n'), (".json", b'[{"text": "', b'"}]'), (".csv", b'text\n"', b'"\n')],
)
def test_three_gigabytes_in_one_row_are_one_line(cli: CommandLine, ending: str, before: bytes, after: bytes) -> None:
    part = gzip.compress(b"a" * (1 << 27))  # members of a gzip file are read as one
    content = gzip.compress(before) + part * 24 + gzip.compress(after)
    (cli.folder / f"bomb{ending}.gz").write_bytes(content)
    largest_before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of any child of this process until now
    refused = cli("prepare", f"bomb{ending}.gz", "--out", "tokens", timeout=300)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].endswith(
        "has more than 128 MiB of text; allowed: documents of at most that size"
    )
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert largest < 1.5 * 2**20 or largest == largest_before  # KiB
