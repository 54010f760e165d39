"""Rebuild the embedded recordings (moebench/tasks/data/speech_prompts.parquet) from Debian's packages.

    for language in en es fr it ru; do apt-get download asterisk-core-sounds-$language{,-wav}; done
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    python scripts/build_speech.py unpacked --out new.parquet --compare moebench/tasks/data/speech_prompts.parquet

Under the folder, anywhere, lie the transcripts, `core-sounds-LANGUAGE.txt.gz`, and the recordings of the language's one
voice, `sounds/LANGUAGE_COUNTRY_SEX_NAME/`. Taken are the prompts of 0.25 to 6 seconds with a transcript that is speech,
not the description of a sound in brackets, in the order of their names. Samples are stored as WAV with GSM 06.10.

What is checked: with --compare the script ends by printing how many rows of the given file have the same language,
prompt, transcript, voice, licence, duration and samples as the same row here, and fails unless all have. Licences: see
moebench/tasks/data/LICENSES.md.
"""

import argparse
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

SHORTEST_S, LONGEST_S = 0.25, 6.0
SOUNDS = ("[", "(", "<")
"""A transcript that begins so says what is heard, not what is said."""
LICENSES = {"it": "CC-BY-3.0", "ru": "CC-BY-3.0"}  # the others: CC-BY-SA-3.0
SCHEMA = pa.schema(
    {
        "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        **dict.fromkeys(("text", "language", "speaker", "prompt"), pa.large_string()),
        "duration": pa.float64(),
        "license": pa.large_string(),
    }
)


def transcripts(file: Path) -> dict[str, str]:
    """Return prompt -> transcript; of two lines for one prompt the later counts."""
    lines = gzip.decompress(file.read_bytes()).decode("utf-8-sig").splitlines()
    pairs = [line.partition(":") for line in lines if ":" in line and not line.startswith(";")]
    return {prompt.strip(): text.strip() for prompt, _, text in pairs}


def voice_of(folder: Path, language: str) -> Path:
    """Return the folder of the language's recordings."""
    found = sorted(path for path in folder.rglob(f"sounds/{language}_*") if path.is_dir())
    if len(found) != 1:
        raise SystemExit(f"{folder}: one folder sounds/{language}_... is needed, {len(found)} were found")
    return found[0]


def rows_of(folder: Path, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the prompts of one language."""
    language = file.name.removeprefix("core-sounds-").removesuffix(".txt.gz")
    said, voice = transcripts(file), voice_of(folder, language)
    for path in sorted(voice.rglob("*.wav")):
        prompt = path.relative_to(voice).with_suffix("").as_posix()
        text, seconds = said.get(prompt, ""), soundfile.info(path).duration
        if not text or text.startswith(SOUNDS) or not SHORTEST_S <= seconds <= LONGEST_S:
            continue
        samples_S, rate = soundfile.read(path, dtype="int16")
        stored = io.BytesIO()
        soundfile.write(stored, samples_S, rate, format="WAV", subtype="GSM610")
        yield {
            "audio": {"bytes": stored.getvalue(), "path": f"{language}_{prompt.replace('/', '_')}.wav"},
            "text": text,
            "language": language,
            "speaker": voice.name,
            "prompt": prompt,
            "duration": len(samples_S) / rate,
            "license": LICENSES.get(language, "CC-BY-SA-3.0"),
        }


def build(folder: Path) -> pa.Table:
    """Return the prompts of all languages whose transcripts are there."""
    files = sorted(folder.rglob("core-sounds-*.txt.gz"))
    if not files:
        raise SystemExit(f"{folder}: no transcripts, core-sounds-LANGUAGE.txt.gz, were found")
    return pa.Table.from_pylist([row for file in files for row in rows_of(folder, file)], schema=SCHEMA)


def same_row(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether two rows say the same and sound the same."""
    names = [name for name in SCHEMA.names if name != "audio"]
    if any(ours[name] != theirs[name] for name in names) or ours["audio"]["path"] != theirs["audio"]["path"]:
        return False
    our_S, their_S = (soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")[0] for row in (ours, theirs))
    return np.array_equal(our_S, their_S)


def compare(made: pa.Table, given: Path) -> bool:
    """Print how many rows of a given file are those that were made; return whether all are."""
    ours, theirs = made.to_pylist(), pq.read_table(given).to_pylist()
    same = sum(same_row(our, their) for our, their in zip(ours, theirs, strict=False))
    print(f"{given}: {len(theirs)} rows, {same} of them the same here, where there are {len(ours)}")
    return same == len(theirs) == len(ours)


def main() -> None:
    """Read, write and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages are unpacked")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--compare", type=Path, help="parquet file to compare with")
    options = parser.parse_args()
    table = build(options.folder)
    pq.write_table(table, options.out, compression="zstd")
    print(f"{options.out}: {len(table)} prompts, {options.out.stat().st_size / 1e6:.1f} MB")
    if options.compare and not compare(table, options.compare):
        raise SystemExit("not the same")


if __name__ == "__main__":
    main()
