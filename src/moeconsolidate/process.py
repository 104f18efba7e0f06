"""How the `moec` process ends: an exit code, and on the way at most one line about an error.

Whatever happens inside, from a bad argument to a full disk, comes out here.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import typer

from moeruntime.errors import MoecError, ResourceError, UsageError

__all__ = ["run_and_exit"]

SIGNAL_CODES = (130, 143)
MAX_MESSAGE_CHARACTERS = 2000


def run_and_exit(app: typer.Typer, arguments: Sequence[str] | None) -> NoReturn:
    """Run `moec` and exit; without arguments, take them from the command line."""
    _fill_closed_streams()
    signal.signal(signal.SIGTERM, _end_politely)
    global _speaks_json  # noqa: PLW0603 - of this process, like its streams
    _speaks_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("moeconsolidate").handlers = [_Warnings()]
    code = 0
    try:
        result = app(
            None if arguments is None else list(arguments), prog_name="moec", standalone_mode=False
        )
        code = result if isinstance(result, int) else 0  # of `typer.Exit`; commands return None
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
    except MoecError as problem:
        code = _complain(str(problem), problem.exit_code)
    except typer.TyperException as problem:  # a call that makes no sense to the parser
        context = getattr(problem, "ctx", None)
        command = context.command_path if context else "moec"
        code = _complain(
            f"{problem.format_message().rstrip('.')}; see `{command} --help`", UsageError.exit_code
        )
    except MemoryError:
        code = _complain("out of memory", ResourceError.exit_code)
    except OSError as problem:  # no permission, too many open files, a disk that fails
        place = f"{problem.filename}: " if problem.filename else ""
        code = _complain(f"{place}{problem.strerror or problem}", ResourceError.exit_code)
    except Exception as problem:
        code = _signal_behind(problem) or _complain(
            f"internal: {type(problem).__name__}: {problem} (a bug in moec; MOEC_TRACEBACK=1 shows "
            "where)",
            MoecError.exit_code,
        )
    if code in SIGNAL_CODES:  # Another Ctrl-C would only garble the way out.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    code = _flush(code)
    if code in SIGNAL_CODES:
        # A signal while a thread was waited for leaves it at work, and Python 3.11 in the belief
        # that it has ended: on the way out it would find no interpreter any more, and abort.
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
    gc.freeze()  # or Python looks for garbage in all of torch on its way out, for 0.2 s
    sys.exit(code)


def _signal_behind(problem: BaseException) -> int:
    """The exit code of a signal whose handling raised something else, or 0.

    A second signal may come while a lock is being taken back, which is then released unlocked.
    """
    code, behind = 0, problem.__context__
    while behind is not None:
        if isinstance(behind, KeyboardInterrupt):
            code = 130
        elif isinstance(behind, SystemExit) and behind.code in SIGNAL_CODES:
            code = int(behind.code)
        behind = behind.__context__
    return code


_speaks_json = False
"""Whether stderr is for a program to read: one JSON object a line."""


def _complain(message: str, code: int) -> int:
    """Print one line, whatever characters file names and values put into it."""
    if os.environ.get("MOEC_TRACEBACK"):
        traceback.print_exc()
    _say("error", message, exit_code=code)
    return code


class _Warnings(logging.Handler):
    """Prints what the compiler logs."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.levelname.lower(), record.getMessage())


def _say(kind: str, message: str, **more: object) -> None:
    half = MAX_MESSAGE_CHARACTERS // 2
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = f"{message[:half]} ... {message[-half:]}"
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
    text = f"moec: {kind}: {line}"
    if _speaks_json:
        text = json.dumps({"event": kind, "message": line, **more})
    with suppress(OSError):  # nobody reads it, or it is on a full disk
        print(text, file=sys.stderr, flush=True)


def _flush(code: int) -> int:
    """Flush here, where a reader that has gone away can be passed over in silence."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        if not code and not isinstance(problem, BrokenPipeError):
            code = _complain(f"standard output: {problem.strerror}", ResourceError.exit_code)
        # The interpreter flushes once more on its way out; give it something to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _fill_closed_streams() -> None:
    """Open what the caller has closed, or a file of ours takes its number and what is printed."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # Python has None in place of a stream that was closed when it started.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _end_politely(_number: int, _frame: FrameType | None) -> NoReturn:
    """Unwind on SIGTERM as on any error, so that nothing half-written stays behind."""
    raise SystemExit(143)
