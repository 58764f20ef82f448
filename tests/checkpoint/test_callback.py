"""The arguments of the checkpoint callback, and what it does with a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import list_epochs
from jaxtrain.errors import InputError

LOSS = jt.losses.cross_entropy
CYCLIC: list = []
CYCLIC.append(CYCLIC)


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directory": ""}, "directory is '', the current folder"),
        ({"directory": 3}, "directory is 3; expected a path"),
        ({"every": 0}, "every is 0; expected an integer of at least 1"),
        ({"every_steps": 0}, "every_steps is 0; expected an integer of at least 1"),
        ({"keep": True}, "keep is True"),
        ({"resume": "must"}, "resume is 'must'; expected 'auto', 'required' or 'never'"),
        ({"configuration": {"deep": [{"rate": float("nan")}]}}, "JSON cannot represent"),
        ({"configuration": {"odd": np.ones(2)}}, "not ndarray"),
        ({"configuration": {(1, 2): 3}}, "JSON cannot represent"),
        ({"configuration": {"a": CYCLIC}}, "JSON cannot represent"),
        ({"configuration": 3}, "configuration is 3"),
    ],
)
def test_invalid_options_are_named(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        jt.callbacks.checkpoint(**{"directory": "checkpoints", **options})


def test_paths_are_recorded_as_text(tmp_path: Path) -> None:
    configuration = {"data": Path("a/b"), "sizes": (1, 2)}
    callback = jt.callbacks.checkpoint(tmp_path, configuration=configuration)
    assert callback.configuration == {"data": "a/b", "sizes": [1, 2]}


def test_a_program_may_change_its_working_directory(
    tmp_path: Path, small_state, small_classes, monkeypatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    callback = jt.callbacks.checkpoint("checkpoints")
    monkeypatch.chdir(tmp_path / "elsewhere")
    jt.fit(small_state, small_classes, loss_fn=LOSS, epochs=1, callbacks=[callback])
    assert list_epochs(tmp_path / "checkpoints") == [1]


def test_a_run_that_cannot_start_releases_the_folder(
    tmp_path: Path, small_state, small_classes
) -> None:
    callback = jt.callbacks.checkpoint(tmp_path)
    jt.fit(small_state, small_classes, loss_fn=LOSS, epochs=2, callbacks=[callback])
    with pytest.raises(InputError, match=r"epochs is 1, but the .* holds epoch 2"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, epochs=1, callbacks=[callback])
    jt.fit(small_state, small_classes, loss_fn=LOSS, epochs=2, callbacks=[callback])


def test_an_unknown_column_is_named(tmp_path: Path, small_state, small_classes) -> None:
    callback = jt.callbacks.checkpoint(tmp_path, best="accuracy")
    with pytest.raises(InputError, match="best is 'accuracy', but the history has the columns"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, callbacks=[callback])
