"""`python -m eplb_core` is the `eplb` command; so is `torchrun -m eplb_core`."""

from __future__ import annotations

from eplb_core.cli import main

if __name__ == "__main__":
    main(prog_name="eplb")
