"""Renders chat templates in a process of its own: one JSON request a line in, one answer out.

A template is code from a checkpoint. Jinja's immutable sandbox keeps it from Python's objects,
this process's limits from memory, and the parent (`text.ChatTemplates`), which kills the process,
from time. Run as a plain script, so that it starts without torch.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import BaseLoader, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 512 * 1024 * 1024
MAX_RENDERED_CHARACTERS = 4 * 1024 * 1024


def _refuse(message: str) -> NoReturn:
    """What chat templates call `raise_exception`."""
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        loader=BaseLoader(),
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # Templates print JSON for models, not for web pages: no HTML escapes.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment


def _render(environment: ImmutableSandboxedEnvironment, request: dict[str, Any]) -> str:
    parts: list[str] = []
    num_characters = 0
    for part in environment.from_string(request["template"]).generate(**request["values"]):
        num_characters += len(part)
        if num_characters > MAX_RENDERED_CHARACTERS:
            _refuse(f"more than {MAX_RENDERED_CHARACTERS} characters")
        parts.append(part)
    return "".join(parts)


def main() -> None:
    """Answer requests until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    environment = _environment()
    for line in sys.stdin:
        try:
            answer = {"text": _render(environment, json.loads(line))}
        except MemoryError:
            answer = {"error": "needs too much memory"}
        except Exception as problem:  # A template can raise anything; all of it is its own fault.
            answer = {"error": f"{type(problem).__name__}: {problem}"[:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
