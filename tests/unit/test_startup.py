from __future__ import annotations

import gc

import pytest
import typer

from moeconsolidate.process import run_and_exit
from moeconsolidate.startup import undisturbed_imports


def test_garbage_is_looked_for_again_afterwards() -> None:
    with undisturbed_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count()
    with pytest.raises(ImportError), undisturbed_imports():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


def test_garbage_is_looked_for_until_the_command_is_done() -> None:
    app = typer.Typer()
    found: list[tuple[bool, int]] = []

    @app.command()
    def command() -> None:
        found.append((gc.isenabled(), gc.get_freeze_count()))

    gc.unfreeze()
    with pytest.raises(SystemExit):
        run_and_exit(app, [])
    assert found == [(True, 0)] and gc.get_freeze_count()
    gc.unfreeze()
