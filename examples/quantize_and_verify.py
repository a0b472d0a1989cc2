"""Quantize a model and check the result: `python quantize_and_verify.py MODEL DIR`."""

import sys

import quantkit


def main(model: str, out: str) -> int:
    """Exit 0 for a checkpoint without errors, 1 with a hint where the request was refused."""
    try:
        outcome = quantkit.quantize(
            model,
            method="rtn_w4a16",
            out=out,
            set={"group_size": 64},
            progress=lambda event: print(event.stage) if event.kind == "stage" else None,
        )
    except quantkit.errors.QuantkitError as error:
        print(f"{error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"{len(outcome.plan.layers)} layers, {outcome.plan.bits_per_weight:.2f} bits a weight")

    report = quantkit.verify(out, source=model)
    for finding in report.errors:
        print(f"{finding.code}: {finding.message}")
    for layer in report.layers[:3]:
        print(f"{layer.module}: {layer.sqnr_db:.1f} dB")
    return 0 if report.ok else 4


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
