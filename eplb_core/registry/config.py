"""Config strings, and a backend's options from config string, environment and arguments.

    config = name [ "@" distribution ] [ "?" key "=" value *( "&" key "=" value ) ]

- A name and a key: lower-case letters, digits and single `_`, starting with a letter. `-` is read as `_`.
- A distribution: as on PyPI; letters, digits, `.`, `_`, `-`, folded as pip folds them (`Acme_EPLB` is `acme-eplb`).
- A value: any printable characters except space, `&` and `%`. All other characters are written as `%` and two
  hexadecimal digits for each byte of their UTF-8 form: `%26` is `&`. A `+` is a plus and `=` needs no escape.

`str(config)` is canonical: folded names, options sorted by key, no unnecessary escape. It parses back to an equal
config. A config string can only name a registered backend: it never imports a path that it spells.

Values come from, in falling precedence: an argument, the config string, the environment
(`EPLB_BACKEND__NIXL__WINDOW` for option `window` of backend `nixl`), the default.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from eplb_core.contract.options import OptionType, option_types
from eplb_core.contract.quantities import ValueTextError
from eplb_core.errors import ConfigError
from eplb_core.registry.names import read_distribution, read_name
from eplb_core.words import did_you_mean

AUTO: Final = "auto"
"""The name for the best backend that works on every rank. No distribution can register it."""

BACKEND_VARIABLE: Final = "EPLB_BACKEND"
"""The environment variable that holds a config string."""

_LONGEST_TEXT = 1000  # characters of a config string
_LONGEST_SHOWN = 60  # of them, in a message about a longer one


@dataclass(frozen=True, slots=True)
class ConfigOption:
    """One `key=value` of a config string, as text.

    Attributes:
        key: the folded key.
        value: the value, without escapes.
        column: 1-based column of the key in the string. Ignored in comparisons.
        value_column: 1-based column of the value.
    """

    key: str
    value: str
    column: int = field(default=0, compare=False)
    value_column: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """A parsed config string; `parse_config` makes it.

    Attributes:
        name: the folded name of the backend.
        distribution: the folded name of the selected distribution, or None.
        options: sorted by key.
        text: the string as written. Ignored in comparisons.
    """

    name: str
    distribution: str | None = None
    options: tuple[ConfigOption, ...] = ()
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        """Return the canonical text."""
        place = f"@{self.distribution}" if self.distribution else ""
        options = "&".join(f"{option.key}={_escape(option.value)}" for option in self.options)
        return f"{self.name}{place}" + (f"?{options}" if options else "")


@dataclass(frozen=True, slots=True)
class ResolvedOptions:
    """The options of one backend, each with its origin.

    Attributes:
        config: the config that they were resolved for.
        values: an instance of the backend's options dataclass.
        origins: key -> `argument`, `config string`, `environment EPLB_BACKEND__...` or `default`.
        types: key -> type, in the order of the dataclass's fields.
    """

    config: BackendConfig
    values: Any
    origins: Mapping[str, str]
    types: Mapping[str, OptionType]

    def text(self, key: str) -> str:
        """Return the canonical text of one value."""
        return self.types[key].format(getattr(self.values, key))

    def canonical(self) -> str:
        """Return the shortest config string with the same values: only those that differ from their defaults."""
        defaults = _defaults(type(self.values))
        options = tuple(
            ConfigOption(key, self.text(key))
            for key in sorted(self.types)
            if key not in defaults or defaults[key] != getattr(self.values, key)
        )
        return str(dataclasses.replace(self.config, options=options))

    def digest(self) -> str:
        """Return a hash of all values, equal on two ranks only if every option is; 64 hexadecimal digits."""
        import hashlib

        lines = "\n".join(f"{key}={_escape(self.text(key))}" for key in sorted(self.types))
        return hashlib.sha256(lines.encode()).hexdigest()


def parse_config(text: str, *, kind: str = "backend") -> BackendConfig:
    """Parse a config string.

    Args:
        text: the string.
        kind: what the string names, for messages.

    Raises:
        ConfigError: it is malformed; `column` is that of the first wrong character.
    """
    if not isinstance(text, str):
        raise ConfigError(f"a config string is text, not {type(text).__name__}")
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(
            f"the config string has {len(text)} characters, but at most {_LONGEST_TEXT} are allowed",
            text=text[:_LONGEST_SHOWN] + "...",
        )
    surrogate = next((place for place, sign in enumerate(text) if "\ud800" <= sign <= "\udfff"), None)
    if surrogate is not None:  # bytes that the operating system could not decode; they cannot be printed either
        readable = text.encode("utf-8", "backslashreplace").decode()
        raise ConfigError("the config string is not UTF-8", text=readable, column=surrogate + 1)
    head, question, tail = text.partition("?")
    written, at, place = head.partition("@")
    name = read_name(written, text, 1, f"the name of the {kind}")
    distribution = read_distribution(place, text, len(written) + 2) if at else None
    options = _parse_options(tail, text, len(head) + 2) if question else []
    return BackendConfig(name, distribution, tuple(sorted(options, key=lambda option: option.key)), text)


def backend_from_environment(argument: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the config string to use: the argument, else `EPLB_BACKEND`, else None.

    An empty variable counts as not set.
    """
    return argument if argument is not None else environment.get(BACKEND_VARIABLE) or None


def resolve_options(
    config: BackendConfig,
    options_class: type,
    *,
    environment: Mapping[str, str] = os.environ,
    arguments: Mapping[str, object] | None = None,
    kind: str = "backend",
) -> ResolvedOptions:
    """Resolve the value of every option of a backend, or of anything else that config strings name.

    Args:
        config: the parsed config string.
        options_class: the backend's frozen options dataclass.
        environment: the environment variables. An empty variable counts as not set.
        arguments: key -> typed value, or its text; they win over everything else.
        kind: what the string names, for messages and environment variables (`EPLB_BACKEND__...`).

    Raises:
        ConfigError: an unknown key from any source, or an invalid value.
        TypeError, NameError: the options class itself is at fault.
    """
    types = option_types(options_class)
    values: dict[str, object] = {}
    origins = dict.fromkeys(types, "default")

    prefix = f"EPLB_{kind.upper()}__{config.name.upper()}__"
    for variable in sorted(name for name in environment if name.startswith(prefix)):
        text = environment[variable]
        key = variable.removeprefix(prefix).lower()
        if not text:
            continue
        if key not in types:
            raise _unknown_option(config, key, types, kind, where=f"environment variable {variable}")
        values[key] = _convert(types[key], text, where=f"environment variable {variable}")
        origins[key] = f"environment {variable}"

    for option in config.options:
        if option.key not in types:
            raise _unknown_option(
                config, option.key, types, kind, text=config.text or None, column=option.column or None
            )
        values[option.key] = _convert(
            types[option.key], option.value, text=config.text or None, column=option.value_column or None
        )
        origins[option.key] = "config string"

    for key, value in (arguments or {}).items():
        if key not in types:
            raise _unknown_option(config, key, types, kind, where="argument")
        values[key] = _convert(types[key], value, where="argument")
        origins[key] = "argument"

    missing = sorted(set(types) - set(values) - set(_defaults(options_class)))
    if missing:
        raise ConfigError(
            f"{kind} {config.name!r} needs the option {missing[0]!r}",
            remedy=f"write {config.name}?{missing[0]}=..., {types[missing[0]].accepts()}",
        )
    try:
        return ResolvedOptions(config, options_class(**values), origins, types)
    except ValueError as error:
        # The class itself checks combinations of options.
        raise ConfigError(
            f"the options of {kind} {config.name!r} conflict", text=config.text or None, why=str(error)
        ) from error


# --- the grammar -----------------------------------------------------------------------------------------------------


def _parse_options(tail: str, text: str, column: int) -> list[ConfigOption]:
    """Parse the options after `?`; `column` is where they start in `text`."""
    if not tail:
        raise ConfigError("an option is missing after '?'", text=text, column=column)
    options: dict[str, ConfigOption] = {}
    for part in tail.split("&"):
        if not part:
            raise ConfigError("an option is missing next to '&'", text=text, column=column)
        written, equals, value = part.partition("=")
        key = read_name(written, text, column, "the key of an option")
        if not equals:
            raise ConfigError(
                f"option {key!r} has no value",
                text=text,
                column=column + len(part),
                remedy=f"write {key}=...",
            )
        if key in options:
            first = options[key].column
            raise ConfigError(
                f"option {key!r} is given twice", text=text, column=column, why=f"first at column {first}"
            )
        value_column = column + len(written) + 1
        if not value:
            raise ConfigError(f"option {key!r} has an empty value", text=text, column=value_column)
        options[key] = ConfigOption(key, _unescape(value, text, value_column), column, value_column)
        column += len(part) + 1
    return list(options.values())


def _unescape(value: str, text: str, column: int) -> str:
    """Return a value without escapes; `column` is where it starts in `text`."""
    for offset, sign in enumerate(value):
        if sign == " " or not sign.isprintable():
            code = "".join(f"%{byte:02X}" for byte in sign.encode("utf-8", "replace"))
            raise ConfigError(
                f"{sign!r} is not allowed in a value", text=text, column=column + offset, remedy=f"write {code}"
            )
    decoded = bytearray()
    offset = 0
    while offset < len(value):
        if value[offset] != "%":
            decoded += value[offset].encode()
            offset += 1
            continue
        digits = value[offset + 1 : offset + 3]
        if not re.fullmatch(r"[0-9A-Fa-f]{2}", digits, re.ASCII):
            raise ConfigError(
                "'%' is not followed by two hexadecimal digits",
                text=text,
                column=column + offset,
                remedy="write %25 for a percent sign",
            )
        decoded.append(int(digits, 16))
        offset += 3
    try:
        return decoded.decode()
    except UnicodeDecodeError as error:
        raise ConfigError("the escapes are not UTF-8", text=text, column=column, why=error.reason) from None


def _escape(value: str) -> str:
    return "".join(
        sign if sign.isprintable() and sign not in " &%" else "".join(f"%{byte:02X}" for byte in sign.encode())
        for sign in value
    )


# --- resolving -------------------------------------------------------------------------------------------------------


def _convert(kind: OptionType, value: object, **place: Any) -> object:
    try:
        return kind.check(value)
    except ValueTextError as error:
        written = value if isinstance(value, str) else repr(value)
        raise ConfigError(
            f"option {kind.key!r} cannot be {written!r}" if isinstance(value, str) else f"option {kind.key!r} is wrong",
            **place,
            why=str(error),
            remedy=f"{kind.key} is {kind.accepts()}",
        ) from None


def _unknown_option(
    config: BackendConfig, key: str, types: Mapping[str, OptionType], kind: str, **place: Any
) -> ConfigError:
    known = ", ".join(sorted(types)) or "none"
    return ConfigError(
        f"{kind} {config.name!r} has no option {key!r}{did_you_mean(key, types)}",
        **place,
        remedy=f"its options are: {known}",
    )


def _defaults(options_class: type) -> dict[str, object]:
    """Return the default of every field that has one."""
    defaults: dict[str, object] = {}
    for each in dataclasses.fields(options_class):
        if each.default is not dataclasses.MISSING:
            defaults[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            defaults[each.name] = each.default_factory()
    return defaults
