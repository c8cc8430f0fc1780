"""The service that compiles grammars: each once, off the loop, within a time limit."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stoker.errors import EngineError, InvalidRequestError, UnavailableError
from stoker.grammar import Grammar, GrammarSpec, Matcher
from stoker.interfaces import GrammarCompiler
from stoker.structured import GrammarService


class Plain(Grammar):
    def __init__(self, spec: GrammarSpec) -> None:
        self.spec = spec

    def start(self) -> Matcher:
        raise AssertionError("nobody starts it")


class Compiler(GrammarCompiler):
    """Does what a text says: ``wait`` until released, ``bad``, ``bug``, ``exit``, or compile."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.prepared = 0
        self.release = threading.Event()
        self.threads: set[int] = set()

    def prepare(self) -> None:
        self.prepared += 1

    def compile(self, spec: GrammarSpec) -> Grammar:
        self.compiled.append(spec.text)
        self.threads.add(threading.get_ident())
        word = spec.text.split()[0]
        if word == "wait":
            self.release.wait(30)
        if word == "bad":
            raise InvalidRequestError("bad", param=spec.param)
        if word == "bug":
            raise KeyError("bug")
        if word == "exit":
            raise KeyboardInterrupt
        return Plain(spec)


def regex(text: str) -> GrammarSpec:
    return GrammarSpec(kind="regex", text=text, param="guided_regex")


async def test_each_is_compiled_once_and_kept() -> None:
    compiler = Compiler()
    service = GrammarService(compiler)
    grammars = await asyncio.gather(*(service.get(regex(f"a{i % 3}")) for i in range(30)))
    assert len({id(grammar) for grammar in grammars}) == 3
    assert sorted(compiler.compiled) == ["a0", "a1", "a2"]
    assert compiler.prepared == 1
    assert threading.get_ident() not in compiler.threads
    assert await service.get(regex("a1")) is grammars[1]
    assert service.num_compiled == 3


async def test_the_oldest_goes_first_by_number_and_by_size() -> None:
    compiler = Compiler()
    service = GrammarService(compiler, max_entries=2, max_chars=100)
    for text in ("a", "b", "a", "c", "a", "b", "x" * 99, "a", "y" * 101, "y" * 101):
        await service.get(regex(text))
    assert compiler.compiled == ["a", "b", "c", "b", "x" * 99, "a", "y" * 101]


async def test_who_leaves_takes_nobody_along() -> None:
    compiler = Compiler()
    service = GrammarService(compiler)
    first = asyncio.create_task(service.get(regex("wait")))
    second = asyncio.create_task(service.get(regex("wait")))
    await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    compiler.release.set()
    assert (await second).spec == regex("wait")
    assert compiler.compiled == ["wait"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("bad", InvalidRequestError, "bad"),
        ("bug", KeyError, "bug"),
        ("exit", EngineError, "KeyboardInterrupt"),
    ],
)
async def test_errors_are_those_of_who_asked(
    text: str, error: type[Exception], message: str
) -> None:
    service = GrammarService(Compiler())
    for _ in range(2):
        with pytest.raises(error, match=message):
            await service.get(regex(text))
    assert (await service.get(regex("good"))).spec == regex("good")


@pytest.mark.slow
async def test_what_does_not_come_back_costs_a_thread_and_not_the_server() -> None:
    compiler = Compiler()
    service = GrammarService(compiler, time_limit_s=0.05)
    kept = await service.get(regex("kept"))
    for i in range(4):
        with pytest.raises(InvalidRequestError, match=r"longer than 0.05 s"):
            await service.get(regex(f"wait {i}"))
    assert service.num_stuck == 4
    with pytest.raises(InvalidRequestError, match="simpler"):  # at once: it is not tried again
        await service.get(regex("wait 0"))
    assert compiler.compiled.count("wait 0") == 1
    with pytest.raises(UnavailableError, match="guided_regex"):
        await service.get(regex("other"))
    assert await service.get(regex("kept")) is kept
    compiler.release.set()
    for _ in range(500):
        if not service.num_stuck:
            break
        await asyncio.sleep(0.01)
    assert (await service.get(regex("other"))).spec == regex("other")


async def test_switched_off() -> None:
    with pytest.raises(InvalidRequestError, match="switched off") as caught:
        await GrammarService(None).get(regex("a"))
    assert caught.value.param == "guided_regex"
