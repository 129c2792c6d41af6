"""`equipoise report`."""

from __future__ import annotations

import sys
from pathlib import Path

from equipoise.evaluation.report import build_report


def report_command(directory: Path) -> None:
    """Write the report of a directory and say where it is."""
    path = build_report(directory)
    print(path)
    print(f"figures: {path.parent / 'figures'}", file=sys.stderr)
