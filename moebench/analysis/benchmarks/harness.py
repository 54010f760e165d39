"""The interface of lm-eval to a model, with stored responses; importing this file imports lm-eval."""

import contextlib
import io
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from lm_eval import utils as harness_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from moebench.analysis.benchmarks.records import EvaluationRecord, ItemResult, Key, Kind, Response, digest_values
from moebench.analysis.benchmarks.text_model import PairScore, Prompt, TextModel, TextPair
from moebench.errors import UsageError

CHUNK_REQUESTS = 256
"""Requests after which responses are stored: what a killed evaluation repeats at most."""
DEFAULT_NEW_TOKENS = 256
"""Tokens that are generated where a task sets no limit; as lm-eval."""
MAX_NEW_TOKENS = 4096
NOISY_LIBRARIES = ("lm_eval", "datasets", "huggingface_hub", "fsspec")
"""Libraries whose logs would come before the one line of an error: each attempt to reach a server, for one."""
PYTHON_SEED, NUMPY_SEED = 0, 1234
WEIGHTED = ("bits_per_byte", "byte_perplexity", "word_perplexity")
"""Metrics whose items are a log-probability and the number of units that it is divided by."""


class HarnessModel(LM):  # type: ignore[misc]  # lm-eval has no types
    """Takes responses to the requests of one task from the record, and computes those that are missing."""

    def __init__(
        self, load: Callable[[], TextModel], record: EvaluationRecord, on_progress: Callable[[int, int], None]
    ) -> None:
        """`load`: returns the model; called only if a response is missing."""
        super().__init__()
        self._load = load
        self._record = record
        self._on_progress = on_progress
        self.error: Exception | None = None
        """An error in the model rather than in the task."""
        self.responses: dict[int, list[Response]] = {}
        """Item -> its responses."""

    @cached_property
    def _model(self) -> TextModel:
        return self._load()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log p of the continuation, whether it is greedy) for (context, continuation)."""
        return [(float(a.values[0]), bool(a.values[1])) for a in self._respond("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return log p of whole texts."""
        return [float(response.values[0]) for response in self._respond("loglikelihood_rolling", requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the greedy continuations of (text, options)."""
        return [str(response.values[0]) for response in self._respond("generate_until", requests)]

    def _respond(self, kind: Kind, requests: Sequence[Instance]) -> list[Response]:
        keys = [
            Key(kind=kind, item=request.doc_id, request=request.idx, digest=digest_values(*request.args))
            for request in requests
        ]
        missing = {
            key: request for key, request in zip(keys, requests, strict=True) if key not in self._record.responses
        }
        remaining = [*missing]
        try:
            for start in range(0, len(remaining), CHUNK_REQUESTS):
                chunk = remaining[start : start + CHUNK_REQUESTS]
                responses = self._compute(kind, [missing[key] for key in chunk])
                self._record.append_responses(dict(zip(chunk, responses, strict=True)))
                self._on_progress(start + len(chunk), len(remaining))
        except Exception as error:
            self.error = error
            raise
        responses = [self._record.responses[key] for key in keys]
        for key, response in zip(keys, responses, strict=True):
            self.responses.setdefault(key.item, []).append(response)
        return responses

    def _compute(self, kind: Kind, requests: Sequence[Instance]) -> list[Response]:
        domains = [request.doc.get("domain") if isinstance(request.doc, dict) else None for request in requests]
        if kind == "generate_until":
            prompts = [_read_prompt(request.args, domain) for request, domain in zip(requests, domains, strict=True)]
            return [
                Response(values=(text,), is_truncated=truncated) for text, truncated in self._model.generate(prompts)
            ]
        if kind == "loglikelihood_rolling":
            scores = self._model.score_texts([request.args[0] for request in requests], domains)
            return [Response(values=(s.log_probability,), is_truncated=s.is_truncated) for s in scores]
        pairs = [
            TextPair(context=request.args[0], continuation=request.args[1], domain=domain)
            for request, domain in zip(requests, domains, strict=True)
        ]
        return [_to_response(score) for score in self._model.score_pairs(pairs)]


def _to_response(score: PairScore) -> Response:
    return Response(values=(score.log_probability, score.is_greedy), is_truncated=score.is_truncated)


def _read_prompt(arguments: Sequence[Any], domain: object) -> Prompt:
    """Return a prompt with the options that lm-eval's tasks give; raise UsageError for anything but greedy decoding."""
    text, options = arguments[0], dict(arguments[1] or {})
    until = options.get("until") or ()
    limit = next((options[key] for key in ("max_gen_toks", "max_new_tokens") if key in options), DEFAULT_NEW_TOKENS)
    if options.get("do_sample") or (options.get("temperature") or 0) > 0:
        raise UsageError("generation_kwargs: sets sampling (allowed: do_sample: false, temperature: 0)")
    if not isinstance(limit, int) or not 0 < limit <= MAX_NEW_TOKENS:
        raise UsageError(f"generation_kwargs.max_gen_toks must be from 1 to {MAX_NEW_TOKENS}, got {limit!r}")
    stops = (until,) if isinstance(until, str) else tuple(map(str, until))
    return Prompt(text=text, until=stops, max_tokens=limit, domain=domain)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep notes and progress bars of lm-eval and its libraries from both streams, and templates of tasks in a sandbox.

    Templates come from files of strangers; the sandbox of jinja2 refuses attributes that lead to code. Functions of
    tasks that draw find the global generators in the states that lm-eval's command sets.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    loggers, original = [logging.getLogger(name) for name in NOISY_LIBRARIES], harness_utils.env
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(original.filters)
    levels, sink = [logger.level for logger in loggers], io.StringIO()
    states = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    harness_utils.env = sandbox
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        harness_utils.env = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])


def evaluate_task(
    model: HarnessModel, task: Any, name: str, *, limit: int | None, seed: int
) -> tuple[list[ItemResult], dict[str, float]]:
    """Return the result of each item of a task of lm-eval, and the metrics of all of them.

    `seed`: chooses the examples of few-shot contexts. Raises UsageError where lm-eval cannot compute them.
    """
    task.set_fewshot_seed(seed=seed)
    try:
        with quiet_harness():
            results = evaluate(lm=model, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
            items = [_read_item(task, each, model.responses) for each in _merge_filters(results["samples"][name])]
            return items, _read_metrics(results["results"][name])
    except UsageError:
        raise
    except Exception as error:
        if error is model.error or isinstance(error, OSError):
            raise
        raise UsageError(f"{name}: lm-eval cannot evaluate it ({describe_error(error)})") from error


def describe_error(error: Exception) -> str:
    """Return the kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _merge_filters(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one sample for each item, with the metrics of all filters: `acc`, `exact_match,strict`."""
    merged: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item = merged.setdefault(sample["doc_id"], {**sample, "values": {}})
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        item["values"] |= {f"{metric}{suffix}": sample[metric] for metric in sample["metrics"]}
    return [merged[number] for number in sorted(merged)]


def _read_item(task: Any, sample: Mapping[str, Any], responses: Mapping[int, Sequence[Response]]) -> ItemResult:
    number, doc = sample["doc_id"], sample["doc"]
    choices, gold = _read_choices(task, doc) if task.OUTPUT_TYPE == "multiple_choice" else (None, ())
    domain = doc.get("domain") if isinstance(doc, dict) else None
    values = {name: _read_value(raw, is_sum=name in WEIGHTED) for name, raw in sample["values"].items()}
    return ItemResult(
        item=number,
        digest=sample["doc_hash"][:16],
        metrics={name: value for name, value in values.items() if value is not None},
        domain=domain if isinstance(domain, str) else None,
        num_choices=choices,
        gold=gold,
        is_truncated=any(response.is_truncated for response in responses.get(number, ())),
    )


def _read_choices(task: Any, doc: Any) -> tuple[int, tuple[int, ...]]:
    """Return the number of choices of an item, and which of them are right."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    indices = [
        choices.index(each) if each in choices else each for each in (gold if isinstance(gold, list) else [gold])
    ]
    return len(choices), tuple(each for each in indices if isinstance(each, int) and 0 <= each < len(choices))


def _read_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task by the names of its items: `acc,none` is acc."""
    named = {name.removesuffix(",none"): value for name, value in values.items() if "," in name}
    return {name: float(value) for name, value in named.items() if "_stderr" not in name and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or hasattr(value, "item")


def _read_value(raw: Any, *, is_sum: bool) -> float | tuple[float, float] | None:
    """Return the value of a metric of an item as numbers; None for one that is none, such as a pair of texts."""
    if is_sum:
        return float(raw[0]), float(raw[1])
    return float(raw) if _is_number(raw) else None
