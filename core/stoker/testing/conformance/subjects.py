"""What a conformance suite is told about the plugin under test: what its one fixture returns.

This module is light: it imports neither pytest nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.interfaces import BackendInfo, LoadSettings, MiddlewareInfo, ObserverInfo, PolicyInfo
from stoker.types import LocalModel

__all__ = [
    "BackendUnderTest",
    "MiddlewareUnderTest",
    "ObserverUnderTest",
    "PolicyUnderTest",
    "Refusal",
    "Subject",
]

TEXTS = (
    "The three primary colors are red, yellow and blue. When two of them are mixed in equal parts, they give",
    "Once upon a time, a small dog lived in a big house by the sea. Every day it went out, and there",
    "Water boils at one hundred degrees, and it freezes at zero. On the top of a high mountain, however,",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) +",
)
HARD_TEXTS = (
    "",
    "one two  three   four",
    "tab\tand\nline\n\nend",
    " around it \n",
    "naïve café, Grüße, ½ µm",
    "日本語とrussian русский",
    "👩‍👩‍👧 emoji 🎉",
    "x = {'a': [1, 2.5e-3]}  # comment",
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What every suite is told.

    Attributes:
        entry_module: The module that the entry point names, or the file of one that is not installed. By
            default that of the installed entry point which registers the plugin; else the module of its
            factory.
        light_modules: Top-level modules beside stoker's own (msgspec, pluggy) that the entry module may
            import: light ones, that is.
    """

    entry_module: str | Path | None = None
    light_modules: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class BackendUnderTest(Subject):
    """A backend and a model to try it with.

    Small lanes and short contexts keep the suite quick; at least three lanes let it test everything.

    Attributes:
        info: What the plugin's hook returns.
        model: A model that it loads.
        settings: How to load it. Without ``options`` the backend's defaults are used.
        bad_files: Files or folders that must be refused, beside those that the suite makes of the model
            itself: cut short, empty, text, missing.
        texts: At least two texts of 8 tokens or more, which differ early: the prompts.
        hard_texts: Texts that must come back from the tokenizer as they were. Leave out what the vocabulary
            cannot write.
        tolerance: How far logits that should be the same may be apart: the root mean square of the
            difference, in standard deviations of the row. Kernels round differently for different shapes:
            up to 0.08 was seen with 4-bit weights, where a wrong or lost token in KV made 0.3 and more.
        num_tokens: Tokens that are generated where texts are compared.
    """

    info: BackendInfo
    model: LocalModel
    settings: LoadSettings = field(
        default_factory=lambda: LoadSettings(lanes=4, context_length=256, max_step_tokens=128)
    )
    bad_files: Sequence[Path] = ()
    texts: Sequence[str] = TEXTS
    hard_texts: Sequence[str] = HARD_TEXTS
    tolerance: float = 0.1
    num_tokens: int = 8


@dataclass(frozen=True, kw_only=True)
class PolicyUnderTest(Subject):
    """A scheduling policy.

    Attributes:
        info: What the plugin's hook returns.
        options: An instance of ``info.options``; by default one with its defaults.
        max_steps: In how many steps (of 0.1 s each) every sequence must be admitted, whatever else comes.
            A policy whose ageing is slower can be given options that make it quicker.
    """

    info: PolicyInfo
    options: Any = None
    max_steps: int = 3000


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A request that a middleware must refuse, and how a client learns of it.

    Attributes:
        body: The body of ``POST /v1/completions``.
        status: The HTTP status that must come back.
        code: The ``code`` of the error object.
        before: Bodies that are sent first and answered, one after another.
        during: Bodies that are sent before it and still being answered when it comes, as streams.
        config: Sections of the configuration, on top of the middleware's.
    """

    body: Mapping[str, Any]
    status: int
    code: str
    before: Sequence[Mapping[str, Any]] = ()
    during: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MiddlewareUnderTest(Subject):
    """A middleware.

    It runs in a real server inside the test's process, in front of the scripted model, and alone but for
    the suite's own.

    Attributes:
        info: What the plugin's hook returns.
        options: Its section of the configuration, ``[plugins.<name>]``.
        config: Other sections of the configuration, such as ``tenants`` or ``scheduler``. The suite's
            ordinary requests, a few dozen, must pass with it.
        refusals: Requests that it must refuse; empty if it refuses none.
        policies: Policies that ``config`` names, beside ``fcfs``.
    """

    info: MiddlewareInfo
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    refusals: Sequence[Refusal] = ()
    policies: Sequence[PolicyInfo] = ()


@dataclass(frozen=True, kw_only=True)
class ObserverUnderTest(Subject):
    """An observer.

    Attributes:
        info: What the plugin's hook returns.
        options: An instance of ``info.options``; by default one with its defaults.
    """

    info: ObserverInfo
    options: Any = None
