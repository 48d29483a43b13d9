"""What can be seen without a transfer: the spec, its options, its probe."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

from eplb_core.contract.options import option_types
from eplb_core.errors import ConfigError
from eplb_core.registry.config import parse_config, resolve_options
from eplb_core.registry.probe import run_probe
from eplb_core.registry.registry import Registry, load_options_class
from eplb_core.testing.check import Check, Place, expect, raised_by
from eplb_core.testing.subject import Subject

_HEAVY = ("torch", "numpy")
_CHILD_S = 60.0
_PROBE_S = 60.0

_LIST_IMPORTS = """
import json, sys
from eplb_core.registry.config import parse_config
from eplb_core.registry.registry import Registry
Registry().select(parse_config(sys.argv[1]))
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def listing_it_imports_nothing_heavy(subject: Subject) -> None:
    """The module of the spec imports neither torch nor what the backend requires."""
    spec = Registry().select(parse_config(subject.config)).spec
    needed = [name for each in (spec.requires if spec else ()) for name in each.split("|")]
    child = subprocess.run(
        [sys.executable, "-c", _LIST_IMPORTS, subject.config],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        capture_output=True,
        text=True,
        timeout=_CHILD_S,
        check=False,
    )
    expect(child.returncode == 0, f"a process that only selects it failed: {child.stderr}")
    imported = set(json.loads(child.stdout.splitlines()[-1]))
    heavy = sorted(imported.intersection((*_HEAVY, *needed)))
    expect(not heavy, f"selecting it imports {', '.join(heavy)}")


def its_options_can_be_written_and_read_back(subject: Subject) -> None:
    """Every option has a default and a text that reads back to the same value; unknown options are refused."""
    config = parse_config(subject.config)
    options_class = load_options_class(Registry().select(config))
    parameters = getattr(options_class, "__dataclass_params__", None)
    expect(parameters is not None and parameters.frozen, f"{options_class.__name__} is not frozen")
    types = option_types(options_class)
    expect("timeout" in types, f"{options_class.__name__} has no option 'timeout'; derive it from CommonOptions")
    for field in dataclasses.fields(options_class):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        expect(has_default or not field.init, f"option {field.name} has no default")
    values = options_class()
    for key, kind in types.items():
        default = getattr(values, key)
        text = kind.format(default)
        try:
            same = kind.parse(text) == default
        except ValueError as error:
            expect(False, f"the default of {key} is written {text!r}, which cannot be read: {error}")
        expect(same, f"the default of {key} is written {text!r}, which reads as another value")
    resolved = resolve_options(config, options_class)
    again = resolve_options(parse_config(resolved.canonical()), options_class)
    expect(again.values == resolved.values, f"{resolved.canonical()!r} reads back as other options")
    unknown = parse_config(f"{config.name}?an_option_that_nobody_has=1")
    raised_by(lambda: resolve_options(unknown, options_class), ConfigError)


def it_declares_what_is_claimed_for_it(subject: Subject) -> None:
    """The capabilities that it declares are those that it is checked for."""
    spec = Registry().select(parse_config(subject.config)).spec
    expect(spec is not None, "it has no spec")
    if spec is None:
        return
    declared = spec.capabilities
    expect(subject.device in declared.device_types, f"it declares {declared.device_types}, not {subject.device}")
    for claim, value in (("stateless_groups", subject.stateless), ("background", subject.background)):
        found = getattr(declared, claim)
        expect(found == value, f"it declares {claim}={found}, and is checked as if it were {value}")


def its_probe_finds_it_available(subject: Subject) -> None:
    """The probe, in a child process, says that it works on this machine."""
    result = run_probe(Registry().select(parse_config(subject.config)), subject.device, timeout_s=_PROBE_S)
    expect(result.available, f"the probe says: {result.reason}")


CHECKS = (
    Check(listing_it_imports_nothing_heavy, place=Place.INSTALLED),
    Check(its_options_can_be_written_and_read_back, place=Place.INSTALLED),
    Check(it_declares_what_is_claimed_for_it, place=Place.INSTALLED),
    Check(its_probe_finds_it_available, place=Place.INSTALLED),
)
"""The checks of this module."""
