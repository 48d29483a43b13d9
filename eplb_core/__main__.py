"""The `eplb` command, which is also `python -m eplb_core` and `torchrun -m eplb_core`.

What it needs beside the core is the extra `cli`. Without that it says how to install it, instead of a traceback.
"""

from __future__ import annotations

import sys

from eplb_core.errors import InputError
from eplb_core.extras import require


def main() -> None:
    """Run the command and exit."""
    try:
        require("cli", "the eplb command")
    except InputError as error:
        # What the command would print and return; its own module cannot be imported yet.
        print("error: " + "; ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    from eplb_core.cli import main as command

    command(prog_name="eplb")


if __name__ == "__main__":
    main()
