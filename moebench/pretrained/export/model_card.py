"""The README.md of an exported folder: where the model comes from, how good it is, how it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

from moebench.reporting.table import Column, Table

HEADER = """---
library_name: {library}
tags:
- moebench
---
"""
LOADING = {
    "hf": """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype=torch.DTYPE)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
tokens = tokenizer("The river ", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```""",
    "safetensors": """`config.json` has the configuration of the run, and the weights have the names of moebench:
transformers does not load them. `init: {from: hf:FOLDER}` in an experiment of moebench continues from them, and in
Python:

```python
import moebench

model, task = moebench.load_model("hf:FOLDER")
```""",
}
MAX_TEXT = 300
"""Characters of a name or a question."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the README of an exported model says."""

    format: str
    """`hf` or `safetensors`."""
    title: str
    facts: Mapping[str, str]
    """The run, in the order in which it is shown: experiment, arm, seed, ..."""
    metrics: Mapping[str, float]
    """Final values on the test split."""
    limits: tuple[str, ...]
    """Sentences on what the exported model does not do as the run did."""
    folder: str
    """Name of the folder, for the code that loads it."""
    dtype: str

    def to_markdown(self) -> str:
        """Return the content of README.md."""
        library = "transformers" if self.format == "hf" else "moebench"
        facts = Table(
            columns=(Column(header="of the run", align="left"), Column(header="", align="left")),
            rows=tuple((name, escape(value)) for name, value in self.facts.items()),
        )
        parts = [
            HEADER.format(library=library) + f"# {escape(self.title)}",
            "Trained by moebench, which compares routers of sparse models under matched conditions.",
            facts.to_markdown(),
            "## Results on the test split",
            self._format_metrics(),
            "## Loading",
            LOADING[self.format].replace("DTYPE", self.dtype).replace("FOLDER", self.folder),
        ]
        if self.limits:
            parts += ["## What differs", "\n".join(f"- {line}" for line in self.limits)]
        return "\n\n".join(parts) + "\n"

    def _format_metrics(self) -> str:
        if not self.metrics:
            return "None: these are not the weights of a finished run."
        rows = tuple((escape(name), f"{value:.4f}") for name, value in sorted(self.metrics.items()))
        return Table(columns=(Column(header="metric", align="left"), Column(header="value")), rows=rows).to_markdown()


def escape(text: str) -> str:
    """Return a text from a results folder as one line of plain Markdown: no markup, no HTML; tables escape pipes."""
    line = " ".join(text.split())[:MAX_TEXT]
    return "".join(f"\\{character}" if character in "\\`*{}[]<>#!" else character for character in line)
