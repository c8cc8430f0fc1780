"""Probes of the parameters that make the prompt."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from api.compatibility.cases import depends, needless, refused, works
from api.compatibility.harness import (
    CHAT,
    COMPLETIONS,
    ENDPOINTS,
    MESSAGES,
    RESPONSES,
    WARNING,
    Answer,
    Ask,
)
from openai_schemas import check

COLORS = "1. Red\n2. Blue\n3. Green"
TOKENS = {"tokens": 14}
NUM_LANES = 4
CONTEXT = 1024


@works("model", *ENDPOINTS)
def model(ask: Ask) -> None:
    assert ask(model="SmolLM2-135M-Instruct", tokens=1).body["model"] == "SmolLM2-135M-Instruct"
    assert ask.refused(404, model="another") == "model"


@works("messages", CHAT, MESSAGES)
def messages(ask: Ask) -> None:
    def said(role: str, content: Any) -> dict[str, Any]:
        return {"role": role, "content": content}

    assert ask(**TOKENS).text == COLORS
    parts = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "colors."}]
    assert ask(messages=[said("user", parts)], **TOKENS).text
    longer = [said("user", "Name three colors."), said("assistant", COLORS), said("user", "More.")]
    assert ask(messages=longer).num_prompt_tokens > ask().num_prompt_tokens + 10
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    if ask.endpoint is MESSAGES:
        source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
        picture = {"type": "image", "source": source}
    assert (ask.refused(messages=[said("user", [picture])]) or "").startswith(
        "messages.0.content.0"
    )
    if ask.endpoint is CHAT:
        developer = ask(messages=[said("developer", "Be brief."), *longer])
        system = ask(messages=[said("system", "Be brief."), *longer])
        assert developer.text == system.text


@works("input", RESPONSES)
def input_of_a_response(ask: Ask) -> None:
    assert ask(**TOKENS).text == COLORS
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Name three colors."}]},
        {"role": "assistant", "content": COLORS},
        {"role": "user", "content": "More."},
    ]
    assert ask(input=turns).num_prompt_tokens > ask().num_prompt_tokens + 10
    picture = {"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "auto"}
    named = ask.refused(input=[{"role": "user", "content": [picture]}])
    assert (named or "").startswith("input.0.content.0")


@works("prompt", COMPLETIONS)
def prompt(ask: Ask) -> None:
    text = "One, two, three, four,"
    assert "five" in ask.greedy(about=text)
    assert ask(prompt=ask.tokens(text)).text == ask.greedy(about=text)
    both = ask(prompt=[text, "Red, green,"])
    assert len(both.texts) == 2
    assert both.text == ask.greedy(about=text)


@works("instructions", RESPONSES)
@works("system", MESSAGES)
def system(ask: Ask) -> None:
    given = {"instructions" if ask.endpoint is RESPONSES else "system": "Answer in one word."}
    chat = Ask(ask.client, CHAT, ask.log)
    turns = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Name three colors."},
    ]
    answer = ask(**given)
    same = chat(messages=turns)
    assert (answer.text, answer.num_prompt_tokens) == (same.text, same.num_prompt_tokens)


@works("add_generation_prompt", CHAT)
def add_generation_prompt(ask: Ask) -> None:
    without = ask(add_generation_prompt=False)
    assert without.num_prompt_tokens < ask(tokens=1).num_prompt_tokens
    assert without.text.startswith("assistant")


@works("continue_final_message", CHAT)
def continue_final_message(ask: Ask) -> None:
    begun = {"role": "assistant", "content": "1. Red\n2."}
    turns = [{"role": "user", "content": "Name three colors."}, begun]
    answer = ask(messages=turns, continue_final_message=True)
    assert answer.text == COLORS.removeprefix("1. Red\n2.")


@works("prediction", CHAT)
def prediction(ask: Ask) -> None:
    answer = ask(prediction={"type": "content", "content": COLORS}, tokens=20)
    assert answer.text == COLORS
    assert answer.body["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0


@works("cache_salt", CHAT, COMPLETIONS, RESPONSES)
def cache_salt(ask: Ask) -> None:
    text = f"{ask.endpoint.name}: a prompt of which there was none like it. " * 8

    def cached(salt: str) -> int:
        return ask(about=text, cache_salt=salt, tokens=1).num_cached_tokens

    assert cached("first") < 64  # what every conversation begins with
    assert cached("second") < 64
    assert cached("first") > 64


@needless("prompt_cache_key", CHAT, COMPLETIONS, RESPONSES)
@needless("cache_control", MESSAGES)
def caching(ask: Ask) -> None:
    name, value = "prompt_cache_key", "mine"
    given: dict[str, Any] = {name: value}
    if ask.endpoint is MESSAGES:
        given = {"cache_control": {"type": "ephemeral"}}
    text = f"{ask.endpoint.name} remembers every prompt that was there. " * 8
    ask(about=text, tokens=1)
    assert ask(about=text, tokens=1, **given).num_cached_tokens > 64


# --------------------------------------------------------------------------- what not every model has


@depends("suffix", COMPLETIONS)
def suffix(ask: Ask) -> None:
    assert ask.refused(suffix="return x") == "suffix"


@depends("chat_template_kwargs", CHAT, RESPONSES)
def chat_template_kwargs(ask: Ask) -> None:
    is_unheard(ask, "documents", chat_template_kwargs={"documents": ["a"]})


@depends("reasoning_effort", CHAT)
def reasoning_effort(ask: Ask) -> None:
    is_unheard(ask, "reasoning_effort", reasoning_effort="high")


@depends("reasoning", RESPONSES)
def reasoning(ask: Ask) -> None:
    is_unheard(ask, "reasoning_effort", reasoning={"effort": "high"})


@depends("thinking", MESSAGES)
def thinking(ask: Ask) -> None:
    is_unheard(ask, "enable_thinking", thinking={"type": "enabled", "budget_tokens": 1024})


def is_unheard(ask: Ask, name: str, **fields: Any) -> None:
    """The header says that the model's template does not ask for it."""
    response = ask.send(tokens=1, **fields)
    assert response.status_code == 200, response.text
    assert f"'{name}' has no effect" in response.headers[WARNING]


# --------------------------------------------------------------------------- responses


def stored(ask: Ask, **fields: Any) -> Answer:
    return ask(store=True, **fields)


@works("store", RESPONSES)
def store(ask: Ask) -> None:
    kept = stored(ask, tokens=2).body
    path = f"/v1/responses/{kept['id']}"
    assert ask.client.get(path).json()["output"] == kept["output"]
    gone = ask(tokens=2).body
    assert ask.client.get(f"/v1/responses/{gone['id']}").status_code == 404


@works("previous_response_id", RESPONSES)
def previous_response_id(ask: Ask) -> None:
    first = stored(ask, **TOKENS)
    then = ask(about="More.", previous_response_id=first.body["id"])
    assert then.num_prompt_tokens > first.num_prompt_tokens + 10
    assert ask.refused(previous_response_id="resp_unknown") == "previous_response_id"


@works("background", RESPONSES)
def background(ask: Ask) -> None:
    response = ask.send(store=True, background=True, **TOKENS)
    body = response.json()
    assert body["status"] in {"queued", "in_progress"}, body
    deadline = time.monotonic() + 60
    while body["status"] in {"queued", "in_progress"}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        body = ask.client.get(f"/v1/responses/{body['id']}").json()
        check("Response", body)
    assert Answer(RESPONSES, body).text == COLORS


@works("truncation", RESPONSES)
def truncation(ask: Ask) -> None:
    turns = [{"role": "user", "content": "word " * 350} for _ in range(3)]
    turns.append({"role": "user", "content": "Name three colors."})
    assert ask.refused(input=turns) == "input"
    response = ask.send(input=turns, truncation="auto", tokens=1)
    assert response.status_code == 200, response.text
    assert WARNING in response.headers  # it says how much was left out
    assert response.json()["usage"]["input_tokens"] < CONTEXT


@needless("max_tool_calls", RESPONSES)
def max_tool_calls(ask: Ask) -> None:
    assert ask(max_tool_calls=2, tokens=1).body["max_tool_calls"] == 2


@refused("conversation", RESPONSES)
def no_conversations(ask: Ask) -> None:
    assert ask.refused(conversation="conv_1") == "conversation"


@refused("prompt", RESPONSES)
def no_prompt_templates(ask: Ask) -> None:
    assert ask.refused(prompt={"id": "pmpt_1"}) == "prompt"


# --------------------------------------------------------------------------- labels and order


@works("metadata", CHAT, COMPLETIONS, RESPONSES)
def metadata(ask: Ask) -> None:
    assert ask(metadata={"job": "7"}, tokens=1).body["metadata"] == {"job": "7"}


@works("user safety_identifier", CHAT, COMPLETIONS, RESPONSES)
@works("metadata", MESSAGES)
def who_asks(ask: Ask) -> None:
    for name in ("user", "safety_identifier", "metadata"):
        if (name == "metadata") != (ask.endpoint is MESSAGES):
            continue
        label = f"somebody-{ask.endpoint.name}-{name}"
        ask(tokens=1, **{name: {"user_id": label} if name == "metadata" else label})
        assert label in logged_users(ask)


def logged_users(ask: Ask) -> set[str]:
    """Who asked, by the access log."""
    lines = [json.loads(line) for line in ask.log.read_text().splitlines() if line.startswith("{")]
    return {line["user"] for line in lines if "user" in line}


@works("service_tier", CHAT, COMPLETIONS, RESPONSES)
def service_tier(ask: Ask) -> None:
    assert ask(service_tier="flex", tokens=1).body["service_tier"] == "flex"
    assert ask.refused(service_tier="gold") == "service_tier"


@needless("service_tier speed", MESSAGES)
def one_tier(ask: Ask) -> None:
    answer = ask(service_tier="standard_only", speed="standard", tokens=1)
    assert answer.body["usage"]["service_tier"] == "standard"
    assert ask.refused(service_tier="gold") == "service_tier"
    assert ask.refused(speed="fast") == "speed"


@works("priority", CHAT, COMPLETIONS, RESPONSES)
def priority(ask: Ask) -> None:
    # All lanes are taken, so that the next requests wait; what waits is taken by its priority.
    chat = Ask(ask.client, CHAT, ask.log)
    finished: list[int] = []

    def wait(value: int) -> None:
        ask(tokens=1, priority=value)
        finished.append(value)

    keeping = {"n": NUM_LANES, "tokens": 30, "ignore_eos": True, "temperature": 1, "stream": True}
    with ask.client.stream("POST", CHAT.path, json=chat.body(**keeping)) as answer:
        lines = answer.iter_lines()
        next(lines)
        threads = [threading.Thread(target=wait, args=(value,)) for value in (5, -5)]
        for at, thread in enumerate(threads):
            thread.start()
            wait_for_queue(ask, at + 1)
        for _ in lines:
            pass
    for thread in threads:
        thread.join()
    assert finished == [-5, 5]


def wait_for_queue(ask: Ask, num_waiting: int) -> None:
    """Until so many sequences wait."""
    deadline = time.monotonic() + 60
    name = "stoker_num_requests_waiting{"
    while True:
        lines = ask.client.get("/metrics").text.splitlines()
        if (
            sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
            >= num_waiting
        ):
            return
        assert time.monotonic() < deadline, "nothing waits"
