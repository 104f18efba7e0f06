"""One line an event on standard error, whatever a client puts into it."""

from __future__ import annotations

import logging
import sys

__all__ = ["LOG", "escaped", "set_up_logging"]

LOG = logging.getLogger("moec.server")


def escaped(text: str) -> str:
    """Control characters as escapes, so that nobody writes lines of their own or to a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n")
        if record.exc_info:  # our own traceback; each line of it is escaped by itself
            return "\n".join(escaped(line) for line in lines)
        return escaped("\n".join(lines))


def set_up_logging(*, quiet: bool) -> None:
    """Log to standard error; `quiet` leaves warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("moec.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet else level)
