"""Finished runs as a pandas table: python examples/results.py [RESULTS]"""

import sys

import moebench


def main(results: str = "results") -> None:
    """Print quality, load and speed of each arm, then which settings differ between runs."""
    runs = moebench.load_runs(results)
    done = runs[runs["status"] == "done"]
    print(done.groupby("arm")[["test/bits_per_byte", "test/load/cv", "throughput/tokens_per_s"]].mean().round(3))

    paired = done.pivot(index="seed", columns="arm", values="test/bits_per_byte")
    print(paired.sub(paired["dense"], axis=0).round(4))

    settings = [name for name in done.columns if name.split(".")[0] in ("task", "model", "layout", "router", "train")]
    differing = [name for name in settings if done[name].map(repr).nunique() > 1]
    print("settings that differ:", ", ".join(differing))

    comparison = moebench.compare(done["id"], results)
    for difference in comparison.differences:
        print(f"{difference.arm}: {difference.mean:+.4f} bits per byte, {difference.verdict}")


if __name__ == "__main__":
    main(*sys.argv[1:])
