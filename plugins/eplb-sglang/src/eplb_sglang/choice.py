"""What is asked of this plugin: environment variables alone, since SGLang reads its arguments before it loads plugins.

- `EPLB_BACKEND=nixl?window=512MiB`: the backend; without it SGLang moves its experts as before.
- `EPLB_POLICY=incremental`: the balance policy; without it SGLang's own decides.
- `EPLB_SGLANG_ON_FAILURE=serve`, or `raise`: what happens when a rearrangement fails.
- `EPLB_SGLANG_ON_UNKNOWN=leave`, or `refuse`: what happens with an SGLang that is not as expected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from eplb_core import CommonOptions
from eplb_core.errors import ConfigError, EplbError
from eplb_core.registry.config import AUTO, BACKEND_VARIABLE, parse_config, resolve_options
from eplb_core.registry.policies import load_policy
from eplb_core.registry.registry import default_registry, load_options_class
from eplb_core.words import did_you_mean

BACKEND: Final = BACKEND_VARIABLE
POLICY: Final = "EPLB_POLICY"
ON_FAILURE: Final = "EPLB_SGLANG_ON_FAILURE"
ON_UNKNOWN: Final = "EPLB_SGLANG_ON_UNKNOWN"
_WORDS: Final = {ON_FAILURE: ("serve", "raise"), ON_UNKNOWN: ("leave", "refuse")}


@dataclass(frozen=True, slots=True)
class Choice:
    """What the environment asks for.

    Attributes:
        backend: a config string, or None where SGLang's own transfer is to stay.
        policy: a policy with its options, or None where SGLang's own is to stay.
        on_failure: `serve` or `raise`, not checked yet.
        on_unknown: `leave` or `refuse`, not checked yet.
    """

    backend: str | None
    policy: str | None
    on_failure: str
    on_unknown: str


def read(environment: Mapping[str, str] = os.environ) -> Choice:
    """Return what the environment asks for; an empty variable counts as not set."""
    return Choice(
        environment.get(BACKEND) or None,
        environment.get(POLICY) or None,
        environment.get(ON_FAILURE) or _WORDS[ON_FAILURE][0],
        environment.get(ON_UNKNOWN) or _WORDS[ON_UNKNOWN][0],
    )


def check(choice: Choice) -> None:
    """Look at all that can be known of a choice before there are ranks.

    Raises:
        ConfigError: a text is no config string, an option or a word is wrong.
        BackendError: there is no such backend, or it cannot be used.
        PolicyError: there is no such policy, or it cannot be used.
    """
    for variable, word in ((ON_FAILURE, choice.on_failure), (ON_UNKNOWN, choice.on_unknown)):
        if word not in _WORDS[variable]:
            raise ConfigError(
                f"environment variable {variable} is {word!r}{did_you_mean(word, _WORDS[variable])}",
                remedy=f"set it to {' or '.join(_WORDS[variable])}",
            )
    if choice.backend is not None:
        config = parse_config(choice.backend)
        if config.name != AUTO:
            resolve_options(config, load_options_class(default_registry().select(config)))
    if choice.policy is not None:
        load_policy(choice.policy)


def problem(choice: Choice) -> tuple[str, EplbError] | None:
    """Return what is wrong with a choice and the variable that says it, or None."""
    parts = {
        BACKEND: Choice(choice.backend, None, *(words[0] for words in _WORDS.values())),
        POLICY: Choice(None, choice.policy, *(words[0] for words in _WORDS.values())),
        ON_FAILURE: Choice(None, None, choice.on_failure, _WORDS[ON_UNKNOWN][0]),
        ON_UNKNOWN: Choice(None, None, _WORDS[ON_FAILURE][0], choice.on_unknown),
    }
    for variable, part in parts.items():
        try:
            check(part)
        except EplbError as error:
            return variable, error
    return None


def patience(config: str, start_timeout_s: float) -> dict[str, object]:
    """Return the option `start_timeout` as an argument of the factory, unless the string or the environment sets it.

    Nothing where the backend has no such option, or where the string is wrong, which the factory tells all ranks.
    """
    try:
        parsed = parse_config(config)
        options_class = CommonOptions if parsed.name == AUTO else load_options_class(default_registry().select(parsed))
        origin = resolve_options(parsed, options_class).origins.get("start_timeout")
    except EplbError:
        return {}
    return {"start_timeout": start_timeout_s} if origin == "default" else {}
