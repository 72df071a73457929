"""What the commands of this package share: one-line errors, tables, starting again."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad input with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def check_known(self, what: str, given: Iterable[str], known: Iterable[str]) -> None:
        """Exit with 2, naming the known values, if one given is not among them."""
        known = list(known)
        for value in given:
            if value not in known:
                self.error(f"{what} must be one of {', '.join(known)}; got {value!r}")

    def check_writable(self, path: Path | None) -> None:
        """Exit with 2, before the work is done, if a file cannot be written there."""
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            self.error(f"a file must be writable there; got {path}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in aligned columns; cells that start with a digit or sign go to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    numeric = [
        all(not cell or cell[0].isdigit() or cell[0] in "-+." for cell in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(header)
    lines = []
    for cells in (header, *rows):
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def rerun(module: str, arguments: Sequence[str], interpret: bool) -> NoReturn:
    """Replace this process by `python -m module arguments` with TRITON_INTERPRET set or unset."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
