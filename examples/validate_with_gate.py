"""Fail when a checkpoint is worse than its baseline: `python validate_with_gate.py DIR MODEL`."""

import sys

import quantkit


def main(directory: str, baseline: str, samples: int = 8, broken_baseline: bool = False) -> int:
    """Exit 0 when every gate held, 4 when one failed."""
    report = quantkit.validate(
        directory,
        baseline=baseline,
        samples=samples,
        gates=["ppl_ratio<=1.10", "canary_failures<=8"],
        reports=f"{directory}.report.json",
        throughput=False,
        broken_baseline=broken_baseline,
    )
    for gate in report.gates:
        print(f"{gate.metric}{gate.limit}: {gate.value} {gate.verdict}")
    return 0 if report.ok else 4


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
