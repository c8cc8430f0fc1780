"""Which cuts of a prompt give the same logits, to the bit: the runtime alone.

    python bench/cuts.py [--model FILE.gguf] [--exact-kernels]

Decides what the gguf backend may promise of a type of weights (its ``kernels.py``).
"""

from __future__ import annotations

import argparse
from chunk import load

import numpy as np

from stoker import StepInput

SHORT = ([30, 30], [20, 40], [7, 53], [52, 1, 7], [51, 9], [48, 12], [16, 16, 28], [9] * 6 + [6])
ENDS = tuple([60 - rows, rows] for rows in (1, 2, 3, 4, 5, 6, 7, 8))
LONG = ([128, 64], [192], [63, 63, 63, 3], [32] * 6)


class Prompt:
    """A prompt that is computed again and again."""

    def __init__(self, runtime: object) -> None:
        self.runtime = runtime
        self.tokens = np.random.default_rng(3).integers(300, 40_000, 200).astype(np.int32)

    def logits(self, cuts: list[int]) -> np.ndarray:
        """Its last row of logits, computed in pieces of so many tokens."""
        self.runtime.truncate(0, 0)
        at = 0
        for length in cuts:
            rows = np.arange(at, at + length, dtype=np.int32)
            at += length
            step = StepInput(self.tokens[rows], rows, np.zeros(length, np.int32), rows == at - 1)
            logits = self.runtime.step(step).logits[0].copy()
        return logits

    def compare(self, cuts: list[int], others: tuple[list[int], ...]) -> None:
        want = self.logits(cuts)
        for other in others:
            apart = float(np.abs(self.logits(other) - want).max())
            print(
                f"{cuts} and {other}: "
                + (f"differ by up to {apart:.3f}" if apart else "the same bits")
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; by default SmolLM2")
    parser.add_argument("--exact-kernels", action="store_true")
    args = parser.parse_args()
    runtime = load(args.model, None, exact_kernels=args.exact_kernels)
    print(runtime.info.name, runtime.info.capabilities)
    prompt = Prompt(runtime)
    prompt.compare([60], SHORT + ENDS)
    prompt.compare([64] * 3, LONG)
    runtime.close()


if __name__ == "__main__":
    main()
