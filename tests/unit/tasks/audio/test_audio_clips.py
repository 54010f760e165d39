import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from support.sounds import encode_wav, tone

from moebench.errors import UsageError
from moebench.tasks.audio.clips import AudioDataConfig, load_clips, source_digest
from moebench.tasks.audio.features import BrokenAudioError, decode
from moebench.tasks.audio.utterances import prepare


def write_parquet(path: Path, number: int = 6, **columns: list[object]) -> str:
    rows = {
        "audio": [{"bytes": encode_wav(tone(300 + 50 * i)), "path": f"{i}.wav"} for i in range(number)],
        "text": [f"text {'abcdefghijkl'[i]}" for i in range(number)],
        "language": ["xy"[i % 2] for i in range(number)],
    }
    pq.write_table(pa.table(rows | columns), path)
    return str(path)


def test_the_pack_has_five_languages_and_cuts_the_codecs_padding():
    clips = list(load_clips(AudioDataConfig(), "transcript"))
    assert len(clips) == 2462
    assert {clip.domain for clip in clips} == {"en", "es", "fr", "it", "ru"}
    first = clips[0]  # "Activated.", 1.064 s: 8,512 samples
    assert (first.target, first.group) == ("Activated.", "group/activated")
    assert len(decode(first.audio, 8000)) == 28 * 320  # GSM stores blocks of 320 samples
    assert len(decode(first.audio, 8000, first.seconds)) == 8512


@pytest.mark.parametrize(
    ("rate", "options"),
    [
        (8000, {"format": "WAV", "subtype": "GSM610"}),
        (16000, {"format": "WAV", "subtype": "PCM_16"}),
        (44100, {"format": "FLAC"}),
        (22050, {"format": "OGG", "subtype": "VORBIS"}),
    ],
)
def test_every_format_and_rate_gives_the_same_tone(rate, options):
    samples = decode(encode_wav(tone(440, rate=rate), rate, **options), 8000, 0.5)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 4000) <= 1
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    # 4,000 samples at 8,000 Hz: 2 Hz from bin to bin, so 440 Hz is bin 220.
    assert abs(int(spectrum.argmax()) - 220) <= 1
    assert np.abs(samples[500:3500]).max() == pytest.approx(0.5, abs=0.05)


def test_stereo_becomes_the_mean_of_its_channels():
    both = np.stack([tone(440), np.zeros(4000)], axis=1)
    assert decode(encode_wav(both), 8000) == pytest.approx(tone(440) / 2, abs=1e-4)


def test_files_that_are_not_audio_are_refused_with_a_reason(tmp_path):
    with pytest.raises(BrokenAudioError, match="no such file"):
        decode(tmp_path / "gone.wav", 8000)
    with pytest.raises(BrokenAudioError, match="no samples"):
        decode(encode_wav(np.zeros(0)), 8000)
    with pytest.raises(BrokenAudioError, match="no audio"):
        decode(None, 8000)
    with pytest.raises(BrokenAudioError) as caught:
        decode(b"RIFF no sound", 8000)
    assert "\n" not in str(caught.value)
    not_numbers = encode_wav(np.full(100, np.nan, dtype=np.float32), subtype="FLOAT")
    with pytest.raises(BrokenAudioError, match="not numbers"):
        decode(not_numbers, 8000)


def test_other_columns_of_a_parquet_file(tmp_path):
    names = [str(tmp_path / f"{i}.flac") for i in range(3)]
    for i, name in enumerate(names):
        soundfile.write(name, tone(200 * (i + 1)), 8000)
    table = {"sound": names, "said": ["one", "two", "three"], "accent": ["a", "b", "a"], "who": [7, 8, 7]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    config = AudioDataConfig(
        path=str(tmp_path / "t.parquet"),
        audio_column="sound",
        target_column="said",
        domain_column="accent",
        group_column="who",
    )
    clips = [(c.target, c.domain, c.group) for c in load_clips(config, "transcript")]
    assert clips == [("one", "a", "group/7"), ("two", "b", "group/8"), ("three", "a", "group/7")]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_manifest_names_files_beside_it(tmp_path, ending):
    (tmp_path / "wavs").mkdir()
    rows = [{"path": f"wavs/{name}.wav", "text": name} for name in ("one", "two")]
    for row in rows:
        soundfile.write(tmp_path / row["path"], tone(440), 8000)
    manifest = tmp_path / f"manifest.{ending}"
    if ending == "csv":
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["path", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        manifest.write_text("\n".join(map(json.dumps, rows)))
    for path in (tmp_path, manifest):
        clips = list(load_clips(AudioDataConfig(path=str(path)), "transcript"))
        assert [(c.target, c.domain) for c in clips] == [("one", "all"), ("two", "all")]
        assert [len(decode(c.audio, 8000)) for c in clips] == [4000, 4000]


def test_a_folder_with_a_text_beside_each_file(tmp_path):
    for name, text in (("a/one.wav", "One!"), ("b/two.ogg", "two")):
        (tmp_path / name).parent.mkdir()
        soundfile.write(tmp_path / name, tone(440), 8000)
        (tmp_path / name).with_suffix(".txt").write_text(text)
    config = AudioDataConfig(path=str(tmp_path))
    assert [(c.target, c.domain) for c in load_clips(config, "transcript")] == [("One!", "a"), ("two", "b")]
    assert [(c.target, c.domain) for c in load_clips(config, "label")] == [("a", "all"), ("b", "all")]
    (tmp_path / "b" / "two.txt").unlink()
    with pytest.raises(UsageError, match=r"'b/two\.ogg' has no transcript; give 'two\.txt' beside it"):
        list(load_clips(config, "transcript"))
    soundfile.write(tmp_path / "loose.wav", tone(440), 8000)
    with pytest.raises(UsageError, match=r"'loose\.wav' is in no folder that names its class"):
        list(load_clips(config, "label"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"target_column": "txt"},
            ["task.data.target_column", "'txt'", "Did you mean 'text'?", "audio, text"],
        ),
        ({"audio_column": "sound"}, ["task.data.audio_column", "'sound'", "columns of a.parquet"]),
        ({"domain_column": "topic"}, ["task.data.domain_column", "'topic'"]),
        ({"group_column": "speaker"}, ["task.data.group_column", "'speaker'"]),
    ],
)
def test_wrong_columns_are_refused_with_the_existing_ones(tmp_path, options, words):
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError) as caught:
        list(load_clips(AudioDataConfig(path=path, **options), "transcript"))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "a", "dataset": "b"}, ["task.data.path", "task.data.dataset"]),
        ({"split": "test"}, ["task.data.split", "'test'", "task.data.dataset"]),
        ({"target_column": ""}, ["task.data.target_column"]),
        ({"sample_rate": 100}, ["task.data.sample_rate", "between 4000 and 192000", "100"]),
        ({"num_mels": 2}, ["task.data.num_mels", "2"]),
        ({"max_seconds": 0.0}, ["task.data.max_seconds"]),
    ],
)
def test_meaningless_configurations_are_refused(options, words):
    with pytest.raises(UsageError) as caught:
        AudioDataConfig(**options)
    assert all(word in str(caught.value) for word in words)


def test_bad_sources_are_named(tmp_path):
    def assert_refused(path: Path, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            list(load_clips(AudioDataConfig(path=str(path)), "transcript"))

    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert_refused(
        tmp_path / "bad.parquet", "'bad.parquet' cannot be read .*; give a complete file with task.data.path"
    )
    assert_refused(tmp_path / "bad.parqet", "does not exist. Did you mean 'bad.parquet'")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", r"has no file that ends in \.parquet, \.csv, \.jsonl, \.wav, \.flac, \.ogg")
    (tmp_path / "empty" / "a.csv").write_text("path,text\n")
    assert_refused(tmp_path / "empty", "'a.csv' has no rows")
    with pytest.raises(UsageError, match="no embedded labelled audio"):
        list(load_clips(AudioDataConfig(), "label"))


def test_broken_files_end_the_preparation_or_are_counted(tmp_path, capsys):
    audio = [{"bytes": encode_wav(tone(300 + 50 * i)), "path": f"{i}.wav"} for i in range(8)]
    audio[2] = {"bytes": b"RIFF broken", "path": "2.wav"}
    audio[5] = {"bytes": encode_wav(np.zeros(0)), "path": "5.wav"}
    path = write_parquet(tmp_path / "a.parquet", 8, audio=audio)
    with pytest.raises(UsageError, match=r"a\.parquet, row 2 \(2\.wav\) cannot be used .*task\.data\.skip_broken=true"):
        prepare(AudioDataConfig(path=path, domain_column=None), tmp_path / "cache", "transcript")
    audio = prepare(AudioDataConfig(path=path, domain_column=None, skip_broken=True), tmp_path / "cache", "transcript")
    assert audio.left_out == {"broken": 2}
    assert capsys.readouterr().err == "task.data: of 8 clips left out: 2 broken\n"


def test_digits_long_clips_and_empty_transcripts_are_left_out_and_counted(tmp_path):
    audio = [{"bytes": encode_wav(tone(300, 0.3 if i else 2.0)), "path": None} for i in range(8)]
    texts = ["long", "call 911", "[beep]", *"abcde"]
    path = write_parquet(tmp_path / "a.parquet", 8, audio=audio, text=texts, language=["z"] * 8)
    audio = prepare(AudioDataConfig(path=path, max_seconds=1.0), tmp_path / "cache", "transcript")
    assert audio.left_out == {
        "longer than 1 s": 1,
        "with digits in the transcript": 1,
        "without a transcript": 1,
    }
    kept = prepare(AudioDataConfig(path=path, max_seconds=1.0, digits="keep"), tmp_path / "cache", "transcript")
    assert "with digits in the transcript" not in kept.left_out
    with pytest.raises(UsageError, match=r"has no clips to train on \(8 longer than 0\.1 s\)"):
        prepare(AudioDataConfig(path=path, max_seconds=0.1, digits="keep"), tmp_path / "cache", "label")


def test_a_named_data_set_is_read_without_its_decoder(hub):
    # The file declares its column as audio, which `datasets` would decode with a library that is not installed.
    write_parquet(hub / "train.parquet", 4)
    table = pq.read_table(hub / "train.parquet")
    features = {"audio": {"_type": "Audio"}, "text": {"dtype": "string", "_type": "Value"}}
    features["language"] = features["text"]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), hub / "train.parquet")
    config = AudioDataConfig(dataset="on/hub")
    clips = list(load_clips(config, "transcript"))
    assert [clip.target for clip in clips] == ["text a", "text b", "text c", "text d"]
    assert len(decode(clips[0].audio, 8000)) == 4000


def test_digest_is_of_the_content_and_not_of_the_location(tmp_path):
    first = write_parquet(tmp_path / "a.parquet")
    (tmp_path / "other").mkdir()
    second = write_parquet(tmp_path / "other" / "a.parquet")
    digest = source_digest(AudioDataConfig(path=first), "transcript")
    assert digest == source_digest(AudioDataConfig(path=second), "transcript")
    assert digest != source_digest(AudioDataConfig(path=first), "label")
    assert digest != source_digest(AudioDataConfig(path=first, num_mels=41), "transcript")
    write_parquet(tmp_path / "other" / "a.parquet", 5)
    assert digest != source_digest(AudioDataConfig(path=second), "transcript")


def test_digest_sees_the_files_that_a_manifest_names(tmp_path):
    (tmp_path / "m.csv").write_text("path,text\none.wav,one\n")
    soundfile.write(tmp_path / "one.wav", tone(440), 8000)
    config = AudioDataConfig(path=str(tmp_path / "m.csv"))
    digest = source_digest(config, "transcript")
    soundfile.write(tmp_path / "one.wav", tone(450, 0.6), 8000)
    assert digest != source_digest(config, "transcript")
