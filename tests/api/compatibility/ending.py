"""Probes of the parameters that say how long an answer is, and how many there are."""

from __future__ import annotations

from api.compatibility.cases import works
from api.compatibility.harness import CHAT, COMPLETIONS, ENDPOINTS, MESSAGES, RESPONSES, Ask
from api.compatibility.sampling import STORY

COUNT = "One, two, three, four,"


@works("max_tokens", CHAT, COMPLETIONS, MESSAGES)
@works("max_output_tokens", RESPONSES)
def max_tokens(ask: Ask) -> None:
    answer = ask(about=STORY, tokens=3)
    assert answer.num_tokens == 3
    assert not answer.ended


@works("max_completion_tokens", CHAT)
def max_completion_tokens(ask: Ask) -> None:
    assert ask(about=STORY, max_tokens=None, max_completion_tokens=3).num_tokens == 3


@works("min_tokens", CHAT, COMPLETIONS)
def min_tokens(ask: Ask) -> None:
    (early,) = ask.tokens("<|im_end|>")
    ends = {"logit_bias": {str(early): 100}}
    assert ask(**ends).num_tokens == 1
    assert ask(**ends, min_tokens=4).num_tokens == 5


@works("ignore_eos", CHAT, COMPLETIONS)
def ignore_eos(ask: Ask) -> None:
    (early,) = ask.tokens("<|im_end|>")
    assert ask(logit_bias={str(early): 100}, ignore_eos=True, tokens=4).num_tokens == 4


@works("stop", CHAT, COMPLETIONS, RESPONSES)
@works("stop_sequences", MESSAGES)
def stop(ask: Ask) -> None:
    name = "stop_sequences" if ask.endpoint is MESSAGES else "stop"
    whole = ask.greedy(about=STORY)
    word = whole.split()[2]
    answer = ask(about=STORY, **{name: [word]})
    assert answer.text == whole[: whole.index(word)]
    assert answer.ended


@works("include_stop_str_in_output", CHAT, COMPLETIONS)
def include_stop(ask: Ask) -> None:
    whole = ask.greedy(about=STORY)
    word = whole.split()[2]
    answer = ask(about=STORY, stop=word, include_stop_str_in_output=True)
    assert answer.text == whole[: whole.index(word) + len(word)]


@works("stop_token_ids", CHAT, COMPLETIONS)
def stop_token_ids(ask: Ask) -> None:
    whole = ask(about=STORY, return_token_ids=True)
    ids = whole.body["choices"][0]["token_ids"]
    answer = ask(about=STORY, stop_token_ids=[ids[2]])
    assert answer.num_tokens == ids.index(ids[2]) + 1
    assert answer.body["choices"][0]["stop_reason"] == ids[2]


@works("n", CHAT, COMPLETIONS)
def n(ask: Ask) -> None:
    answer = ask(about=STORY, n=3, temperature=1, seed=1)
    assert len(set(answer.texts)) == 3
    assert [choice["index"] for choice in answer.body["choices"]] == [0, 1, 2]


@works("best_of", COMPLETIONS)
def best_of(ask: Ask) -> None:
    def mean(choice: dict) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    drawn = {"about": STORY, "temperature": 1, "seed": 1, "logprobs": 0}
    candidates = ask(**drawn, n=3)
    best = ask(**drawn, n=1, best_of=3)
    (choice,) = best.body["choices"]
    assert best.num_tokens == candidates.num_tokens
    likeliest = max(candidates.body["choices"], key=mean)
    assert choice["text"] == likeliest["text"]


@works("echo", COMPLETIONS)
def echo(ask: Ask) -> None:
    assert ask(about=COUNT, echo=True).text == COUNT + ask.greedy(about=COUNT)


@works("stream", *ENDPOINTS)
def stream(ask: Ask) -> None:
    events = ask.stream(about=STORY)
    assert len(events) > 5
    assert ask.streamed_text(events) == ask.greedy(about=STORY)


@works("stream_options", CHAT, COMPLETIONS)
def stream_options(ask: Ask) -> None:
    assert all(event.get("usage") is None for event in ask.stream(tokens=3))
    *_, last = ask.stream(tokens=3, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    events = ask.stream(tokens=3, stream_options={"continuous_usage_stats": True})
    assert all(event["usage"]["prompt_tokens"] for event in events)


@works("timeout", CHAT, COMPLETIONS, RESPONSES)
def timeout(ask: Ask) -> None:
    error = ask.send(about="Count to a million. " * 90, tokens=400, timeout=0.05)
    assert error.status_code == 408, error.text
