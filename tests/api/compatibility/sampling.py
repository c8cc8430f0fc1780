"""Probes of the parameters that choose tokens."""

from __future__ import annotations

from api.compatibility.cases import works
from api.compatibility.harness import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Ask

STORY = "Once upon a time, there was a"
# What follows is clear as long as nothing is done against repetition.
ROUND = "one two three one two three one two three one two"


@works("temperature", CHAT, COMPLETIONS, RESPONSES, MESSAGES)
def temperature(ask: Ask) -> None:
    greedy = ask.greedy(about=STORY)
    assert ask(about=STORY, temperature=0).text == greedy
    assert {ask(about=STORY, temperature=1).text for _ in range(2)} != {greedy}


@works("top_p", CHAT, COMPLETIONS, RESPONSES, MESSAGES)
def top_p(ask: Ask) -> None:
    assert ask(about=STORY, temperature=1, top_p=1e-6).text == ask.greedy(about=STORY)


@works("top_k", CHAT, COMPLETIONS, RESPONSES, MESSAGES)
def top_k(ask: Ask) -> None:
    assert ask(about=STORY, temperature=1, top_k=1).text == ask.greedy(about=STORY)


@works("min_p", CHAT, COMPLETIONS, RESPONSES)
def min_p(ask: Ask) -> None:
    assert ask(about=STORY, temperature=1, min_p=1).text == ask.greedy(about=STORY)


@works("typical_p", CHAT, COMPLETIONS)
def typical_p(ask: Ask) -> None:
    # All that is left is the one token whose surprise is nearest to what was to be expected.
    texts = {ask(about=STORY, temperature=1, typical_p=1e-6, seed=seed).text for seed in (1, 2)}
    assert len(texts) == 1
    assert texts != {ask.greedy(about=STORY)}


@works("seed", CHAT, COMPLETIONS, RESPONSES)
def seed(ask: Ask) -> None:
    first, again, other = (ask(about=STORY, temperature=1, seed=s).text for s in (7, 7, 8))
    assert first == again != other


@works("repetition_penalty", CHAT, COMPLETIONS)
def repetition_penalty(ask: Ask) -> None:
    assert ask(goes_on=ROUND, repetition_penalty=2).text != ask.greedy(goes_on=ROUND)


@works("presence_penalty", CHAT, COMPLETIONS)
def presence_penalty(ask: Ask) -> None:
    tokens = {"tokens": 12}
    assert ask(goes_on=ROUND, presence_penalty=2, **tokens).text != ask.greedy(
        goes_on=ROUND, **tokens
    )
    assert ask(goes_on=ROUND, presence_penalty=0, **tokens).text == ask.greedy(
        goes_on=ROUND, **tokens
    )


@works("frequency_penalty", CHAT, COMPLETIONS)
def frequency_penalty(ask: Ask) -> None:
    tokens = {"tokens": 12}
    assert ask(goes_on=ROUND, frequency_penalty=2, **tokens).text != ask.greedy(
        goes_on=ROUND, **tokens
    )


@works("repetition_penalty presence_penalty frequency_penalty", RESPONSES)
def penalties(ask: Ask) -> None:
    text = "Write the word red ten times."
    plain = ask.greedy(about=text, tokens=16)
    assert ask(about=text, tokens=16, repetition_penalty=2).text != plain
    assert ask(about=text, tokens=16, presence_penalty=2).text != plain
    assert ask(about=text, tokens=16, frequency_penalty=2).text != plain


@works("dry_multiplier", CHAT, COMPLETIONS)
def dry_multiplier(ask: Ask) -> None:
    assert ask(goes_on=ROUND, dry_multiplier=5).text != ask.greedy(goes_on=ROUND)


@works("dry_base", CHAT, COMPLETIONS)
def dry_base(ask: Ask) -> None:
    # The penalty is multiplier * base ** length: next to nothing with 1, prohibitive with 100.
    weak = ask(goes_on=ROUND, dry_multiplier=0.001, dry_base=1).text
    assert weak == ask.greedy(goes_on=ROUND)
    assert ask(goes_on=ROUND, dry_multiplier=0.001, dry_base=100).text != weak


@works("dry_allowed_length", CHAT, COMPLETIONS)
def dry_allowed_length(ask: Ask) -> None:
    long_enough = ask(goes_on=ROUND, dry_multiplier=5, dry_allowed_length=100).text
    assert long_enough == ask.greedy(goes_on=ROUND)


@works("dry_penalty_last_n", CHAT, COMPLETIONS)
def dry_penalty_last_n(ask: Ask) -> None:
    assert ask(goes_on=ROUND, dry_multiplier=5, dry_penalty_last_n=1).text == ask.greedy(
        goes_on=ROUND
    )


@works("dry_sequence_breakers", CHAT, COMPLETIONS)
def dry_sequence_breakers(ask: Ask) -> None:
    words = ask(goes_on=ROUND, dry_multiplier=5, dry_sequence_breakers=["o", "e"]).text
    assert words == ask.greedy(goes_on=ROUND)


@works("xtc_probability", CHAT, COMPLETIONS)
def xtc_probability(ask: Ask) -> None:
    # Of two tokens the likelier one always goes, so nothing is left to chance.
    second = {"temperature": 1, "top_k": 2, "xtc_probability": 1, "xtc_threshold": 0}
    texts = {ask(about=STORY, seed=seed, **second).text for seed in (1, 2)}
    assert len(texts) == 1
    assert texts != {ask.greedy(about=STORY)}


@works("xtc_threshold", CHAT, COMPLETIONS)
def xtc_threshold(ask: Ask) -> None:
    drawn = {"about": STORY, "temperature": 1, "seed": 3}
    assert ask(**drawn, xtc_probability=1, xtc_threshold=0.6).text == ask(**drawn).text


@works("logit_bias", CHAT, COMPLETIONS, RESPONSES)
def logit_bias(ask: Ask) -> None:
    (red,) = ask.tokens(" Red")
    assert ask(logit_bias={str(red): 100}, tokens=3).text == " Red" * 3
