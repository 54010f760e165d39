"""Recordings of many formats and layouts: read at the right speed, or named when they cannot be read."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from scipy.signal import resample_poly
from support.sounds import encode_wav, tone

from moebench.errors import UsageError
from moebench.tasks.audio.clips import AudioDataConfig, Target, load_clips, source_digest
from moebench.tasks.audio.features import BrokenAudioError, decode, log_mel, mel_filters
from moebench.tasks.audio.utterances import PreparedAudio, prepare

KINDS = [
    (8000, "WAV", "PCM_U8"),
    (8000, "WAV", "ULAW"),
    (11025, "WAV", "PCM_16"),
    (16000, "WAV", "PCM_24"),
    (22050, "AIFF", "PCM_16"),
    (32000, "WAV", "PCM_32"),
    (44100, "WAV", "FLOAT"),
    (48000, "WAV", "DOUBLE"),
    (96000, "FLAC", "PCM_24"),
    (44100, "OGG", "VORBIS"),
    (48000, "OGG", "OPUS"),
    (16000, "OGG", "OPUS"),
    (44100, "MP3", "MPEG_LAYER_III"),
    (24000, "MP3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("rate", "kind", "subtype"), KINDS)
def test_a_tone_keeps_its_pitch_its_length_and_its_loudness(rate: int, kind: str, subtype: str, channels: int) -> None:
    samples = np.repeat(tone(440, 1.0, rate)[:, None], channels, 1)
    samples_S = decode(encode_wav(samples, rate, format=kind, subtype=subtype), 8000)
    assert abs(len(samples_S) - 8000) <= (400 if kind == "MP3" else 1)  # MP3 is made of blocks
    middle = samples_S[2000:6000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(4000)))
    assert abs(int(spectrum.argmax()) - 220) <= 1  # 2 Hz from bin to bin
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.04)


def test_resampling_does_not_alias() -> None:
    high = decode(encode_wav(tone(5000, 0.5, 16000), 16000), 8000)
    assert np.abs(high[200:-200]).max() < 0.01  # cut without a filter it would sound at 3,000 Hz
    expected = resample_poly(tone(440, 0.5, 44100).astype(np.float32), 80, 441)
    assert np.abs(decode(encode_wav(tone(440, 0.5, 44100), 44100, subtype="FLOAT"), 8000) - expected).max() < 1e-6


def test_a_long_recording_is_read_only_as_far_as_needed_to_refuse_it() -> None:
    long = encode_wav(np.zeros(8000 * 100), subtype="PCM_16")
    assert len(decode(long, 8000)) == 800_000
    assert len(decode(long, 8000, longest_s=6)) == 7 * 8000
    assert len(decode(long, 8000, 2.0, longest_s=6)) == 2 * 8000


@pytest.mark.parametrize("rate", [8000, 16000])
def test_bands_are_those_of_a_slow_sum(rate: int) -> None:
    samples = np.random.default_rng(0).normal(size=rate // 10)
    window, hop = round(0.025 * rate), round(0.010 * rate)
    size = 256 if rate == 8000 else 512
    found_NM = log_mel(samples.astype(np.float32), rate, 30).numpy()
    bin_hz = np.arange(size // 2 + 1) * rate / size
    mels = np.linspace(2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + rate / 2 / 700), 32)
    edge_hz = 700 * (10 ** (mels / 2595) - 1)
    for frame in (0, 3, 9):
        # The periodic Hann window of 25 ms, centred on the 10 ms of its frame; silence around the recording.
        centre = frame * hop + hop // 2
        place = np.arange(window) + centre - window // 2
        heard = np.where((place >= 0) & (place < len(samples)), samples[place.clip(0, len(samples) - 1)], 0)
        heard = heard * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window))
        turns = np.exp(-2j * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(window)) / size)
        energy = np.abs(turns @ heard) ** 2
        for band in (0, 7, 29):
            low, peak, high = edge_hz[band : band + 3]
            weight = [max(0, min((hz - low) / (peak - low), (high - hz) / (high - peak))) for hz in bin_hz]
            assert found_NM[frame, band] == pytest.approx(np.log(energy @ weight + 1e-6), abs=2e-3)


def test_more_bands_than_a_sample_rate_resolves_are_refused() -> None:
    with pytest.raises(UsageError, match=r"task\.data\.num_mels must be at most 66 at task\.data\.sample_rate=4000"):
        AudioDataConfig(sample_rate=4000, num_mels=80)
    config = AudioDataConfig(sample_rate=4000, num_mels=66)
    assert (mel_filters(4000, 128, config.num_mels).sum(0) > 0).all()


BROKEN: dict[str, tuple[Any, str]] = {
    "null": (None, "no audio"),
    "empty": (b"", "no audio"),
    "torn": (encode_wav(tone(440), format="FLAC")[:30], ""),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not recognised|unknown"),
    "no samples": (encode_wav(np.zeros(0)), "no samples"),
    "numbers": ([0.0, 0.1], "no audio"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("target", ["transcript", "label"])
def test_a_broken_recording_is_named_or_counted(
    tmp_path: Path, kind: str, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    audio, words = BROKEN[kind]
    if isinstance(audio, list):
        cells = [[0.0, 0.1]]
        table = pa.table({"audio": cells, "text": ["a"]})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UsageError, match=r"a\.parquet, row 0 cannot be used \(no audio\)"):
            prepare(AudioDataConfig(path=str(tmp_path / "a.parquet")), tmp_path / "cache", target)
        return
    cells = [encode_wav(tone(300 + 20 * i)) for i in range(12)] + [audio]
    texts = [f"text {'abcdefghijkl'[i]}" if target == "transcript" else "ab"[i % 2] for i in range(12)] + ["a"]
    pq.write_table(pa.table({"audio": cells, "text": texts}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet, row 12 cannot be used \(.*skip_broken=true$") as caught:
        prepare(AudioDataConfig(path=str(tmp_path / "a.parquet")), tmp_path / "cache", target)
    assert "0x" not in str(caught.value)
    if words:
        with pytest.raises(UsageError, match=words):
            raise caught.value
    audio = prepare(AudioDataConfig(path=str(tmp_path / "a.parquet"), skip_broken=True), tmp_path / "cache", target)
    assert audio.left_out == {"broken": 1}
    assert capsys.readouterr().err == "task.data: of 13 clips left out: 1 broken\n"


def test_an_impossible_file_name_is_a_broken_recording(tmp_path: Path) -> None:
    for name in ("x" * 5000, "a\0b", str(tmp_path)):
        with pytest.raises(BrokenAudioError):
            decode(tmp_path / name, 8000)


@pytest.mark.parametrize("longest_s", [6.0, 0.25, math.inf])
def test_a_flac_of_unknown_length_is_read_to_its_end(longest_s: float) -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(400), 8000, format="FLAC")
    known = file.getvalue()
    # STREAMINFO begins at byte 8; the last 36 bits of its first 18 bytes are the number of samples, 0 for unknown.
    unknown = known[:21] + bytes([known[21] & 0xF0]) + bytes(4) + known[26:]
    expected = decode(known, 8000, longest_s=longest_s)
    np.testing.assert_array_equal(decode(unknown, 8000, longest_s=longest_s), expected)
    assert len(expected) == 4000


def test_one_sample_is_a_recording() -> None:
    assert log_mel(decode(encode_wav(np.ones(1), 44100), 8000), 8000, 40).shape == (1, 40)


def write(root: Path, *names: str, first: int = 0) -> None:
    """Write recordings, each of a different pitch, with a transcript beside it."""
    for number, name in enumerate(names, first):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, tone(300 + 7 * number, 0.1), 48000 if name.endswith("opus") else 8000, format=(
            "OGG" if name.endswith("opus") else None
        ), subtype="OPUS" if name.endswith("opus") else None)  # fmt: skip
        (root / name).with_suffix(".txt").write_text("\ufeffword " + "abcdefghijklmnopqrstuvwxyz"[number], "utf-8")


def of(path: Path, target: Target = "transcript", **options: Any) -> PreparedAudio:
    return prepare(AudioDataConfig(path=str(path), **options), path.parent / "cache", target)


def sizes(audio: PreparedAudio) -> list[int]:
    return [len(part.domain_U) for part in (audio.train, audio.validation, audio.test)]


def test_a_folder_of_many_kinds(tmp_path: Path) -> None:
    write(
        tmp_path / "set", "a.WAV", "b c.flac", "é.ogg", "sub/d.mp3", "e.opus", "f.aiff", ".hidden.wav", "__MACOSX/g.wav"
    )
    names = [clip.name for clip in load_clips(AudioDataConfig(path=str(tmp_path / "set")), "transcript")]
    assert sorted(names) == ["a.WAV", "b c.flac", "e.opus", "f.aiff", "sub/d.mp3", "é.ogg"]
    (tmp_path / "set" / "a.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(UsageError, match=r"'a\.WAV: a\.txt' cannot be read: it is not UTF-8"):
        list(load_clips(AudioDataConfig(path=str(tmp_path / "set")), "transcript"))


def test_the_class_is_the_first_folder_and_speakers_may_lie_below(tmp_path: Path) -> None:
    write(tmp_path / "set", *(f"{c}/speaker{i}/x.wav" for c in ("yes", "no") for i in range(4)))
    assert of(tmp_path / "set", "label").symbols == ("no", "yes")


def test_a_speaker_of_speech_commands_is_in_one_split(tmp_path: Path) -> None:
    names = [f"{c}/{speaker:08x}_nohash_{i}.wav" for c in ("yes", "no") for speaker in range(6) for i in range(2)]
    write(tmp_path / "set", *names)
    clips = list(load_clips(AudioDataConfig(path=str(tmp_path / "set")), "label"))
    assert {clip.group for clip in clips} == {f"group/{speaker:08x}" for speaker in range(6)}
    audio = of(tmp_path / "set", "label")
    assert sizes(audio) == [16, 4, 4]  # a speaker has four recordings


@pytest.mark.parametrize("target", ["transcript", "label"])
def test_three_splits_stay_as_given(tmp_path: Path, target: Target) -> None:
    for place, (part, number) in enumerate((("train", 5), ("dev", 2), ("test", 3))):
        write(tmp_path / "set" / part, *(f"{c}/{i}.wav" for c in "ab" for i in range(number)), first=6 * place)
    audio = of(tmp_path / "set", target)
    assert sizes(audio) == [10, 4, 6]
    assert audio.domains == (("a", "b") if target == "transcript" else ("all",))
    write(tmp_path / "set" / "test", "c/1.wav")
    if target == "label":
        with pytest.raises(UsageError, match="class 'c' has clips for test and none to train on"):
            of(tmp_path / "set", target)


def test_tables_of_two_splits_stay_separate_and_the_third_is_taken_from_the_first(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for part, number, hz in (("train-0", 20, 300), ("test-0", 4, 1000)):
        cells = [encode_wav(tone(hz + 20 * i)) for i in range(number)]
        table = pa.table({"audio": cells, "text": [f"{part[:2]} {chr(97 + i)}" for i in range(number)]})
        pq.write_table(table, tmp_path / "set" / f"{part}.parquet")
    audio = of(tmp_path / "set")
    assert sizes(audio) == [18, 2, 4]


def test_equal_recordings_of_a_class_are_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for copy in range(3):
        write(tmp_path / "set", *(f"{c}/{i}-{copy}.wav" for c in "a" for i in range(6)))
        write(tmp_path / "set", *(f"{c}/{i}-{copy}.wav" for c in "b" for i in range(6)), first=10)
    audio = of(tmp_path / "set", "label")
    parts = (audio.train, audio.validation, audio.test)
    held = [{part.frames(i).tobytes() for i in range(len(part.domain_U))} for part in parts]
    assert sum(map(len, held)) == 12  # different ones: none in two splits
    assert sum(sizes(audio)) == 36
    assert "also in the training split" not in capsys.readouterr().err


def test_a_test_set_that_is_trained_on_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "set" / "train", *(f"{i}.wav" for i in range(5)))
    write(tmp_path / "set" / "val", "a.wav", first=6)
    write(tmp_path / "set" / "test", "a.wav", "b.wav", first=4)
    of(tmp_path / "set")
    assert capsys.readouterr().err == "task.data: 1 of 2 test clips are also in the training split, sample for sample\n"


CELLS: dict[str, tuple[dict[str, list[Any]], dict[str, Any], str]] = {
    "a list of words": ({"text": [["a", "b"]] * 4}, {}, "'text' of a.parquet, row 0 is list"),
    "bytes": ({"text": [b"a"] * 4}, {}, "'text' of a.parquet, row 0 is bytes"),
    "domain bytes": ({"language": [b"en"] * 4}, {}, "'language' of a.parquet, row 0 is bytes"),
    "domain null": ({"language": ["en", None, "en", "en"]}, {}, "'language' of a.parquet, row 1 is empty"),
    "group nan": ({"who": [float("nan")] * 4}, {"group_column": "who"}, "'who' of a.parquet, row 0 is empty"),
    "duration nan": ({"duration": [float("nan")] * 4}, {}, "'duration' of a.parquet, row 0 is nan"),
    "duration text": ({"duration": ["1:30"] * 4}, {}, "'duration' of a.parquet, row 0 is 1:30"),
    "duration below": ({"duration": [-1.0] * 4}, {}, "'duration' of a.parquet, row 0 is -1.0"),
}


@pytest.mark.parametrize("kind", CELLS)
def test_cells_of_the_wrong_type_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    columns, options, words = CELLS[kind]
    rows = {"audio": [encode_wav(tone(300 + 20 * i)) for i in range(4)], "text": [*"abcd"]} | columns
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(UsageError) as caught:
        of(tmp_path / "a.parquet", **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_of_one_class_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", *(f"yes/{i}.wav" for i in range(5)))
    with pytest.raises(UsageError, match="all clips are of one class, 'yes'"):
        of(tmp_path / "set", "label")


@pytest.mark.parametrize("as_struct", [False, True])
def test_the_digest_sees_files_that_a_table_names_wherever_they_are(tmp_path: Path, as_struct: bool) -> None:
    write(tmp_path / "sounds", "one.wav", "two.wav")
    (tmp_path / "lists").mkdir()
    names = ["../sounds/one.wav", str(tmp_path / "sounds" / "two.wav")]
    cells = [{"bytes": None, "path": name} for name in names] if as_struct else names
    pq.write_table(pa.table({"audio": cells, "text": ["one", "two"]}), tmp_path / "lists" / "a.parquet")
    config = AudioDataConfig(path=str(tmp_path / "lists" / "a.parquet"))
    digests = [source_digest(config, "transcript")]
    for name in ("one.wav", "two.wav"):
        soundfile.write(tmp_path / "sounds" / name, tone(900, 0.2), 8000)
        digests.append(source_digest(config, "transcript"))
    write(tmp_path / "lists", "another.wav")
    assert len(set(digests)) == 3
    assert source_digest(config, "transcript") == digests[-1]  # what is not named changes nothing
    manifest = tmp_path / "lists" / "m.jsonl"
    manifest.write_text("\n".join(json.dumps({"file": name, "text": "x"}) for name in names))
    assert source_digest(AudioDataConfig(path=str(manifest)), "transcript") not in digests
