"""What plugin authors and stoker's own tests test with.

``ScriptedRuntime`` is a deterministic model that costs nothing; ``EngineHarness`` drives an engine step by
step; ``FakeClock`` is a clock that a test moves; ``FaultyRuntime`` and ``FaultyPolicy`` go wrong on purpose;
``ByteVocabulary`` and ``read_output`` try a tool format's grammar and parser; ``reference_sample`` draws
tokens as a runtime that samples has to. The ``Conformance`` classes are suites to subclass in pytest, which
prove a plugin right (``docs/conformance.md``).
Names are resolved on first use, as in ``stoker`` itself: the bundled plugins name the scripted backend's
options without loading numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stoker.testing.app import AppHarness
    from stoker.testing.clock import FakeClock
    from stoker.testing.conformance.backend import BackendConformance
    from stoker.testing.conformance.middleware import MiddlewareConformance
    from stoker.testing.conformance.observer import ObserverConformance
    from stoker.testing.conformance.policy import PolicyConformance
    from stoker.testing.conformance.subjects import (
        BackendUnderTest,
        MiddlewareUnderTest,
        ObserverUnderTest,
        PolicyUnderTest,
        Refusal,
    )
    from stoker.testing.faults import Fault, FaultyPolicy, FaultyRuntime
    from stoker.testing.harness import EngineHarness, Submitted
    from stoker.testing.outputs import ByteVocabulary, read_output
    from stoker.testing.reference_sampling import reference_sample
    from stoker.testing.scripted import (
        ScriptedBackend,
        ScriptedRuntime,
        ScriptedSource,
        ScriptedTokenizer,
    )
    from stoker.testing.scripted_options import ScriptedOptions

_HOME_OF = {
    "AppHarness": "app",
    "BackendConformance": "conformance.backend",
    "BackendUnderTest": "conformance.subjects",
    "ByteVocabulary": "outputs",
    "EngineHarness": "harness",
    "FakeClock": "clock",
    "Fault": "faults",
    "FaultyPolicy": "faults",
    "FaultyRuntime": "faults",
    "MiddlewareConformance": "conformance.middleware",
    "MiddlewareUnderTest": "conformance.subjects",
    "ObserverConformance": "conformance.observer",
    "ObserverUnderTest": "conformance.subjects",
    "PolicyConformance": "conformance.policy",
    "PolicyUnderTest": "conformance.subjects",
    "Refusal": "conformance.subjects",
    "ScriptedBackend": "scripted",
    "ScriptedOptions": "scripted_options",
    "ScriptedRuntime": "scripted",
    "ScriptedSource": "scripted",
    "ScriptedTokenizer": "scripted",
    "Submitted": "harness",
    "read_output": "outputs",
    "reference_sample": "reference_sampling",
}

__all__ = [
    "AppHarness",
    "BackendConformance",
    "BackendUnderTest",
    "ByteVocabulary",
    "EngineHarness",
    "FakeClock",
    "Fault",
    "FaultyPolicy",
    "FaultyRuntime",
    "MiddlewareConformance",
    "MiddlewareUnderTest",
    "ObserverConformance",
    "ObserverUnderTest",
    "PolicyConformance",
    "PolicyUnderTest",
    "Refusal",
    "ScriptedBackend",
    "ScriptedOptions",
    "ScriptedRuntime",
    "ScriptedSource",
    "ScriptedTokenizer",
    "Submitted",
    "read_output",
    "reference_sample",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'stoker.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"stoker.testing.{home}"), name)
    globals()[name] = value
    return value
