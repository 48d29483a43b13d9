"""Convert option values between text and typed values, by the annotation of a field.

An option's type is one of `ByteSize`, `Duration`, `bool`, `int`, `float`, `str`, `Literal[...]`, or one of these
`| None`; the text `none` then means None.
The field's metadata may say more: `help` (one line), `min` and `max` (both inclusive).
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.contract.quantities import (
    LONGEST_S,
    ValueTextError,
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_seconds,
)
from eplb_core.words import did_you_mean

_INTEGER = re.compile(r"-?[0-9]{1,30}", re.ASCII)
_LARGEST_SIZE = 2**63 - 1
_NONE = "none"


@dataclass(frozen=True, slots=True)
class OptionType:
    """The type of one option, read from a field of an options dataclass.

    Attributes:
        key: the option's name.
        kind: `ByteSize`, `Duration`, `bool`, `int`, `float`, `str` or `Literal`.
        choices: what a `Literal` allows; empty for the other kinds.
        optional: whether `none` is a value.
        least: the smallest value, or None.
        most: the largest value, or None.
        help: one line for people.
    """

    key: str
    kind: Any
    choices: tuple[str | int, ...] = ()
    optional: bool = False
    least: float | None = None
    most: float | None = None
    help: str = ""

    def accepts(self) -> str:
        """Describe the accepted values, such as `a size with a unit, such as 64MiB`."""
        if self.kind is Literal:
            words = "one of " + ", ".join(map(str, self.choices))
        else:
            words = {
                ByteSize: "a size with a unit (B, kB, MB, GB, KiB, MiB, GiB), such as 64MiB",
                Duration: "a time with a unit (ms, s, min, h), such as 30s",
                bool: "on or off",
                int: "a whole number",
                float: "a number",
                str: "text",
            }[self.kind]
        bounds = [
            f"{word} {self.format(self._typed(bound))}"
            for word, bound in (("at least", self.least), ("at most", self.most))
            if bound is not None
        ]
        words += "".join(f", {bound}" for bound in bounds)
        return f"{words}, or {_NONE}" if self.optional else words

    def parse(self, text: str) -> object:
        """Return the value that `text` spells.

        Raises:
            ValueTextError: it is not a valid value, or is out of bounds.
        """
        if self.optional and text == _NONE:
            return None
        return self._within_bounds(self._parse_present(text))

    def check(self, value: object) -> object:
        """Return `value`, given as a Python object or as text, as this type.

        Raises:
            ValueTextError: it is of another type, or out of bounds.
        """
        if isinstance(value, str):
            return self.parse(value)
        if value is None and self.optional:
            return None
        if self.kind is Literal:
            suits = any(value == choice and type(value) is type(choice) for choice in self.choices)
        elif self.kind is str:
            suits = False
        elif self.kind is bool:
            suits = isinstance(value, bool)
        elif self.kind in (int, ByteSize):
            suits = isinstance(value, int) and not isinstance(value, bool)
        else:
            suits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not suits:
            raise ValueTextError(f"it is {type(value).__name__} {value!r}")
        if self.kind in (ByteSize, Duration) and typing.cast("float", value) < 0:
            raise ValueTextError("it is negative")
        return self._within_bounds(self._typed(value))

    def format(self, value: object) -> str:
        """Return the canonical text of a value of this type; `parse` reads the same value back."""
        if value is None:
            return _NONE
        if isinstance(value, bool):
            return "on" if value else "off"
        if self.kind is ByteSize:
            return format_bytes(int(typing.cast("int", value)))
        if self.kind is Duration:
            return format_seconds(float(typing.cast("float", value)))
        return str(value)

    def _parse_present(self, text: str) -> object:
        if self.kind is ByteSize:
            return parse_bytes(text)
        if self.kind is Duration:
            return parse_seconds(text)
        if self.kind is bool:
            if text not in ("on", "off"):
                raise ValueTextError("it is neither")
            return text == "on"
        if self.kind is int:
            if not _INTEGER.fullmatch(text):
                raise ValueTextError("it is not a whole number")
            return int(text)
        if self.kind is float:
            return _parse_float(text)
        if self.kind is Literal:
            for choice in self.choices:
                if text == str(choice):
                    return choice
            raise ValueTextError("it is none of these" + did_you_mean(text, map(str, self.choices)))
        if not text:
            raise ValueTextError("it is empty")
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ValueTextError("it is not UTF-8")
        return text

    def _typed(self, value: object) -> object:
        return self.kind(value) if self.kind in (ByteSize, Duration, float) else value

    def _within_bounds(self, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            if self.kind is Duration and value > LONGEST_S:
                raise ValueTextError(f"it is longer than {format_seconds(LONGEST_S)}")
            if self.kind in (ByteSize, int) and value > _LARGEST_SIZE:
                raise ValueTextError("it is too large")
            if self.least is not None and value < self.least:
                raise ValueTextError("it is too small")
            if self.most is not None and value > self.most:
                raise ValueTextError("it is too large")
        return value


def option_types(options_class: type) -> dict[str, OptionType]:
    """Return the type of every option of an options dataclass, by key, in the order of its fields.

    Raises:
        TypeError: it is not a dataclass, or a field has a type that no text spells.
        NameError: an annotation names something that its module does not define.
    """
    if not dataclasses.is_dataclass(options_class):
        raise TypeError(f"{options_class.__qualname__} is not a dataclass")
    annotations = typing.get_type_hints(options_class)
    return {
        field.name: _option_type(field.name, annotations[field.name], field.metadata)
        for field in dataclasses.fields(options_class)
        if field.init
    }


def _option_type(key: str, annotation: Any, metadata: Mapping[str, Any]) -> OptionType:
    optional = False
    if typing.get_origin(annotation) in (Union, types.UnionType):
        present = [part for part in typing.get_args(annotation) if part is not type(None)]
        optional = len(present) < len(typing.get_args(annotation))
        annotation = present[0] if len(present) == 1 else annotation
    choices: tuple[str | int, ...] = ()
    if typing.get_origin(annotation) is Literal:
        annotation, choices = Literal, typing.get_args(annotation)
    if annotation not in (ByteSize, Duration, bool, int, float, str, Literal):
        raise TypeError(f"option {key!r} has the type {annotation!r}, which has no text form")
    return OptionType(
        key, annotation, choices, optional, metadata.get("min"), metadata.get("max"), metadata.get("help", "")
    )


def _parse_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueTextError("it is not a number") from None
    if not math.isfinite(value) or "_" in text or text != text.strip():
        raise ValueTextError("it is not a finite number")
    return value
