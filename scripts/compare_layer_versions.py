"""Time the expert layer of two versions of moebench alternately, so that the noise of the machine is in both.

    git archive COMMIT moebench | tar -x -C /tmp/old
    python scripts/compare_layer_versions.py /tmp/old . --rounds 24

Each version runs in its own process, with the same seeds and threads; both get the same rows of `moebench bench layer`,
in fp32 on the CPU. The printed ratios are second version over first: the median of the rounds with their quartiles, and
that of the fastest rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

MIN_ROUND_S = 0.05
"""Calls of a round are repeated until they take this long, and the fastest counts."""


def main() -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder with the package of the first version")
    parser.add_argument("new", type=Path, help="folder with the package of the second version")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", help="a row such as switch:zipf; repeatable")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    for tree in (options.old, options.new):
        if not (tree / "moebench" / "__init__.py").is_file():
            parser.error(f"{tree}: has no package moebench")
    versions = [Version(tree, options.threads) for tree in (options.old, options.new)]
    rows, others = (version.ask({"list": True}) for version in versions)
    rows = [row for row in rows if row in others]
    unknown = set(options.only or ()) - {*rows}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} (allowed: {', '.join(rows)})")
    for row in options.only or rows:
        compare(row, versions, options.rounds)


class Version:
    """A process that times the layer of one version."""

    def __init__(self, tree: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).resolve(), "--serve", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree.resolve())},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request, and return the reply."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compare(row: str, versions: list[Version], rounds: int) -> None:
    """Print the ratios of one row."""
    name, load = row.split(":")
    saved = [version.ask({"build": name, "load": load}) for version in versions]
    times: list[list[float]] = [[], []]
    for number in range(rounds + 2):  # the first two warm up
        for index in (0, 1) if number % 2 else (1, 0):
            seconds = versions[index].ask({"time": True})
            if number >= 2:
                times[index].append(seconds)
    low, median, high = statistics.quantiles([new / old for old, new in zip(*times, strict=True)], n=4)
    print(
        f"{row:26} time {median:.3f} [{low:.3f}, {high:.3f}], fastest {min(times[1]) / min(times[0]):.3f},"
        f" first version {1e3 * statistics.median(times[0]):.1f} ms; saved bytes {saved[1] / saved[0]:.2f}",
        flush=True,
    )


def serve(threads: int) -> None:
    """Answer the requests on standard input: list the rows, build one, time it."""
    import torch

    from moebench.bench.layer.problem import Candidate, make_problem
    from moebench.bench.layer.saved import count_saved_bytes
    from moebench.bench.layer.shapes import PRESETS
    from moebench.bench.layer.variants import build_variants
    from moebench.bench.machine import prepare_machine

    device = torch.device("cpu")
    prepare_machine(threads=threads, allocator="keep", device=device)
    for line in sys.stdin:
        request = json.loads(line)
        if "list" in request:
            reply: Any = [f"{shape.name}:{load}" for shape in PRESETS for load in shape.loads]
        elif "build" in request:
            shape = next(shape for shape in PRESETS if shape.name == request["build"])
            problem = make_problem(shape, request["load"], seed=0, device=device, dtype=torch.float32)
            layers = [each for each in build_variants(problem) if isinstance(each, Candidate)]
            layer = next(each for each in layers if each.name == "moebench")
            layer.module.train()
            grad_TD = torch.randn(problem.x_TD.shape, generator=torch.Generator().manual_seed(0))
            reply = count_saved_bytes(partial(layer.forward, problem.x_TD), [*layer.module.parameters(), problem.x_TD])
        else:
            reply = time_calls(layer, problem.x_TD, grad_TD)
        print(json.dumps(reply), flush=True)


def time_calls(layer: Any, x_TD: Any, grad_TD: Any) -> float:
    """Return the seconds of the fastest forward and backward pass of a round."""
    fastest, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < MIN_ROUND_S or fastest == float("inf"):
        leaf_TD = x_TD.detach().clone().requires_grad_()
        begin = time.perf_counter()
        layer.forward(leaf_TD).backward(grad_TD)
        fastest = min(fastest, time.perf_counter() - begin)
        for parameter in layer.module.parameters():
            parameter.grad = None
    return fastest


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    else:
        main()
