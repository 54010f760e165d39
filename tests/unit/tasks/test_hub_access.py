"""Data sets on a hub that cannot be reached, as a program: `datasets` reads HF_HUB_OFFLINE on import."""

from support.command_line import CommandLine, WarmCommandLine

PROGRAM = """
from moebench.errors import UsageError
from moebench.tasks.audio.clips import AudioDataConfig, load_clips
from moebench.tasks.images.sources import ImageDataConfig, read_entries
from moebench.tasks.text.sources import TextDataConfig, load_documents

for read in (
    lambda: load_documents(TextDataConfig(dataset="nobody/nothing")),
    lambda: read_entries(ImageDataConfig(dataset="nobody/nothing")),
    lambda: list(load_clips(AudioDataConfig(dataset="nobody/nothing"), "transcript")),
):
    try:
        read()
    except UsageError as error:
        print(error)
"""


def test_a_hub_that_cannot_be_reached_says_how_to_give_local_files(cli: CommandLine, warm: WarmCommandLine) -> None:
    assert cli.environment["HF_HUB_OFFLINE"] == "1"
    file = cli.folder / "program.py"
    file.write_text(PROGRAM)
    done = warm.run_script(cli, file)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "task.data.dataset: 'nobody/nothing' cannot be read" in line
        assert "task.data.path=..." in line
