"""Templates of strangers: whatever one does, it ends, in bounded memory, with an error that says so."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stoker import InvalidRequestError, ModelError, SamplingParams
from stoker.calls import Call, RoutedModel
from stoker.chat_template import ChatTemplate
from stoker.conversation import read_conversation
from stoker.template_meter import FULL, QUICK, Allowance, Meter, TemplateLimitError
from stoker.testing import ScriptedTokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
]
R = "range(100000)"
BRIEF = FULL._replace(seconds=0.5)


def render(source: str, messages: list[dict[str, Any]] | None = None, **settings: Any) -> str:
    template = ChatTemplate(source, ScriptedTokenizer(), bos_token="<s>")
    return template.render(MESSAGES if messages is None else messages, **settings)


DOUBLE = "{% set x = x + x %}" * 40
HOSTILE = {
    "nested loops": f"{{% for a in {R} %}}{{% for b in {R} %}}{{% endfor %}}{{% endfor %}}",
    "a loop that writes": f"{{% for a in {R} %}}{'x' * 1000}{{% endfor %}}",
    "a range beyond the sandbox's": "{% for a in range(10**9) %}{% endfor %}",
    "repeated text": "{{ 'a' * 10**9 }}",
    "repeated text, other way round": "{{ 10**9 * 'a' }}",
    "a repeated list": "{% set x = [0] * 10**9 %}",
    "doubled text": "{% set x = 'ab' %}" + DOUBLE + "{{ x }}",
    "doubled lists": "{% set x = [1] %}" + DOUBLE,
    "concatenated text": "{% set x = 'ab' %}" + "{% set x = x ~ x ~ x %}" * 40,
    "a captured block": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "a captured block of literal text": (
        f"{{% set x %}}{{% for a in {R} %}}{'y' * 10_000}{{% endfor %}}{{% endset %}}"
    ),
    "lists that hold themselves twice": "{% set x = [1] %}"
    + "{% set x = [x, x] %}" * 60
    + "{{ x }}",
    "as text": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{% set y = '' ~ x %}",
    "as JSON": "{% set x = [1] %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x | tojson }}",
    "compared": (
        "{% set x = [1] %}{% set y = [1] %}"
        + "{% set x = [x, x] %}{% set y = [y, y] %}" * 60
        + "{{ x == y }}"
    ),
    "compared by a test": (
        "{% set x = [1] %}{% set y = [1] %}"
        + "{% set x = [x, x] %}{% set y = [y, y] %}" * 60
        + "{{ x is eq y }}"
    ),
    "searched": (
        "{% set x = [1] %}{% set y = [1] %}"
        + "{% set x = [x, x] %}{% set y = [y, y] %}" * 60
        + "{{ x in [y] }}"
    ),
    "for keys": (
        "{% set x = (1,) %}" + "{% set x = (x, x) %}" * 60 + "{% set y = {'a': 1}[x] %}{{ y }}"
    ),
    "a view of them": "{% set x = {} %}"
    + "{% set x = {1: x.items(), 2: x.items()} %}" * 60
    + "{{ x }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "recursive loops": (
        "{% for x in [0, 1] recursive %}{% if loop.depth < 60 %}{{ loop([0, 1]) }}{% endif %}"
        "{% endfor %}"
    ),
    "a wide filter": "{{ 'a' | center(10**9) }}",
    "many wide filters": f"{{{{ {R} | map('center', 100000) | list | length }}}}",
    "a wide method": "{{ 'a'.center(10**9) }}",
    "other wide methods": "{{ 'a'.ljust(10**9) }}{{ '1'.zfill(10**9) }}{{ '\t'.expandtabs(10**9) }}",
    "a wide indent": "{{ ('a\n' * 1000) | indent(10**9) }}",
    "a wide indent of JSON": "{{ [1] | tojson(indent=10**9) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a format's star": "{{ '%*d' % (10**9, 1) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "a method's format": "{{ '{:1000000000}'.format(1) }}",
    "a nested format": "{{ '{:{w}}'.format(1, w='1000000000') }}",
    "a format of many": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "replacements": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "the filter replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "the filter join": f"{{{{ {R} | list | join('b' * 100000) }}}}",
    "the method join": "{{ ('b' * 100000).join(['a'] * 100000) }}",
    "batches": "{{ [1] | batch(10**9, 0) | list }}",
    "slices": "{{ [1] | slice(10**9, 0) | list }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "numbers": "{% set x = 9 %}" + "{% set x = x * x %}" * 60,
    "bytes of numbers": "{{ (1).to_bytes(10**9, 'big') }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "a list of sums": f"{{{{ ([[1]] * 100000) | sum(start=[]) }}}}{R}",
    "dates": "{{ strftime_now('%999999999d') }}",
    "namespaces": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    ),
    "nested namespaces": (
        "{% set n = namespace(a=1) %}"
        + "{% set n = namespace(a=n, b=n) %}" * 60
        + "{{ 1 // 0 }}{{ n }}"
    ),
    "deep lists": (
        "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}"
        "{{ n.x }}"
    ),
    "copies": f"{{% set x = {R} | list %}}{{% for a in x %}}{{% set y = x[1:] %}}{{% endfor %}}",
    "cartesian maps": (
        f"{{{{ {R} | map('string') | list | sort | unique | list | tojson | length }}}}" * 200
    ),
}


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """A template that gets around the bounds fails here, instead of taking the machine along."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(60)
def test_a_hostile_template_is_refused(name: str) -> None:
    with pytest.raises((InvalidRequestError, ModelError, TemplateLimitError)) as refused:
        render(HOSTILE[name], allowance=BRIEF)
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{% for x in y %}" * 50 + "{% endfor %}" * 50,
        "{{ x | urlize }}",
        "x" * 1_000_001,
        "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    ],
    ids=["parentheses", "conditions", "loops", "a filter that is not there", "length", "lists"],
)
def test_a_template_that_cannot_be_compiled_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(source, ScriptedTokenizer())


def test_compiling_runs_nothing() -> None:
    for source in ("{{ 'a' * 10**9 }}", "{{ 'a' | center(10**9) }}", "{{ raise_exception('x') }}"):
        ChatTemplate(source, ScriptedTokenizer())


HONEST = [
    (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m.role }}{% endfor %}",
        "1/2user2/2assistant",
    ),
    (
        (
            "{% for m in messages %}{{ ',' if not loop.first }}{{ m.content }}"
            "{{ '.' if loop.last }}{% endfor %}"
        ),
        "one two,three.",
    ),
    ("{% for m in messages if m.role == 'user' %}{{ m.content | upper }}{% endfor %}", "ONE TWO"),
    ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
    ("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}", "three"),
    ("{{ messages[0].content[:3] ~ '-' ~ 5 ~ none }}", "one-5None"),
    (
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
            "{% endfor %}{{ ns.n }}"
        ),
        "2",
    ),
    (
        (
            "{{ messages | selectattr('role', 'equalto', 'user')"
            " | map(attribute='content') | join(',') }}"
        ),
        "one two",
    ),
    (
        "{{ {'b': [1, 2.5, none, true], 'a': 'é'} | tojson }}",
        '{"b": [1, 2.5, null, true], "a": "é"}',
    ),
    ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
    ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
    ("{{ 'a b'.split(' ')[1] }}{{ ' x '.strip() }}{{ 'x'.startswith('x') }}", "bxTrue"),
    (
        "{{ '%s=%d' % ('a', 3) }}{{ '{}-{:02d}'.format('a', 3) }}{{ '%s' | format('b') }}",
        "a=3a-03b",
    ),
    ("{{ '-' * 3 }}{{ [1] + [2] }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ 7 // 2 }}", "---[1, 2]833"),
    ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}{{ m('a') }}", "<1><a>"),
    ("{% set x %}a{{ 1 }}{% endset %}{{ x | trim }}", "a1"),
    (
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "123",
    ),
    ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
    ("{% for x in range(5) %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}", "012"),
    (
        "{{ 'x' if 'one' in messages[0].content else 'y' }}{{ 'user' in messages[0].values() }}",
        "xTrue",
    ),
    ("{{ bos_token }}{{ undefined_name }}{{ messages[9] }}{{ missing is defined }}", "<s>False"),
    (
        (
            "{% for m in messages %}{{ loop.previtem.role if loop.previtem }}"
            "{{ loop.cycle('a', 'b') }}{% endfor %}"
        ),
        "auserb",
    ),
    ("{{ 'a\nb' | indent(2) }}{{ 'x' | center(5) }}{{ [3, 1, 2] | sort }}", "a\n  b  x  [1, 2, 3]"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("{{ 3000000 | default(1) }}{{ 5000000 is gt 4000000 }}", "3000000True"),
]


@pytest.mark.parametrize(("source", "expected"), HONEST, ids=range(len(HONEST)))
def test_what_templates_do_works_as_before(source: str, expected: str) -> None:
    assert render(source) == expected


def test_long_conversations_are_no_hostility() -> None:
    messages = [
        {"role": role, "content": f"{i} {'text ' * 40}"}
        for i in range(1500)
        for role in ("user", "assistant")
    ]
    source = (
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 %}{% endif %}"
        "<|{{ m.role }}|>{{ m.content | trim }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    )
    assert len(render(source, messages)) > 600_000


def model(source: str) -> RoutedModel:
    tokenizer = ScriptedTokenizer()
    routed = SimpleNamespace(
        template=ChatTemplate(source, tokenizer),
        tool_format=None,
        reasoning=None,
        thoughts=None,
        client=SimpleNamespace(
            tokenizer=tokenizer,
            info=SimpleNamespace(capabilities=SimpleNamespace(generates=True)),
        ),
        constrains=False,
    )
    return cast(RoutedModel, routed)


def call() -> Call:
    return Call(request_id="r", model="m", sampling=SamplingParams(), messages=MESSAGES)


async def test_what_is_quick_is_rendered_at_once_and_the_rest_elsewhere() -> None:
    threads: list[str] = []

    class Spied(ChatTemplate):
        def prompt(self, *args: Any, **kwargs: Any) -> Any:
            threads.append(threading.current_thread().name)
            return super().prompt(*args, **kwargs)

    routed = model("{{ messages[0].content }}")
    routed.template.__class__ = Spied
    await read_conversation(routed, call())
    assert threads == [threading.current_thread().name]
    threads.clear()
    routed = model(f"{{% for a in {R} %}}{{% endfor %}}done")
    routed.template.__class__ = Spied
    conversation = await read_conversation(routed, call())
    assert bytes(conversation.token_ids) == b"done"
    assert len(set(threads)) == 2


@pytest.mark.slow
async def test_a_hostile_template_does_not_hold_up_the_event_loop() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with pytest.raises(InvalidRequestError, match="more than a template may"):
        await read_conversation(model(HOSTILE["nested loops"]), call())
    ticking.cancel()
    assert ticks > 3


def test_a_meter_counts_what_it_is_told_and_what_lists_weigh() -> None:
    meter = Meter(Allowance(5, 100, 60.0, 0))
    meter.step(5)
    with pytest.raises(TemplateLimitError, match="steps"):
        meter.step()
    with pytest.raises(TemplateLimitError, match="text"):
        meter.make(101)
    meter = Meter(Allowance(5, 100, -1.0, 0))
    with pytest.raises(TemplateLimitError, match="too long"):
        meter.step()
    twice: Any = ["x" * 50]
    for _ in range(200):
        twice = [twice, twice]
    with pytest.raises(TemplateLimitError, match="too large"):
        Meter(FULL).weight(twice)
    with pytest.raises(TemplateLimitError):
        Meter(QUICK, ["x" * 2_000_000])
    meter = Meter(FULL)
    assert meter.weight("abc") < meter.weight(["abc", 1]) < meter.weight({"abc": ["abc", 1]})
