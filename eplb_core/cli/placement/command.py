"""The group `eplb placement`."""

from __future__ import annotations

import click

from eplb_core.cli.placement.convert import convert
from eplb_core.cli.placement.diff import diff
from eplb_core.cli.placement.show import show


@click.group()
def placement() -> None:
    """Draw placements, compare them, and convert them between the formats of engines."""


placement.add_command(convert)
placement.add_command(diff)
placement.add_command(show)
