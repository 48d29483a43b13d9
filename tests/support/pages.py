"""The pages of the documentation, cut into their blocks of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)

_FENCE = re.compile(r"^```(?:\{code-block\} )?(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r":([\w-]+): *(.*)\n")
_NO_MARKUP = str.maketrans("", "", '"`')


@dataclass(frozen=True)
class Block:
    """One block of code of a page, with the directive's options."""

    page: Path
    line: int
    language: str
    options: dict[str, str]
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def mark(self) -> str:
        """The directive's class, which says how the block is tested."""
        return self.options.get("class", "")

    @property
    def caption(self) -> str:
        """The file that the block shows, if it says so."""
        return self.options.get("caption", "").translate(_NO_MARKUP)


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for fence in _FENCE.finditer(text):
        body, options = fence[2], {}
        while option := _OPTION.match(body):
            options[option[1]] = option[2]
            body = body[option.end() :]
        if options:
            body = body.lstrip("\n")
        yield Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], options, body)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def marked(mark: str) -> list[Block]:
    return [block for block in BLOCKS if block.mark == mark]
