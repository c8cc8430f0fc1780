"""A Jinja environment for templates of strangers: no way out, and bounds on time and memory.

Jinja's sandbox keeps a template from Python's internals, but not from looping for hours or from writing
``'a' * 10**9``. Here everything that can make much of little is counted before it happens: iterations, calls,
filters, operators, concatenation and output, and the sizes that they are told. What cannot be bounded so, and
no chat template needs, is not there. Whatever is not counted takes time that is bounded by what is, and at
every step the clock is looked at.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from types import GeneratorType
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from stoker.template_meter import METER, TemplateLimitError

__all__ = ["MeteredEnvironment"]

_MAX_NUMBER = 1_000_000  # that a method or filter may be told: a width, a count
_MAX_INTEGER = 2**64
_LONG_FORMAT = re.compile(r"\d{4,}|\*|:[^}]*\{")  # widths that are long, or come from elsewhere
_WITHOUT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_WITHOUT_METHODS = frozenset({"from_bytes", "maketrans", "striptags", "to_bytes", "translate"})
_WRITING = frozenset({"format", "join", "replace", "string", "tojson"})
_SIZED = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate"})


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Renders on the account of ``template_meter.METER``, which has to be set."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            optimized=False,  # or templates would run while they compile
            finalize=_write,
        )
        for name in _WITHOUT_FILTERS:
            del self.filters[name]
        for table in (self.filters, self.tests):
            for name, function in list(table.items()):
                table[name] = _metered(name, cast("Callable[..., Any]", function))
        self.filters |= {"_each": _each, "_concat": _concat, "_made": _made, "_weighed": _weighed}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Offer one more filter."""
        self.filters[name] = _metered(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = Parser(self, source, name, filename).parse()
        return cast("nodes.Template", _instrumented(template))

    def concat(self, parts: Iterable[str]) -> str:
        """What Jinja puts outputs together with: of a macro, a block, or the whole template."""
        meter = METER.get()
        whole: list[str] = []
        for part in parts:
            meter.step()
            meter.make(len(part))
            whole.append(part)
        return "".join(whole)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method, a macro or a function."""
        meter = METER.get()
        meter.step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            _check_numbers((*args, *kwargs.values()))
        if isinstance(owner, str | bytes):
            meter.make(_text_size(getattr(function, "__name__", ""), owner, args))
        return _counted(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Not what makes much of little."""
        return attr not in _WITHOUT_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, but for long widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__
        _check_format(text)
        num_fields = text.count("{")

        def bounded(*args: Any, **kwargs: Any) -> str:
            meter = METER.get()
            meter.step(num_fields)
            given = sum(map(meter.weight, (*args, *kwargs.values())))
            meter.make(len(text) + num_fields * given)
            return wrapped(*args, **kwargs)

        return bounded

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item; finding one by a tuple looks at all that is in that."""
        if isinstance(argument, tuple):
            METER.get().weight(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, once it is known what comes of it."""
        meter = METER.get()
        meter.step()
        if operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left)
            meter.make(len(left) + meter.weight(right))
        elif operator == "*":
            meter.make(_product_size(left, right))
        elif isinstance(left, Sequence) and isinstance(right, Sequence):
            meter.make(len(left) + len(right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) > _MAX_INTEGER:
            raise TemplateLimitError("its numbers are too large")
        return result


class _Namespace(Namespace):
    """A namespace whose text is short: those that hold others twice would look endless."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """``{% generation %}``: what training marks as the model's own; here it is just there."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The content of the block."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


# --------------------------------------------------------------------------- the template's code


def _instrumented(template: nodes.Template) -> nodes.Node:
    """The template with everything counted that Jinja compiles to plain Python."""
    for loop in template.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, "_each")
    for comparison in template.find_all(nodes.Compare):
        sides = [comparison.expr, *(operand.expr for operand in comparison.ops)]
        if sum(not isinstance(side, nodes.Const) for side in sides) > 1:
            comparison.expr = _filtered(comparison.expr, "_weighed")
            for operand in comparison.ops:
                operand.expr = _filtered(operand.expr, "_weighed")
    return _rewritten(template)


def _rewritten(node: nodes.Node) -> nodes.Node:
    """A tree with filters around slices and in place of ``~``; changed in place, but for its root."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, field, _rewritten(value))
        elif isinstance(value, list):
            value[:] = [_rewritten(v) if isinstance(v, nodes.Node) else v for v in value]
    if isinstance(node, nodes.Concat):
        items = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filtered(items, "_concat")
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _filtered(node, "_made")
    return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    value = cast("nodes.Expr", node)
    return nodes.Filter(
        value, name, [], [], None, None, lineno=node.lineno, environment=node.environment
    )


def _each(items: Any) -> Any:
    return METER.get().each(items)


def _weighed(value: Any) -> Any:
    METER.get().weight(value)
    return value


def _made(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple):
        METER.get().make(len(value))
    return value


def _concat(items: Sequence[Any]) -> str:
    meter = METER.get()
    meter.step(len(items))
    meter.make(sum(map(meter.weight, items)))
    return "".join(map(str, items))


@pass_context  # so that Jinja does not call it while it compiles
def _write(_: Context, value: Any) -> Any:
    meter = METER.get()
    meter.step()
    if not isinstance(value, str):
        meter.make(meter.weight(value))
    return value


# --------------------------------------------------------------------------- sizes


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that counts."""
    skip = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.step()
        given = (*args[skip:], *kwargs.values())
        weights = [meter.weight(value) for value in given]
        if name in _SIZED:
            _check_numbers(given[1:])
        if name in _WRITING:
            meter.make(sum(weights))
        meter.make(_filter_size(name, given, weights))
        return _counted(function(*args, **kwargs))

    return metered


def _counted(result: Any) -> Any:
    """What came of it, counted."""
    meter = METER.get()
    if isinstance(result, GeneratorType):
        return meter.each(result)
    if isinstance(result, str | bytes | list | tuple | dict | range):
        meter.make(len(result))
    elif isinstance(result, int) and abs(result) > _MAX_INTEGER:
        raise TemplateLimitError("its numbers are too large")
    return result


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise TemplateLimitError(f"it uses the number {_MAX_NUMBER:,} or more as a size")


def _check_format(text: str | bytes) -> None:
    found = _LONG_FORMAT.search(text if isinstance(text, str) else text.decode("latin-1"))
    if found is not None:
        raise SecurityError(f"formats with {found.group()[:10]!r} are not allowed in templates")


def _check_power(base: Any, exponent: Any) -> None:
    for number, limit in ((base, 2**32), (exponent, 64)):
        if not isinstance(number, int | float) or abs(number) > limit:
            raise TemplateLimitError("its numbers are too large")


def _product_size(left: Any, right: Any) -> int:
    for items, number in ((left, right), (right, left)):
        if isinstance(items, str | bytes | list | tuple) and isinstance(number, int):
            return len(items) * max(0, number)
    return 0


def _filter_size(name: str, given: Sequence[Any], weights: Sequence[int]) -> int:
    """At most how many characters or items a filter makes beyond those that it is given."""
    if not given:
        return 0
    if name == "sum":
        _check_sum(given)
    if name == "format":
        _check_format(str(given[0]))
    numbers = [value for value in given[1:] if isinstance(value, int)]
    largest = max((abs(number) for number in numbers), default=0)
    if name in {"center", "batch", "slice"}:
        return largest
    if name == "indent":
        width = max([largest or 4, *weights[1:]])
        return width * (str(given[0]).count("\n") + 1)
    if name == "tojson" and len(given) > 1:
        return weights[0] * max(largest, *weights[1:])
    if name == "join" and len(given) > 1 and hasattr(given[0], "__len__"):
        return len(given[0]) * weights[1]
    if name == "replace" and len(given) > 2:
        return _replaced_size(str(given[0]), str(given[1]), str(given[2]))
    return 0


def _check_sum(given: Sequence[Any]) -> None:
    if any(isinstance(start, list | tuple) for start in given[1:]):
        raise SecurityError("the filter 'sum' is for numbers only")


def _text_size(method: str, owner: str | bytes, args: Sequence[Any]) -> int:
    """At most how many characters a method of a text makes."""
    numbers = [value for value in args if isinstance(value, int)]
    if method in {"center", "ljust", "rjust", "zfill"}:
        return max([len(owner), *numbers])
    if method == "expandtabs":
        return len(owner) * max([8, *numbers])
    if method == "replace" and len(args) > 1:
        return _replaced_size(owner, args[0], args[1])
    if method == "join" and args:
        meter = METER.get()
        number = len(args[0]) if hasattr(args[0], "__len__") else 0
        return meter.weight(args[0]) + len(owner) * number
    return len(owner)


def _replaced_size(text: Any, old: Any, new: Any) -> int:
    try:
        return len(text) + text.count(old) * len(new)  # type: ignore[no-any-return]
    except TypeError:
        return 0  # whoever replaces will say what is wrong
