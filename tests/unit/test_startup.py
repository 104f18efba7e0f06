from __future__ import annotations

import gc

import pytest

from moeconsolidate.startup import undisturbed_imports


def test_garbage_is_looked_for_again_afterwards() -> None:
    with undisturbed_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count()
    with pytest.raises(ImportError), undisturbed_imports():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()
