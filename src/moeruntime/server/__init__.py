"""OpenAI-compatible HTTP over one engine (the extra `serve`).

::

    wire.py       connections: header timeouts, signals, draining
    guard.py      every request: key, size and speed of its body, one log line
    app.py        routes
    protocol.py   a body becomes a `Generation`, or one clear message
    answer.py     a generation becomes one JSON object or a stream of events
    desk.py       admission: readiness, bounded queues, deadlines, tokens
    loop.py       the thread that owns the engine

Only this package knows Starlette and uvicorn, only `loop.py` touches the engine.
"""
