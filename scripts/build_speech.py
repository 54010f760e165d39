"""Rebuild the embedded recordings (moebench/tasks/data/speech_prompts.parquet) from Debian's packages.

    for language in en es fr it ru; do apt-get download asterisk-core-sounds-$language{,-wav}; done
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    python scripts/build_speech.py unpacked --out new.parquet --compare moebench/tasks/data/speech_prompts.parquet

Anywhere below the folder are the transcripts, `core-sounds-LANGUAGE.txt.gz`, and the recordings of the only voice of a
language, `sounds/LANGUAGE_COUNTRY_SEX_NAME/`. The script selects prompts of 0.25 to 6 seconds whose transcript is
speech, not the description of a sound in brackets, sorted by name. Samples are stored as WAV with GSM 06.10.

With --compare the script prints how many rows of the given file have the same language, prompt, transcript, voice,
licence, duration and samples as the same row here, and fails unless all do. Licences: see
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

MIN_SECONDS, MAX_SECONDS = 0.25, 6.0
SOUND_MARKS = ("[", "(", "<")
"""Transcripts that begin with one of these describe a sound."""
LICENSES = {"it": "CC-BY-3.0", "ru": "CC-BY-3.0"}  # the others: CC-BY-SA-3.0
SCHEMA = pa.schema(
    {
        "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        **dict.fromkeys(("text", "language", "speaker", "prompt"), pa.large_string()),
        "duration": pa.float64(),
        "license": pa.large_string(),
    }
)


def read_transcripts(file: Path) -> dict[str, str]:
    """Return prompt -> transcript; the last line of a prompt counts."""
    lines = gzip.decompress(file.read_bytes()).decode("utf-8-sig").splitlines()
    pairs = [line.partition(":") for line in lines if ":" in line and not line.startswith(";")]
    return {prompt.strip(): text.strip() for prompt, _, text in pairs}


def find_voice(folder: Path, language: str) -> Path:
    """Return the folder of the recordings of a language."""
    voices = sorted(path for path in folder.rglob(f"sounds/{language}_*") if path.is_dir())
    if len(voices) != 1:
        raise SystemExit(f"{folder}: needs one folder sounds/{language}_..., has {len(voices)}")
    return voices[0]


def read_rows(folder: Path, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the prompts of one language."""
    language = file.name.removeprefix("core-sounds-").removesuffix(".txt.gz")
    transcripts, voice = read_transcripts(file), find_voice(folder, language)
    for path in sorted(voice.rglob("*.wav")):
        prompt = path.relative_to(voice).with_suffix("").as_posix()
        text, seconds = transcripts.get(prompt, ""), soundfile.info(path).duration
        if not text or text.startswith(SOUND_MARKS) or not MIN_SECONDS <= seconds <= MAX_SECONDS:
            continue
        samples_S, rate = soundfile.read(path, dtype="int16")
        encoded = io.BytesIO()
        soundfile.write(encoded, samples_S, rate, format="WAV", subtype="GSM610")
        yield {
            "audio": {"bytes": encoded.getvalue(), "path": f"{language}_{prompt.replace('/', '_')}.wav"},
            "text": text,
            "language": language,
            "speaker": voice.name,
            "prompt": prompt,
            "duration": len(samples_S) / rate,
            "license": LICENSES.get(language, "CC-BY-SA-3.0"),
        }


def build(folder: Path) -> pa.Table:
    """Return the prompts of all languages that have transcripts below the folder."""
    files = sorted(folder.rglob("core-sounds-*.txt.gz"))
    if not files:
        raise SystemExit(f"{folder}: has no transcripts (core-sounds-LANGUAGE.txt.gz)")
    return pa.Table.from_pylist([row for file in files for row in read_rows(folder, file)], schema=SCHEMA)


def rows_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether two rows have equal metadata and equal samples."""
    names = [name for name in SCHEMA.names if name != "audio"]
    if any(ours[name] != theirs[name] for name in names) or ours["audio"]["path"] != theirs["audio"]["path"]:
        return False
    our_S, their_S = (soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")[0] for row in (ours, theirs))
    return np.array_equal(our_S, their_S)


def compare(made: pa.Table, given: Path) -> bool:
    """Print how many rows of a given file are equal to the rebuilt ones; return whether all are."""
    ours, theirs = made.to_pylist(), pq.read_table(given).to_pylist()
    same = sum(rows_equal(our, their) for our, their in zip(ours, theirs, strict=False))
    print(f"{given}: {len(theirs)} rows, {same} of them equal to the {len(ours)} rebuilt ones")
    return same == len(theirs) == len(ours)


def main() -> None:
    """Read, write and compare the recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the unpacked packages")
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
