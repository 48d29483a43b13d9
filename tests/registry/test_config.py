"""Config strings and the options that come out of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.contract.option_types import ByteSize, CommonOptions, Duration
from eplb_core.contract.options import option_types
from eplb_core.errors import ConfigError
from eplb_core.registry.config import (
    BackendConfig,
    ConfigOption,
    backend_from_environment,
    parse_config,
    resolve_options,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RailOptions(CommonOptions):
    window: ByteSize = field(
        default=ByteSize(256 * 1024**2), metadata={"help": "staging memory", "min": 4096, "max": 2**40}
    )
    rails: int = field(default=2, metadata={"min": 1, "max": 8})
    ratio: float = 0.5
    pin_memory: bool = True
    mode: Literal["auto", "packed", "direct"] = "auto"
    fabric: str = "ib0"
    cap: ByteSize | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.mode == "direct" and self.rails == 7:
            raise ValueError("direct does not work with 7 rails")


DURATIONS = st.just(0.0) | st.floats(1e-6, 14 * 24 * 3600.0)
"""Seconds that an option takes: from none at all to two weeks."""


def resolve(text: str, environment: dict[str, str] | None = None, arguments: dict[str, object] | None = None):
    return resolve_options(parse_config(text), RailOptions, environment=environment or {}, arguments=arguments)


# --- the grammar -----------------------------------------------------------------------------------------------------


def test_a_name_alone_is_a_config():
    assert parse_config("nixl") == BackendConfig("nixl")


def test_a_config_has_a_name_a_distribution_and_options():
    config = parse_config("acme@Acme_EPLB?rails=4&window=1GiB")
    assert config == BackendConfig("acme", "acme-eplb", (ConfigOption("rails", "4"), ConfigOption("window", "1GiB")))


def test_auto_is_a_name_like_any_other():
    assert parse_config("auto?timeout=5s").name == "auto"


def test_hyphens_fold_to_underscores_in_names_and_keys():
    assert str(parse_config("torch-gloo?pin-memory=off")) == "torch_gloo?pin_memory=off"


def test_canonical_text_sorts_the_options():
    assert str(parse_config("nixl?window=1MiB&mode=packed")) == "nixl?mode=packed&window=1MiB"


def test_options_know_their_columns_in_the_text_as_written():
    options = parse_config("nixl?window=1MiB&mode=packed").options
    assert [(option.key, option.column, option.value_column) for option in options] == [
        ("mode", 18, 23),
        ("window", 6, 13),
    ]


def test_a_plus_and_an_equals_sign_in_a_value_stand_for_themselves():
    assert parse_config("a?b=c+d=e?f@g").options[0].value == "c+d=e?f@g"


def test_percent_escapes_spell_any_character():
    config = parse_config("a?b=x%26y%20z%25%C3%A9")
    assert config.options[0].value == "x&y z%é"
    assert str(config) == "a?b=x%26y%20z%25é"


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "the name of the backend is missing"),
        ("?a=b", 1, "the name of the backend is missing"),
        ("@acme", 1, "the name of the backend is missing"),
        (" nixl", 1, "' ' is not a lower-case letter, a digit, '_' or '-'"),
        ("nixl ", 5, "' ' is not a lower-case letter, a digit, '_' or '-'"),
        ("os.path:join", 3, "'.' is not a lower-case letter, a digit, '_' or '-'"),
        ("nixl/x", 5, "'/' is not a lower-case letter, a digit, '_' or '-'"),
        ("naïve", 3, "'ï' is not a lower-case letter, a digit, '_' or '-'"),
        ("9lives", 1, "it must start with a lower-case letter"),
        ("_nixl", 1, "it must start with a lower-case letter"),
        ("ni-_xl", 4, "two of '-' and '_' in a row"),
        ("nixl_", 5, "it ends with '_'"),
        ("nixl@", 6, "the name of the distribution is missing"),
        ("nixl@?a=b", 6, "the name of the distribution is missing"),
        ("nixl@ac me", 8, "' ' is not a letter, a digit, '.', '_' or '-'"),
        ("nixl@-acme", 6, "it must start and end with a letter or a digit"),
        ("nixl@acme.", 10, "it must start and end with a letter or a digit"),
        ("nixl?", 6, "an option is missing after '?'"),
        ("nixl?window", 12, "option 'window' has no value"),
        ("nixl?a=1&window&b=2", 16, "option 'window' has no value"),
        ("nixl?window=", 13, "option 'window' has an empty value"),
        ("nixl?=64MiB", 6, "the key of an option is missing"),
        ("nixl?win.dow=1B", 9, "'.' is not a lower-case letter, a digit, '_' or '-'"),
        ("nixl?window=1B&", 16, "an option is missing next to '&'"),
        ("nixl?&window=1B", 6, "an option is missing next to '&'"),
        ("nixl?a=1&&b=2", 10, "an option is missing next to '&'"),
        ("nixl?win_dow=1B&win-dow=2B", 17, "option 'win_dow' is given twice"),
        ("nixl?a=x y", 9, "' ' is not allowed in a value"),
        ("nixl?a=x\ty", 9, "'\\t' is not allowed in a value"),
        ("nixl?a=10%", 10, "'%' is not followed by two hexadecimal digits"),
        ("nixl?a=%g0", 8, "'%' is not followed by two hexadecimal digits"),
        ("nixl?a=%ff", 8, "the escapes are not UTF-8"),
    ],
)
def test_each_mistake_is_named_with_its_column(text: str, column: int, message: str):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert caught.value.column == column
    assert message in str(caught.value)
    assert f"column {column} of {text!r}" in str(caught.value)


def test_upper_case_is_refused_with_the_name_to_write():
    with pytest.raises(ConfigError) as caught:
        parse_config("NIXL")
    assert caught.value.remedy == "write nixl"


def test_what_is_not_text_is_refused():
    with pytest.raises(ConfigError, match="a config string is text, not int"):
        parse_config(7)  # type: ignore[arg-type]


_words = st.from_regex(r"[a-z][a-z0-9]{0,5}([_-][a-z0-9]{1,4}){0,2}", fullmatch=True)
_values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def _written(value: str) -> str:
    """Escape every byte that is not a plain letter or digit: another spelling than the canonical one."""
    return "".join(
        chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"%{byte:02x}" for byte in value.encode()
    )


@given(
    name=_words,
    distribution=st.none() | st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True),
    options=st.dictionaries(_words.map(lambda key: key.replace("-", "_")), _values, max_size=4),
)
def test_canonical_text_parses_back_to_an_equal_config(name, distribution, options):
    text = name + (f"@{distribution}" if distribution else "")
    text += "?" * bool(options) + "&".join(f"{key}={_written(value)}" for key, value in options.items())
    config = parse_config(text)
    assert {option.key: option.value for option in config.options} == options
    assert parse_config(str(config)) == config
    assert str(parse_config(str(config))) == str(config)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused_with_a_column_inside_it(text):
    column = None
    try:
        config = parse_config(text)
    except ConfigError as error:
        column = error.column
    if column is None:
        assert parse_config(str(config)) == config
    else:
        assert 1 <= column <= len(text) + 1


# --- typed values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("window=8192B", "window", 8192),
        ("window=5kB", "window", 5000),
        ("window=5KB", "window", 5000),
        ("window=2MB", "window", 2_000_000),
        ("window=1GB", "window", 1_000_000_000),
        ("window=4KiB", "window", 4096),
        ("window=1.5MiB", "window", 1_572_864),
        ("window=2GiB", "window", 2_147_483_648),
        ("timeout=250ms", "timeout", 0.25),
        ("timeout=1.5s", "timeout", 1.5),
        ("timeout=5min", "timeout", 300.0),
        ("timeout=2h", "timeout", 7200.0),
        ("pin-memory=off", "pin_memory", False),
        ("pin-memory=on", "pin_memory", True),
        ("rails=8", "rails", 8),
        ("ratio=1e-3", "ratio", 0.001),
        ("mode=direct", "mode", "direct"),
        ("fabric=mlx5_0%26mlx5_1", "fabric", "mlx5_0&mlx5_1"),
        ("cap=none", "cap", None),
        ("cap=1kB", "cap", 1000),
        ("label=none", "label", None),
    ],
)
def test_values_get_the_type_of_their_field(option: str, key: str, value: object):
    got = getattr(resolve(f"rail?{option}").values, key)
    assert got == value
    assert type(got) is (
        {"window": ByteSize, "cap": ByteSize, "timeout": Duration}.get(key, type(value))
        if value is not None
        else type(None)
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "window=64",
            "option 'window' cannot be '64' (column 13 of 'rail?window=64'): the unit is missing\n"
            "  hint: window is a size with a unit "
            "(B, kB, MB, GB, KiB, MiB, GiB), such as 64MiB, at least 4KiB, at most 1024GiB",
        ),
        (
            "timeout=30",
            "option 'timeout' cannot be '30' (column 14 of 'rail?timeout=30'): the unit is missing\n"
            "  hint: timeout is a time with a unit (ms, s, min, h), such as 30s",
        ),
        (
            "pin_memory=yes",
            "option 'pin_memory' cannot be 'yes' (column 17 of 'rail?pin_memory=yes'): it is neither\n"
            "  hint: pin_memory is on or off",
        ),
        (
            "rails=9",
            "option 'rails' cannot be '9' (column 12 of 'rail?rails=9'): it is too large\n"
            "  hint: rails is a whole number, at least 1, at most 8",
        ),
        (
            "mode=packd",
            "option 'mode' cannot be 'packd' (column 11 of 'rail?mode=packd'): it is none of these, did you mean "
            "'packed'?\n  hint: mode is one of auto, packed, direct",
        ),
    ],
)
def test_a_wrong_value_names_the_key_the_text_the_column_and_what_is_accepted(option: str, message: str):
    with pytest.raises(ConfigError) as caught:
        resolve(f"rail?{option}")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "option",
    [
        "window=64mib", "window=64Mib", "window=-1MiB", "window=1.0001B", "window=1e3B", "window=1KiB", "window=٣MiB",
        "window=2048GiB", "window=none", "timeout=1m", "timeout=-1s", "timeout=infs", "pin_memory=On", "pin_memory=1",
        "pin_memory=true", "rails=2.0", "rails=1_0", "rails=", "rails=0", "ratio=nan", "ratio=inf", "ratio=1_0",
        "mode=Auto",
    ],
)  # fmt: skip
def test_what_is_not_a_value_of_the_type_is_refused(option: str):
    with pytest.raises(ConfigError):
        resolve(f"rail?{option}")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ByteSize(256 * 1024**2), "256MiB"),
        (ByteSize(10**9), "1GB"),
        (ByteSize(1536), "1536B"),
        (ByteSize(1000), "1kB"),
        (ByteSize(0), "0B"),
    ],
)
def test_sizes_are_written_with_the_unit_that_leaves_the_smallest_whole_number(value: ByteSize, text: str):
    assert option_types(RailOptions)["cap"].format(value) == text


@given(st.integers(0, 2**62))
def test_a_size_reads_back_from_its_text(size):
    kind = option_types(RailOptions)["cap"]
    assert kind.parse(kind.format(ByteSize(size))) == size


@given(DURATIONS)
def test_a_duration_reads_back_from_its_text(seconds):
    kind = option_types(RailOptions)["timeout"]
    assert kind.parse(kind.format(Duration(seconds))) == seconds


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_reads_back_from_its_text(value):
    kind = option_types(RailOptions)["ratio"]
    assert kind.parse(kind.format(value)) == value


def test_a_field_that_no_text_spells_is_refused():
    @dataclass
    class Lists:
        peers: list[int]

    Lists.__annotations__["peers"] = list[int]
    with pytest.raises(TypeError, match="option 'peers' has the type list\\[int\\], which has no text form"):
        option_types(Lists)


# --- where values come from ------------------------------------------------------------------------------------------


def test_arguments_win_over_the_string_over_the_environment_over_defaults():
    environment = {
        "EPLB_BACKEND__RAIL__RAILS": "3",
        "EPLB_BACKEND__RAIL__RATIO": "0.3",
        "EPLB_BACKEND__RAIL__MODE": "auto",
    }
    resolved = resolve("rail?rails=4&ratio=0.4", environment, {"rails": 5})
    assert (resolved.values.rails, resolved.values.ratio, resolved.values.mode) == (5, 0.4, "auto")
    assert resolved.origins == {
        "timeout": "default",
        "window": "default",
        "rails": "argument",
        "ratio": "config string",
        "start_timeout": "default",
        "pin_memory": "default",
        "mode": "environment EPLB_BACKEND__RAIL__MODE",
        "fabric": "default",
        "cap": "default",
        "label": "default",
    }


def test_the_environment_of_another_backend_is_not_read():
    assert resolve("rail", {"EPLB_BACKEND__RAILS__NONSENSE": "1", "EPLB_BACKEND": "x"}).values == RailOptions()


def test_an_empty_environment_variable_counts_as_not_set():
    assert resolve("rail", {"EPLB_BACKEND__RAIL__RAILS": ""}).origins["rails"] == "default"


def test_an_unknown_key_in_the_string_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        resolve("rail?rials=4")
    assert str(caught.value) == (
        "backend 'rail' has no option 'rials', did you mean 'rails'? (column 6 of 'rail?rials=4')\n  hint: its "
        "options are: cap, fabric, label, mode, pin_memory, rails, ratio, start_timeout, timeout, window"
    )


def test_an_unknown_key_in_the_environment_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        resolve("rail", {"EPLB_BACKEND__RAIL__WINDW": "1MiB"})
    assert caught.value.where == "environment variable EPLB_BACKEND__RAIL__WINDW"
    assert "has no option 'windw', did you mean 'window'?" in str(caught.value)


def test_an_unknown_argument_is_refused():
    with pytest.raises(ConfigError, match=r"has no option 'widnow', did you mean 'window'\? \(argument\)"):
        resolve("rail", arguments={"widnow": 1})


def test_a_wrong_value_in_the_environment_names_the_variable():
    with pytest.raises(ConfigError) as caught:
        resolve("rail", {"EPLB_BACKEND__RAIL__WINDOW": "64"})
    assert caught.value.where == "environment variable EPLB_BACKEND__RAIL__WINDOW"


@pytest.mark.parametrize(
    ("key", "value", "typed"),
    [
        ("window", 8192, ByteSize(8192)),
        ("timeout", 3, Duration(3)),
        ("timeout", "3s", Duration(3)),
        ("cap", None, None),
    ],
)
def test_an_argument_is_a_python_value_or_its_text(key: str, value: object, typed: object):
    got = getattr(resolve("rail", arguments={key: value}).values, key)
    assert (got, type(got)) == (typed, type(typed))


@pytest.mark.parametrize(
    ("key", "value"),
    [("window", 1.5), ("window", True), ("window", None), ("rails", True), ("pin_memory", 1), ("timeout", -1),
     ("timeout", float("inf")), ("mode", 1), ("fabric", 3), ("fabric", ""), ("fabric", "\udcff"), ("rails", 99)],
)  # fmt: skip
def test_an_argument_of_another_type_is_refused(key: str, value: object):
    with pytest.raises(ConfigError, match=f"option '{key}'"):
        resolve("rail", arguments={key: value})


def test_an_option_without_default_has_to_be_given():
    @dataclass(frozen=True)
    class Needs:
        fabric: str

    Needs.__annotations__["fabric"] = str
    with pytest.raises(ConfigError, match="backend 'rail' needs the option 'fabric'"):
        resolve_options(parse_config("rail"), Needs, environment={})


def test_options_that_do_not_go_together_are_refused_in_the_words_of_their_class():
    with pytest.raises(ConfigError, match=r"conflict .*: direct does not work with 7 rails"):
        resolve("rail?mode=direct&rails=7")


def test_the_canonical_text_holds_what_differs_from_the_defaults():
    resolved = resolve("rail@acme?window=64MiB&rails=2", {"EPLB_BACKEND__RAIL__FABRIC": "a&b"})
    assert resolved.canonical() == "rail@acme?fabric=a%26b&window=64MiB"


@given(
    st.builds(
        RailOptions,
        timeout=DURATIONS.map(Duration),
        window=st.integers(4096, 2**40).map(ByteSize),
        rails=st.integers(1, 6),
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        pin_memory=st.booleans(),
        mode=st.sampled_from(["auto", "packed", "direct"]),
        fabric=_values,
        cap=st.none() | st.integers(0, 2**50).map(ByteSize),
        label=st.none() | _values.filter(lambda text: text != "none"),
    )
)
def test_canonical_text_gives_the_same_values_and_the_same_digest_again(options):
    given_values = {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
    first = resolve("rail", arguments=given_values)
    second = resolve(first.canonical())
    assert first.values == second.values == options
    assert first.digest() == second.digest()


def test_the_digest_does_not_depend_on_where_a_value_came_from_but_on_every_value():
    plain = resolve("rail").digest()
    assert resolve("rail?rails=2").digest() == plain
    assert resolve("rail", {"EPLB_BACKEND__RAIL__WINDOW": "256MiB"}).digest() == plain
    changed = [resolve(f"rail?{option}").digest() for option in ("rails=3", "cap=1B", "timeout=61s", "pin_memory=off")]
    assert len({plain, *changed}) == 5


def test_the_digest_is_the_same_in_every_process_and_release():
    assert resolve_options(parse_config("x"), CommonOptions, environment={}).digest() == (
        # sha256 of the lines "start_timeout=none" and "timeout=1min"
        "80462647556ec5cbb5c4e9c27c4455eaaa6abf095529c76d9eadbe9d941a9c6d"
    )


@pytest.mark.parametrize(
    ("argument", "environment", "chosen"),
    [
        ("nixl", {"EPLB_BACKEND": "shm"}, "nixl"),
        (None, {"EPLB_BACKEND": "shm?a=b"}, "shm?a=b"),
        (None, {"EPLB_BACKEND": ""}, None),
        (None, {}, None),
    ],
)
def test_the_environment_names_a_backend_where_the_caller_does_not(argument, environment, chosen):
    assert backend_from_environment(argument, environment) == chosen
