"""Task files of strangers: no code, no files outside their folder, one line for every mistake."""

import json
from pathlib import Path

import pytest
from support.benchmark_tasks import CHOICE, write_tasks

from moebench.analysis.benchmarks.task_files import list_task_files
from moebench.analysis.benchmarks.tasks import TaskOptions, load_tasks
from moebench.errors import UsageError

pytest.importorskip("lm_eval")
FUNCTION = CHOICE.replace("animals", "coded") + "process_docs: !function code.process\n"
CODE = "from pathlib import Path\n\ndef process(docs):\n    Path('marker').write_text('ran')\n    return docs\n"


def load(folder: Path, name: str, **options: object) -> object:
    (task,) = load_tasks(
        [name], TaskOptions(include=folder, **options), read_text=lambda: pytest.fail("no text is needed")
    )  # type: ignore[arg-type]
    return task.task


def test_tasks_are_read_with_their_items(tmp_path: Path) -> None:
    tasks = list_task_files(write_tasks(tmp_path / "tasks"))
    assert set(tasks) == {"animals", "sentences", "continuations"}
    assert tasks["animals"].rows is not None
    assert [row["answer"] for row in tasks["animals"].rows["test"]] == [0, 2, 1, 2, 1, 2]


def test_functions_are_not_run_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_tasks(tmp_path / "tasks", coded=FUNCTION)
    (folder / "code.py").write_text(CODE)
    with pytest.raises(UsageError, match=r"coded.yaml: !function is code \(--allow-code"):
        load(folder, "coded")
    assert not (tmp_path / "marker").exists()
    load(folder, "coded", allows_code=True)
    assert (tmp_path / "marker").read_text() == "ran"


ATTACKS = {
    "class": ("class: evil.Task", "class is code"),
    "unsafe": ("unsafe_code: true", "unsafe_code is code"),
    "prompt": ("use_prompt: promptsource:all", "use_prompt is code"),
    "python": ("process_docs: !!python/object/apply:os.system ['touch marker']", "cannot be read"),
    "metric": ("metric_list: [{metric: ./evil}]", "metric_list has './evil', which lm-eval does not have"),
    "near": ("metric_list: [{metric: acc_nrm}]", "Did you mean 'acc_norm'?"),
    "hub": ("metric_list: [{metric: acc, hf_evaluate: true}]", "hf_evaluate, which is code"),
    "bomb": ("description: &a [x, x]\ngen_prefix: [*a, *a]", "it has aliases"),
    "key": ("doc_to_txt: question", "the key 'doc_to_txt' is unknown. Did you mean 'doc_to_text'?"),
    "outside": ("include: ../other.yaml", "include names '../other.yaml', which is outside"),
    "path": ("dataset_path: /etc", "dataset_path names '/etc' (allowed: json, or a name on the hub)"),
    "csv": ("dataset_path: csv\ndataset_kwargs: {data_files: /etc/passwd}", "dataset_kwargs has data_files (allowed"),
    "itself": ("include: bad.yaml", "includes itself"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_files_that_name_code_or_other_files_are_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line, message = ATTACKS[name]
    key = line.partition(":")[0]
    kept = {"metric_list": "metric_list", "dataset_path": "dataset_path"}.get(key, "no such key")
    text = CHOICE.replace("animals", "bad").partition(kept)[0]
    folder = write_tasks(tmp_path / "tasks", bad=f"{text}\n{line}\n")
    (tmp_path / "other.yaml").write_text("task: other")
    with pytest.raises(UsageError) as refused:
        list_task_files(folder)
    assert message in str(refused.value)
    assert "bad.yaml" in str(refused.value)
    assert not (tmp_path / "marker").exists()


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch marker').read() }}",
    "{{ question.format.__globals__ }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_run_in_a_sandbox(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import utils

    monkeypatch.chdir(tmp_path)
    environment = utils.env
    text = CHOICE.replace("animals", "bad").replace('"{{question}} Answer:"', json.dumps(template))
    with pytest.raises(UsageError, match=r"bad.yaml: lm-eval cannot build this task .*(Security|Undefined)Error"):
        load(write_tasks(tmp_path / "tasks", bad=text), "bad")
    assert not (tmp_path / "marker").exists()
    assert utils.env is environment  # of others in this process


def test_items_are_plain_json_lines_of_the_folder(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    for content, message in {
        "not json": "cannot be read as JSON lines",
        "[1, 2]": r"cannot be read as JSON lines \(line 1 is a list, not an object\)",
        "": "has no lines",
    }.items():
        (folder / "items.jsonl").write_text(content)
        with pytest.raises(UsageError, match=f"items.jsonl: {message}"):
            list_task_files(folder)
    (folder / "items.jsonl").unlink()
    with pytest.raises(UsageError, match=r"items.jsonl: does not exist \(data_files, relative to the task file\)"):
        list_task_files(folder)
    (folder / "choice.yaml").write_text(CHOICE.replace("items.jsonl", "/etc/passwd"))
    with pytest.raises(UsageError, match="data_files names '/etc/passwd', which is outside"):
        list_task_files(folder)


def test_columns_that_items_lack_are_one_line(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", items=[{"text": "x", "first": 0, "second": 1, "third": 2, "answer": 0}])
    with pytest.raises(
        UsageError, match=r"choice.yaml: lm-eval cannot build this task \(UndefinedError: 'question' is"
    ):
        load(folder, "animals")


def test_folders_without_tasks_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        list_task_files(tmp_path / "missing")
    with pytest.raises(UsageError, match="has no task files"):
        list_task_files(tmp_path)
    folder = write_tasks(tmp_path / "tasks", again=CHOICE)
    with pytest.raises(UsageError, match="the task 'animals' is also in"):
        list_task_files(folder)
