"""Untyped settings into structs, with messages a person can act on.

msgspec does the checking; this module turns its paths into dotted names (``$.models[0].lanes`` ->
``models[0].lanes``) and adds the nearest match to unknown names.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from stoker.errors import ConfigError

__all__ = ["check_keys", "decode", "did_you_mean", "struct_fields"]

T = TypeVar("T")

_ERROR = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*)`")
_ENUM = re.compile(r"Invalid enum value (?P<value>.+)")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'port'?"``, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def struct_fields(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The keys that a struct is decoded from, with their types."""
    return {field.encode_name: field.type for field in msgspec.structs.fields(struct)}


def check_keys(raw: Mapping[str, Any], known: Iterable[str], where: str, origin: str = "") -> None:
    """Refuse keys that nobody knows.

    Args:
        raw: A section.
        known: The keys it may have.
        where: Dotted name of the section; empty for the top.
        origin: Where the section was read, for the message.

    Raises:
        ConfigError: Names the key in full and its nearest match.
    """
    names = list(known)
    for key in raw:
        if key not in names:
            dotted = f"{where}.{key}" if where else key
            source = f" (from {origin})" if origin else ""
            hint = did_you_mean(key, names) or _choices(names)
            raise ConfigError(f"{dotted}: unknown setting{source}.{hint}")


def decode(
    raw: Any,
    type_: type[T],
    where: str = "",
    *,
    strict: bool = True,
    origin: str | Callable[[str], str] = "",
) -> T:
    """``raw`` as a ``type_``.

    Args:
        raw: What a TOML file, the environment or a flag said.
        type_: A struct, or the type of one field.
        where: Dotted name of ``raw``.
        strict: Refuse text where a number is wanted; the environment knows only text.
        origin: Where it was read, or a function that tells it for a dotted key.

    Raises:
        ConfigError: Names the key in full, what was expected and where it was read.
    """
    try:
        return msgspec.convert(raw, type_, strict=strict)
    except msgspec.ValidationError as error:
        match = _ERROR.fullmatch(str(error))
        what, path = (match["what"], match["path"] or "") if match else (str(error), "")
        dotted = f"{where}{path}" if where else path.removeprefix(".")
        unknown = _UNKNOWN.fullmatch(what)
        target = _type_at(type_, path)
        if unknown:
            dotted = f"{dotted}.{unknown['key']}" if dotted else unknown["key"]
            known = list(struct_fields(target)) if _is_struct(target) else []
            what = "unknown setting"
            hint = did_you_mean(unknown["key"], known) or _choices(known)
        elif _ENUM.fullmatch(what):
            value = _ENUM.sub(r"\g<value>", what)
            choices = [str(choice) for choice in typing.get_args(target)]
            what = f"{value} is not one of {', '.join(choices)}"
            hint = did_you_mean(value.strip("'"), choices)
        else:
            hint = ""
            what = what.replace("`", "").replace("object", "a table").replace("array", "a list")
            what = what.removeprefix("Object ")  # "missing required field": which one, dotted says
    place = origin if isinstance(origin, str) else origin(dotted)
    source = f" (from {place})" if place else ""
    raise ConfigError(f"{dotted}: {what}{source}{'.' + hint if hint else ''}")


def _choices(names: list[str]) -> str:
    return f" Known: {', '.join(sorted(names))}." if names else ""


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _type_at(type_: Any, path: str) -> Any:
    """The type that msgspec's ``path`` (``.models[0].lanes``) leads to from ``type_``."""
    for name, _index in re.findall(r"\.([^.\[]+)|(\[[^\]]*\])", path):
        type_ = _without_none(type_)
        if name:
            type_ = struct_fields(type_).get(name) if _is_struct(type_) else None
        else:
            arguments = typing.get_args(type_)
            type_ = arguments[-1] if arguments else None
    return _without_none(type_)


def _without_none(type_: Any) -> Any:
    if isinstance(type_, types.UnionType) or typing.get_origin(type_) is typing.Union:
        rest = [choice for choice in typing.get_args(type_) if choice is not type(None)]
        return rest[0] if len(rest) == 1 else type_
    return type_
