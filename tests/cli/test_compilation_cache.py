"""The cache of compiled programs: damaged entries are dropped, and it can be turned off."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import jax
import pytest

from jaxtrain.cli.compilation_cache import remove_damaged_entries, set_up_compilation_cache


def test_damaged_entries_are_removed_once(tmp_path: Path) -> None:
    names = ("good", "bad", "empty")
    good, bad, empty = (tmp_path / f"jit_{name}-{'0' * 64}-cache" for name in names)
    good.write_bytes(zlib.compress(b"program"))
    bad.write_bytes(zlib.compress(b"program")[:-3])
    empty.touch()
    (tmp_path / "my-pip-cache").write_bytes(b"not an entry")
    remove_damaged_entries(tmp_path)
    assert {path.name for path in tmp_path.glob("*-cache")} == {good.name, "my-pip-cache"}
    bad.write_bytes(b"damaged")
    os.utime(bad, (1, 1))  # written before the check above: not read again
    remove_damaged_entries(tmp_path)
    assert bad.exists()
    os.utime(bad)
    remove_damaged_entries(tmp_path)
    assert not bad.exists()


@pytest.fixture
def settings():
    """Restores the cache of the tests."""
    names = (
        *("jax_enable_compilation_cache", "jax_compilation_cache_dir"),
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_cache_unless_it_cannot_be_written(
    settings, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "cache").write_text("not a folder")
    set_up_compilation_cache(True)
    assert jax.config.jax_compilation_cache_dir is None
    (tmp_path / "cache").unlink()
    set_up_compilation_cache(True)
    compiled = tmp_path / "cache" / "jaxtrain" / "compiled"
    assert Path(jax.config.jax_compilation_cache_dir).parent == compiled
    set_up_compilation_cache(False)
    assert not jax.config.jax_enable_compilation_cache


@pytest.mark.parametrize("chosen", [None, "3"])
def test_every_program_is_kept_unless_the_user_chooses(
    chosen, settings, tmp_path: Path, monkeypatch
) -> None:
    name = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.delenv(name.upper(), raising=False)
    if chosen is not None:
        monkeypatch.setenv(name.upper(), chosen)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update(name, float(chosen or 1))
    set_up_compilation_cache(True)
    assert getattr(jax.config, name) == float(chosen or 0)
