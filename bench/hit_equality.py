"""How many greedy texts a hit in the prefix cache changes: with ``exact``, without it, and with a crowd.

    python bench/hit_equality.py [--model FILE.gguf] [--conversations 8] [--turns 3] [--exact-kernels]

Conversations of several turns with a shared system prompt arrive at random on the real model. Every turn's
prompt is then computed once more by itself, from its first token, and the texts are compared: first one
conversation at a time, so that only reuse can make a difference, then all at once, where batching can, too.
"""

from __future__ import annotations

import argparse
import random
from chunk import load

from stoker.config import CacheConfig
from stoker.testing import EngineHarness
from stoker_plugins.fcfs import FirstComeFirstServed

WORDS = (
    "river stone engine paper garden winter signal bridge window letter market ocean forest mirror "
    "valley harbor silver cotton planet basket island journey marble temple summer morning village"
).split()


def engine(runtime: object, **cache: object) -> EngineHarness:
    for lane in range(runtime.info.num_lanes):
        runtime.truncate(lane, 0)
    return EngineHarness(FirstComeFirstServed(), runtime=runtime, cache=CacheConfig(**cache))


def converse(runtime: object, args: argparse.Namespace, *, crowd: bool, **cache: object) -> list:
    """(prompt, text, cached tokens) of every turn."""
    dice = random.Random(args.seed)
    encode = runtime.tokenizer.encode
    system = encode(
        "You are a guide. " + " ".join(dice.choices(WORDS, k=args.system)),
        add_special=True,
        parse_special=False,
    )
    told = [list(system) for _ in range(args.conversations)]
    harness = engine(runtime, **cache)
    done = []

    def ask(index: int) -> object:
        words = " ".join(dice.choices(WORDS, k=dice.choice([5, 20, 60])))
        told[index] += encode(
            f"\nQuestion: tell me of {words}.\nAnswer:", add_special=False, parse_special=False
        )
        return harness.submit(list(told[index]), max_tokens=args.tokens, ignore_eos=True)

    def take(index: int, request: object) -> None:
        usage = request.finish().usage
        done.append((list(request.request.prompt_token_ids), request.text(), usage.cached_tokens))
        told[index] += encode(request.text(), add_special=False, parse_special=False)

    for _ in range(args.turns):
        if not crowd:
            for index in range(args.conversations):
                request = ask(index)
                harness.run()
                take(index, request)
            continue
        running = []
        for index in range(args.conversations):
            running.append((index, ask(index)))
            for _ in range(dice.randrange(4)):
                harness.step()
        harness.run()
        for index, request in running:
            take(index, request)
    return done


def alone(runtime: object, prompts: list, tokens: int) -> list[str]:
    harness = engine(runtime, prefix_reuse=False)
    texts = []
    for prompt in prompts:
        request = harness.submit(prompt, max_tokens=tokens, ignore_eos=True)
        harness.run()
        texts.append(request.text())
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; by default SmolLM2")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--system", type=int, default=60, help="words of the shared system prompt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--exact-kernels", action="store_true", help="see the option of that name")
    args = parser.parse_args()
    runtime = load(args.model, None, exact_kernels=args.exact_kernels)
    print(runtime.info.name, runtime.info.capabilities)
    for crowd in (False, True):
        for exact in (True, False):
            turns = converse(runtime, args, crowd=crowd, exact=exact)
            truth = alone(runtime, [prompt for prompt, _, _ in turns], args.tokens)
            differ = sum(text != want for (_, text, _), want in zip(turns, truth, strict=True))
            cached = sum(tokens for _, _, tokens in turns)
            asked = sum(len(prompt) for prompt, _, _ in turns)
            longest = max(len(prompt) for prompt, _, _ in turns)
            how = f"{'all at once' if crowd else 'one by one'}, exact = {exact}"
            print(
                f"{how}: {differ} of {len(turns)} texts differ; {cached} of {asked} prompt tokens from "
                f"the cache; the longest prompt has {longest}",
                flush=True,
            )
    runtime.close()


if __name__ == "__main__":
    main()
