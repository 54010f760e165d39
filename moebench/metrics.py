"""Every metric that a run records or a table shows, declared once: name, unit, direction, format, meaning.

Headers and number formats of tables, legends, `moebench list metrics` and docs/metrics.md come from here. A test
compares the declarations with what runs record. Tasks and routers of plugins may record further metrics.
"""

from collections.abc import Mapping, Sequence

from moebench.metric import Direction, Format, Metric, MetricGroup

VALIDATION, TEST, STEP = "eval/", "test/", "train/"
"""Prefixes of recorded names: the validation split, the test split, one logged training step."""
RESOURCES = "resources/"
"""Prefix, in MLflow alone, of cost and speed of the finished run, which result.json has without."""


Declaration = tuple[str, str, str, Format, Direction, str]
"""Name, header, unit, format, direction, meaning."""


def _group(
    title: str,
    about: str,
    declarations: Sequence[Declaration],
    *,
    stem: str = "",
    prefixes: tuple[str, ...] = (),
    suffix: str = "",
) -> MetricGroup:
    metrics = [
        Metric(
            name=stem + name,
            header=header,
            unit=unit,
            format=form,
            better=better,
            meaning=meaning,
            prefixes=prefixes,
            suffix=suffix,
        )
        for name, header, unit, form, better, meaning in declarations
    ]
    return MetricGroup(title=title, about=about, metrics=tuple(metrics))


QUALITY: tuple[Declaration, ...] = (
    ("bits_per_byte", "", "bits", "number", "lower", "Code length of the text over its number of bytes."),
    ("masked_bits_per_byte", "", "bits", "number", "lower", "Code length of the masked tokens over their bytes."),
    ("masked_accuracy", "", "share", "number", "higher", "Share of masked tokens whose most likely token is right."),
    ("span_bits_per_byte", "", "bits", "number", "lower", "Code length of the removed spans over their bytes."),
    ("accuracy", "", "share", "number", "higher", "Share of images or recordings whose most likely class is right."),
    ("class_accuracy/CLASS", "", "share", "number", "higher", "Accuracy on the images of one class."),
    ("nats", "", "nats", "number", "lower", "Negative log-likelihood per image, recording or character."),
    ("brier", "", "", "number", "lower", "Brier score: squared distance of the probabilities from the one-hot class."),
    ("ece", "", "", "number", "lower", "Expected calibration error: mean gap between confidence and accuracy."),
    ("few_shot/SHOTS", "", "share", "number", "higher", "Accuracy on held-out classes after this many images of each."),
    ("skipped_images", "", "images", ".0f", "neither", "Images skipped because they could not be read."),
    ("cer", "", "share", "number", "lower", "Character error rate: edit distance to the transcript over its length."),
    ("wer", "", "share", "number", "lower", "Word error rate: edit distance in words over the number of words."),
    ("mse", "", "", "number", "lower", "Mean squared error."),
    ("oracle_gap", "", "", "number", "lower", "Mean squared error minus that of the maps that generated the data."),
)
LOAD: tuple[Declaration, ...] = (
    ("max_violation", "MaxVio", "", ".2f", "lower", "Largest load over the mean load, minus 1: 0 when even."),
    ("cv", "CV", "", ".2f", "lower", "Coefficient of variation of the load over experts: 0 when even."),
    ("entropy", "entropy", "", ".2f", "higher", "Entropy of the load over ln E: 1 when even, 0 for a single expert."),
    ("dead_experts", "dead", "experts", ".1f", "lower", "Experts with less than 1 % of an even load."),
    ("drop_rate", "dropped", "share", "percent", "lower", "Share of assignments that no expert computed."),
    ("reroute_rate", "rerouted", "share", "percent", "lower", "Share of assignments computed by another expert."),
    ("unserved", "unserved", "share", "percent", "lower", "Share of tokens that no expert computed."),
    ("flops_per_token", "FLOPs/token", "FLOPs", "count", "neither", "Forward FLOPs of the model, as executed."),
    ("experts_per_token", "experts", "rows", ".2f", "neither", "Rows that experts computed per token, as executed."),
    (
        "information/KIND",
        "information of experts",
        "share",
        ".3f",
        "neither",
        "I(label; expert) / H(label), from 0 to 1, mean over expert layers.",
    ),
)
DROPS: tuple[Declaration, ...] = (
    ("train_drop_rate", "in training", "share", "percent", "lower", "Assignments dropped, mean over all steps."),
    ("train_unserved", "", "share", "percent", "lower", "Tokens that no expert computed, mean over all steps."),
)
TRAINING: tuple[Declaration, ...] = (
    ("loss/task", "", "", "number", "lower", "Loss of the task without auxiliary losses."),
    ("loss/total", "", "", "number", "lower", "Sum of the task's loss and the weighted auxiliary losses."),
    ("loss/NAME", "", "", "number", "neither", "Auxiliary loss times its coefficient."),
    ("balance/NAME", "", "", "number", "neither", "Auxiliary loss without its coefficient."),
    ("train/learning_rate", "", "", "number", "neither", "Learning rate of the step."),
    ("train/grad_norm", "", "", "number", "neither", "Norm of the gradient before clipping."),
    ("train/tokens_per_s", "", "tokens/s", "count", "higher", "Speed of the step."),
    ("train/mfu", "", "share", "percent", "higher", "FLOPs that the model needs in a step over those of the devices."),
    ("time/data_share", "", "share", "percent", "lower", "Share of the time so far spent waiting for batches."),
    ("time/train_s", "", "s", "number", "lower", "Seconds of all training steps up to an evaluation."),
)
SPIKES: tuple[Declaration, ...] = (
    ("spike/loss", "", "", "number", "lower", "Loss of the task in a step that is a spike."),
    ("spike/loss_limit", "", "", "number", "neither", "Loss above which the step is a spike."),
    ("spike/grad_norm", "", "", "number", "lower", "Norm of the gradient of the step before clipping."),
    ("spike/grad_norm_limit", "", "", "number", "neither", "Norm above which the update may be skipped."),
    ("spike/batch", "", "", ".0f", "neither", "Number of the batch of the step, from 0."),
    ("rewind/NUMBER/QUANTITY", "", "", "number", "neither", "A value of a spike after which training was rewound."),
)
COLLAPSES: tuple[Declaration, ...] = (
    ("collapse/layers", "", "layers", ".0f", "lower", "Layers that are collapsed from this step on."),
    ("collapse/LAYER/expert", "", "", ".0f", "neither", "The busiest expert of a layer that has collapsed."),
    (
        "collapse/LAYER/num_experts",
        "",
        "experts",
        ".0f",
        "neither",
        "Number of experts that take nearly all assignments.",
    ),
    (
        "collapse/LAYER/share",
        "",
        "share",
        "percent",
        "lower",
        "Share of the assignments that they could have, usually one per token and expert.",
    ),
    ("collapse/LAYER/recovered", "", "share", "percent", "lower", "This share after the layer has recovered."),
)
PROCESSES: tuple[Declaration, ...] = (
    ("processes", "processes", "", ".0f", "neither", "Number of processes."),
    ("step_s_max", "", "s", "number", "lower", "Time of the step on the slowest process."),
    ("all_to_all_s", "", "s", "number", "lower", "Time inside all-to-alls."),
    ("all_to_all_share", "all-to-all", "share", "percent", "lower", "Share of a timed step inside all-to-alls."),
    ("wait_s", "", "s", "number", "lower", "Time of waiting for the slowest process."),
    (
        "wait_share",
        "waiting",
        "share",
        "percent",
        "lower",
        "Share of a timed step, in which every process waits for the slowest before each exchange.",
    ),
    ("sent_mib", "sent/step", "MiB", ".2f", "lower", "Data sent by one process in one step."),
    ("predicted_mib", "", "MiB", ".2f", "lower", "Sent data per step as computed from the routing alone."),
    ("collectives", "collectives", "", ".0f", "lower", "Sums and gathers of statistics and batches in one step."),
    ("collective_mib", "gathered", "MiB", ".2f", "lower", "Results of these on one process in a step."),
    ("optimizer_mib", "optimizer", "MiB", ".2f", "lower", "State of the optimizer on the process with the most."),
    ("rank_load_max", "busiest", "", ".2f", "lower", "Rows of the process with the most over the mean."),
    ("tokens_per_s_per_device", "tokens/s each", "tokens/s", "count", "higher", "Speed of the step per process."),
    ("peak_memory_gib", "memory", "GiB", ".2f", "lower", "Peak memory of the process with the most."),
    ("rows/rank_RANK", "", "rows", "count", "neither", "Rows that the experts of one process computed."),
    ("memory_gib/rank_RANK", "", "GiB", ".2f", "lower", "Peak memory of one process."),
)
SYSTEM: tuple[Declaration, ...] = (
    ("cpu_percent", "", "%", "number", "neither", "CPU time of the process since the last step logged; 100: one core."),
    ("memory_gib", "", "GiB", ".2f", "lower", "Resident memory of the process."),
    ("machine_memory_percent", "", "%", "number", "lower", "Memory of the machine in use, by all programs."),
    ("gpu_memory_gib", "", "GiB", ".2f", "lower", "Memory that the process has reserved on its GPU."),
    ("gpu_percent", "", "%", "number", "higher", "Use of the GPU, with the extra `gpu` installed."),
)
COST: tuple[Declaration, ...] = (
    ("active_params", "active", "parameters", "count", "neither", "Parameters that one token uses on average."),
    ("total_params", "total", "parameters", "count", "neither", "Parameters of the model."),
    ("flops_per_token", "FLOPs", "FLOPs", "count", "neither", "Forward FLOPs per token as planned."),
    ("experts_per_token", "experts", "rows", ".2f", "neither", "Rows that experts compute per token as planned."),
    ("train_flops_per_token", "train", "FLOPs", "count", "neither", "Forward FLOPs per token executed in training."),
    ("train_experts_per_token", "train", "rows", ".2f", "neither", "Rows per token executed in training."),
    ("eval_flops_per_token", "eval", "FLOPs", "count", "neither", "Forward FLOPs per token executed in evaluation."),
    ("eval_experts_per_token", "eval", "rows", ".2f", "neither", "Rows per token executed in evaluation."),
    ("target_flops_per_token", "target", "FLOPs", "count", "neither", "FLOPs per token that training aims at."),
    (
        "train_last_flops_per_token",
        "train, last 10 %",
        "FLOPs",
        "count",
        "neither",
        "Forward FLOPs per token executed in the last tenth of the steps.",
    ),
    ("budget_value", "value", "", "number", "neither", "Setting that keeps the budget in evaluation."),
    ("train_passes", "", "passes", ".0f", "neither", "Times that training runs each token through the model."),
    ("training_only_flops", "", "FLOPs", "count", "neither", "Forward FLOPs per token that training alone computes."),
    ("train_tokens", "", "tokens", "count", "neither", "Tokens that the model was trained on."),
    (
        "train_factor",
        "",
        "",
        "number",
        "neither",
        "With train.trainable: FLOPs of forward and backward pass over those of the forward pass; elsewhere 3.",
    ),
    ("trained_share", "", "share", "percent", "neither", "With train.trainable: share of parameters that are updated."),
)
SPEED: tuple[Declaration, ...] = (
    ("tokens_per_s", "tokens/s", "tokens/s", "count", "higher", "Speed of the median training step."),
    ("mfu", "MFU", "share", "percent", "higher", "Model FLOPs utilization: active FLOPs over the peak, where known."),
    ("step_s", "", "s", "number", "lower", "Time of the median training step."),
    ("train_s", "", "s", "number", "lower", "Time of all training steps."),
    ("total_s", "", "s", "number", "lower", "Time of the run, evaluations included, since its last start."),
    ("data_share", "", "share", "percent", "lower", "Share of the training time spent waiting for batches."),
)
COMPARISON: tuple[Declaration, ...] = (
    ("mean", "mean", "", "number", "neither", "Mean over seeds of the metric that arms are compared by."),
    (
        "trivial/NAME",
        "",
        "",
        "number",
        "neither",
        "What a trivial baseline reaches on the test split, in the metric that arms are compared by; in MLflow.",
    ),
    ("mean/ARM", "", "", "number", "neither", "Mean over seeds of one arm; in MLflow."),
    ("difference/ARM", "", "", "number", "neither", "An arm minus the baseline, over common seeds; in MLflow."),
    ("p", "p", "", "p", "lower", "P value of the paired t-test."),
    ("p_pooled", "p pooled", "", "p", "lower", "P value of the difference by the noise of all arms together."),
    ("p_holm", "p Holm", "", "p", "lower", "The larger of p and p pooled, corrected for all comparisons."),
    ("p_equivalence_holm", "p TOST", "", "p", "lower", "Two one-sided tests against the margin, 5 seeds or more."),
    ("p_exact", "exact p", "", "p", "lower", "Sign flips, 6 seeds or more, not corrected."),
    ("effect_sd", "Hedges g", "", "signed", "neither", "The difference over the SD between seeds, corrected for few."),
    (
        "smallest_detectable",
        "detectable",
        "",
        "number",
        "lower",
        "The smallest true difference that 4 of 5 repeats would show, if the differences of all arms vary equally.",
    ),
    ("share_of_baseline", "of baseline", "share", "whole percent", "higher", "Speed over that of the baseline."),
    ("relative_flops", "of plan", "share", "percent", "neither", "Forward FLOPs over those of the arm as planned."),
)

EVALUATED = (VALIDATION, TEST)
EXECUTED = (
    "forward FLOPs of the whole model and rows computed by experts, per token, mean over all steps of training (each"
    " pass counts) and on the test split"
)
GROUPS = (
    _group(
        "Quality",
        "On the validation split (`eval/`) and the test split (`test/`), as far as the task measures it. `/DOMAIN`: of"
        " one domain; `/out_of_domain`: of those held out of training, which the plain name leaves out.",
        QUALITY,
        prefixes=EVALUATED,
        suffix="DOMAIN",
    ),
    _group(
        "Expert load",
        "Mean over expert layers; none for a dense model. Of a logged training step (`train/`), the validation split"
        " (`eval/`) and the test split (`test/`); `/out_of_domain`: of the domains held out of training, which the"
        " plain name leaves out.",
        LOAD,
        stem="load/",
        prefixes=(STEP, *EVALUATED),
        suffix="out_of_domain",
    ),
    _group(
        "Drops in training",
        "Of all steps, mean over expert layers; in the result.",
        DROPS,
        stem="load/",
        prefixes=(TEST,),
    ),
    _group(
        "Training",
        "Of a logged training step: the first, every `train.log_every`-th, the last. In the journal.",
        TRAINING,
    ),
    _group(
        "Spikes",
        "Of a training step whose loss is a spike; a rewind is at the step that it goes back to. In the journal.",
        SPIKES,
    ),
    _group(
        "Collapse",
        "Of the step at which a layer is found to have collapsed, or to have recovered: over 10 steps one"
        " expert takes nearly all tokens, or a few, no more than one token uses, nearly all that they can. In the"
        " journal; the series of each layer are in `layers.jsonl`.",
        COLLAPSES,
    ),
    _group(
        "Processes",
        "Of a logged training step on several processes, mean over processes where no other is named. The journal has"
        " every such step, the result their mean.",
        PROCESSES,
        stem="parallel/",
        prefixes=(RESOURCES,),
    ),
    _group("System", "Of the first process at a logged training step. In the journal.", SYSTEM, stem="system/"),
    _group("Cost", f"In the result. Planned: before the run. Executed: {EXECUTED}.", COST, prefixes=(RESOURCES,)),
    _group("Speed", "Of the whole run; in the result.", SPEED, prefixes=(RESOURCES,)),
    _group("Comparison", "Of `moebench compare` and `moebench curve`, from several runs.", COMPARISON),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for group in GROUPS for metric in group.metrics}


def find_metric(recorded_name: str) -> Metric | None:
    """Return the metric that a journal, a result or MLflow calls `recorded_name`; None if it is not declared."""
    matching = [metric for metric in METRICS.values() if metric.matches(recorded_name)]
    return min(matching, key=lambda metric: metric.is_family, default=None)  # loss/task before loss/NAME
