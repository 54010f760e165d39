"""Task files in lm-eval's YAML form with their items: a choice, a text, a continuation."""

import json
from pathlib import Path
from typing import Any

CHOICE = """
task: animals
dataset_path: json
dataset_kwargs:
  data_files: {test: items.jsonl}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{question}} Answer:"
doc_to_choice: "{{[first, second, third]}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXT = """
task: sentences
dataset_path: json
dataset_kwargs:
  data_files: {test: items.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
GENERATE = """
task: continuations
dataset_path: json
dataset_kwargs:
  data_files: {test: items.jsonl}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{first}}"
generation_kwargs: {until: [" "], max_gen_toks: 5, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ITEMS: list[dict[str, Any]] = [
    {"question": "Which animal barks?", "first": "dog", "second": "catfish", "third": "owl", "answer": 0},
    {"question": "Which animal flies?", "first": "dog", "second": "catfish", "third": "owl", "answer": 2},
    {"question": "Which animal swims?", "first": "horse", "second": "catfish", "third": "owl", "answer": 1},
    {"question": "Which one hoots?", "first": "dog", "second": "cow", "third": "owl", "answer": 2},
    {"question": "Which one gives milk?", "first": "dog", "second": "cow", "third": "a hen", "answer": 1},
    {"question": "Which one hoots at night?", "first": "dog", "second": "cow", "third": "owl", "answer": 2},
]
NAMES = ("animals", "sentences", "continuations")


def write_tasks(folder: Path, items: list[dict[str, Any]] | None = None, **files: str) -> Path:
    """Write the three tasks to a folder and return it; `files`: name -> text of other YAML files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"choice": CHOICE, "text": TEXT, "generate": GENERATE, **files}.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items or ITEMS)))
    return folder
