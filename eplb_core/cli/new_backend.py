"""`eplb new-backend`: write a complete project for a new transport, which works unchanged."""

from __future__ import annotations

from pathlib import Path

import click

from eplb_core.cli.output import human_console


@click.command("new-backend")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path("."),
    metavar="DIR",
    help="Parent directory of the project. [default: the current one]",
)
def new_backend(name: str, into: Path) -> None:
    """Write a project for a backend called NAME into the new directory eplb-NAME.

    It holds the package with its entry point, tests with the conformance kit, and a CI workflow. Its transport is
    slow but passes the kit; replace it with yours.
    """
    from eplb_core.cli.new_backend_project import ProjectNames, write_project

    names = ProjectNames.of(name)
    project = into / names.distribution
    written = write_project(names, project)
    console = human_console()
    for path in written:
        console.print(path, markup=False, soft_wrap=True)
    console.print(
        f"\nIt works as it is. Next:\n"
        f"  cd {project}\n"
        f"  pip install -e '.[dev]'\n"
        f"  pytest\n"
        f"  eplb bench --backend {names.name} --ranks 2 --device cpu\n"
        f"Then put your transport into src/{names.package}/fabric.py.",
        markup=False,
        soft_wrap=True,  # a path is pasted in one piece
    )
