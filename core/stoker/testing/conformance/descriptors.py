"""What every plugin keeps to, whatever it is: its descriptor, its name, its options, its light import."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import importlib_metadata
import msgspec
import pytest

import stoker
from stoker.discovery import HOOKS, Kind, Plugin, PluginListing, load_plugins
from stoker.discovery.contract import register
from stoker.discovery.loading import GROUP
from stoker.errors import PluginError
from stoker.interfaces import Descriptor
from stoker.testing.conformance.base import Conformance, check, fail

__all__ = ["DescriptorConformance"]

_OURS = frozenset({"stoker", "msgspec", "pluggy"})

# Runs in a fresh process: imports what stoker has imported anyway, then the entry module, and prints what
# that brought. A path is loaded as a file is.
_PROBE = """
import importlib, importlib.util, json, sys
import stoker, stoker.interfaces, stoker.hookspecs, msgspec, pluggy
before = set(sys.modules)
target, is_file = sys.argv[1], sys.argv[2] == "file"
if is_file:
    spec = importlib.util.spec_from_file_location("entry_module_under_test", target)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
else:
    importlib.import_module(target)
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


class DescriptorConformance(Conformance):
    """What plugins of every kind are checked for."""

    kind: ClassVar[Kind]

    @pytest.fixture
    def subject(self) -> Any:
        """What is under test; each suite's own fixture."""
        fail(f"{type(self).__name__} has no plugin to test", "Fill in the suite's fixture.")

    def test_descriptor_keeps_the_contract(self, subject: Any) -> None:
        """Stoker would refuse the plugin when it starts.

        To fix: the message says what is wrong with the descriptor: its name (lower-case words joined by
        dashes), its summary, its factory, its options, or ``api_version``.
        """
        hook, _ = HOOKS[self.kind]

        def registers() -> Sequence[Descriptor]:
            return [subject.info]

        registers.__name__ = hook
        module = SimpleNamespace(**{hook: stoker.hookimpl(registers)})
        try:
            register(Plugin(name="conformance", distribution="conformance"), module)
        except PluginError as error:
            fail(str(error), f"Change the {type(subject.info).__name__}.")
        summary = subject.info.summary
        check(
            summary.strip() and "\n" not in summary and len(summary) <= 120,
            f"the summary of {subject.info.name!r} is {summary!r}",
            "Make it one line of at most 120 characters: `stoker plugins` shows it.",
        )

    def test_name_is_unique(self, subject: Any) -> None:
        """Another installed plugin of the same kind has the same name: stoker refuses the later one.

        To fix: choose another name, or uninstall the other distribution.
        """
        found = _registered(self.kind, subject.info.name)
        check(
            len(found) <= 1,
            f"the {self.kind} {subject.info.name!r} is registered by "
            + " and by ".join(f"{row.name!r} ({row.distribution})" for _, row in found),
            "Rename one of them, or uninstall it.",
        )

    def test_options_round_trip(self, subject: Any) -> None:
        """The options cannot be built without a section, or do not survive being written and read.

        To fix: give every option a default and a type that msgspec converts both ways.
        """
        options = _options(subject.info)
        try:
            made = msgspec.convert({}, options)
            again = msgspec.json.decode(msgspec.json.encode(made), type=options)
        except (msgspec.MsgspecError, TypeError) as error:
            fail(
                f"{options.__name__} does not round-trip: {error}",
                "Give every option a default, and types that msgspec can encode and decode.",
            )
        check(
            made == again,
            f"{options.__name__} comes back changed: {made!r} became {again!r}",
            "Leave no work to __post_init__ that does not give the same result twice.",
        )

    def test_unknown_option_is_refused(self, subject: Any) -> None:
        """A misspelt option would be ignored.

        To fix: declare the options as ``class Options(msgspec.Struct, forbid_unknown_fields=True)``.
        """
        options = _options(subject.info)
        check(
            options.__struct_config__.forbid_unknown_fields,
            f"{options.__name__} takes options that it does not have",
            "Declare it with forbid_unknown_fields=True.",
        )

    def test_options_are_documented(self, subject: Any) -> None:
        """An option stands nowhere in the options' docstring.

        To fix: describe each field under ``Attributes:`` in the docstring of the struct.
        """
        options = _options(subject.info)
        documented = inspect.getdoc(options) or ""
        missing = [
            name
            for name in options.__struct_fields__
            if f"{name}:" not in documented.split("\n", 1)[-1]
        ]
        check(
            not missing,
            f"the docstring of {options.__name__} says nothing of {', '.join(missing)}",
            "Add a line `name: what it does.` under `Attributes:` for each.",
        )

    def test_entry_module_is_light(self, subject: Any) -> None:
        """Importing the entry module brings libraries in: every ``stoker --help`` would pay for them.

        To fix: import what is heavy inside the factory; keep the options in a module that needs msgspec
        only. What is light for sure can be named in ``light_modules`` of what the fixture returns.
        """
        module = _entry_module(self.kind, subject)
        is_file = isinstance(module, Path)
        done = subprocess.run(  # noqa: S603 - the interpreter itself, on a module that the test names
            [sys.executable, "-c", _PROBE, str(module), "file" if is_file else "module"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            fail(
                f"{module} cannot be imported in a fresh process: {done.stderr.strip()[-2000:]}",
                "An entry module must be importable with stoker alone, whatever else is missing.",
            )
        own = set() if is_file else {str(module).partition(".")[0]}
        allowed = _OURS | own | subject.light_modules | sys.stdlib_module_names
        heavy = [
            name
            for name in json.loads(done.stdout.splitlines()[-1])
            if name not in allowed and not name.startswith(("_", "entry_module_under_test"))
        ]
        check(
            not heavy,
            f"importing {module} imports {', '.join(heavy)}",
            "Import them in the factory, or name what is light in light_modules.",
        )

    def test_factory_builds_what_it_says(self, subject: Any, build: Callable[[], Any]) -> None:
        """The factory raises, or builds something else than the descriptor registers.

        To fix: the factory takes the options if there are any (and the ``ServerContext`` first, for
        middleware) and returns an instance of the interface's class.
        """
        base: type = {
            "backend": stoker.Backend,
            "policy": stoker.SchedulingPolicy,
            "middleware": stoker.Middleware,
            "observer": stoker.Observer,
        }[self.kind]
        first, second = build(), build()
        check(
            isinstance(first, base),
            f"the factory of {subject.info.name!r} built a {type(first).__name__}",
            f"Derive it from stoker.{base.__name__}: later versions may add methods.",
        )
        check(
            self.kind == "backend" or first is not second,
            f"the factory of {subject.info.name!r} gave the same object twice",
            "Build a new one for each call: models and servers must not share state.",
        )


def _options(info: Descriptor) -> type[msgspec.Struct]:
    if info.options is None:
        pytest.skip(f"{info.name} takes no options")
    return info.options


def _registered(kind: Kind, name: str) -> list[tuple[importlib_metadata.EntryPoint, PluginListing]]:
    """The installed entry points that register a plugin of that kind and name."""
    found = []
    for entry_point in importlib_metadata.entry_points(group=GROUP):
        (row,) = load_plugins([entry_point], [entry_point.name]).listing()
        if name in row.provides.get(kind, ()):
            found.append((entry_point, row))
    return found


def _entry_module(kind: Kind, subject: Any) -> str | Path:
    """The module that an entry point names, or a file if it is not installed."""
    if subject.entry_module is not None:
        given: str | Path = subject.entry_module
        return given
    for entry_point, _ in _registered(kind, subject.info.name):
        return str(entry_point.module)
    name = str(subject.info.factory.__module__)
    check(
        _can_be_imported(name),
        f"{subject.info.name!r} is not installed, and its factory's module {name!r} cannot be imported",
        "Install the plugin (pip install -e .), or give entry_module: the module's name or its file.",
    )
    return name


def _can_be_imported(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (
        ImportError,
        ValueError,
    ):  # no parent, or a module that was made without a specification
        return False
