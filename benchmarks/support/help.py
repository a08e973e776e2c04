"""What `--help` shows of a module's text."""

from __future__ import annotations

import re


def help_of(text: str | None) -> str:
    """`text`, a module's docstring, with its indented paragraphs as they stand: click would fill
    them (`\\b` in front of a paragraph tells it not to)."""
    return re.sub(r"\n\n(?= {4})", "\n\n\b\n", text or "")
