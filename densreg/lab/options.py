"""Options as text: KEY=VALUE, and values of a given type."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def assignments(texts: Iterable[str], option: str, form: str = "OPTION=VALUE") -> Iterator[tuple[str, str, str]]:
    """(text, KEY, VALUE) for each text KEY=VALUE.

    Args:
        option, form: for the message: the option of the command line, and what it takes.

    Raises:
        ValueError: there is no KEY or no "=".
    """
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"{option} {text}: expected {form}")
        yield text, key, value


def parse(text: str, hint: Any) -> Any:
    """A value of a type from its text: bool, int, float, str, sequences separated by commas, and unions of them.

    A float may be a fraction (8/255); None is "none".

    Raises:
        ValueError: the text is no such value.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in inner and text.lower() == "none":
            return None
        for kind in sorted((kind for kind in inner if kind is not type(None)), key=lambda kind: kind is str):
            try:
                return parse(text, kind)
            except ValueError:
                pass
        raise ValueError(text)
    if origin in (tuple, list, Sequence):
        return tuple(parse(part, inner[0]) for part in text.split(",") if part)
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint is float and "/" in text:
        above, below = map(float, text.split("/", 1))
        if below:
            return above / below
    elif hint in (int, float, str):
        return hint(text)
    raise ValueError(text)
