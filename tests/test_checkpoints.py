"""Checkpoints: what goes in comes out, bit by bit, or is refused with a reason."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import time
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxtrain as jt
from jaxtrain import checkpoint_files, checkpoints
from jaxtrain.checkpoint_files import Checkpoint, read_checkpoint
from jaxtrain.checkpoints import Checkpoints, list_epochs
from jaxtrain.events import EpochDone
from jaxtrain.optimizers import OPTIMIZERS

LOSS = jt.losses.cross_entropy
VERSIONS = {"jax": jax.__version__}


def store(path: Path, **options) -> Checkpoints:
    defaults = {"configuration": {}, "identity": {checkpoints.START: "a"}, "versions": VERSIONS}
    return Checkpoints(path, **{**defaults, **options})


def fit(state, data, path: Path | None, **options):
    defaults = {"loss_fn": LOSS, "batch_size": 16, "key": jax.random.key(3), "epochs": 3}
    return jt.fit(state, data, data, checkpoint_dir=path, **{**defaults, **options})


def assert_identical(ours, theirs) -> None:
    """Structure, types, and every bit, NaN's too."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(one) == jax.random.key_impl(other)
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def without_clock(history):
    return {name: values for name, values in history.items() if name != "seconds"}


def assert_same_run(ours, theirs) -> None:
    assert_identical(ours[0], theirs[0])
    assert_identical(without_clock(ours[1]), without_clock(theirs[1]))


DTYPES = [
    *("float32", "float16", "bfloat16", "int32", "int16", "int8", "uint32", "uint8", "bool"),
    *("complex64", "float8_e4m3fn"),
]


@st.composite
def arrays(draw: st.DrawFn) -> jax.Array:
    """Any bits, in any of the types."""
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape))
    if dtype.kind == "b":
        return jnp.asarray(draw(hnp.arrays(bool, shape)))
    content = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    return jnp.asarray(np.frombuffer(content, dtype).reshape(shape))


keys = st.builds(
    lambda seed, impl: jax.random.key(seed, impl=impl),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["threefry2x32", "rbg"]),
)
leaves = st.one_of(arrays(), keys)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.dictionaries(names, children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(optax.TraceState, children),
        st.just(optax.EmptyState()),
        st.none(),
    ),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(params=trees, opt_state=trees, model_state=trees, best=st.booleans(), data=st.data())
def test_any_state_comes_back(tmp_path: Path, params, opt_state, model_state, best, data) -> None:
    state = jt.TrainState(
        step=jnp.int32(7),
        apply_fn=None,
        params=params,
        tx=None,
        opt_state=opt_state,
        key=jax.random.key(1),
        model_state=model_state,
    )
    columns = hnp.arrays(np.float64, st.integers(0, 3))
    history = data.draw(st.dictionaries(names, columns, max_size=3))
    checkpoint = Checkpoint(7, state, history, state if best else None)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    with store(folder) as written:
        written.save(checkpoint)
        written.wait()
        loaded = written.load(state, "must")
    assert loaded is not None
    assert loaded.epoch == 7
    assert_identical(loaded.state, state)
    assert_identical(loaded.history, history)
    assert (loaded.best_state is None) == (not best)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_every_optimizer_goes_on_in_the_same_bits(tmp_path: Path, small_classes, name) -> None:
    model = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)
    optimizer = jt.optimizers.clip_gradients(OPTIMIZERS[name](0.01), 1.0)
    state = jt.init_state(model, optimizer, small_classes.inputs[:1], key=jax.random.key(0))
    whole = fit(state, small_classes, None, epochs=4)
    fit(state, small_classes, tmp_path, epochs=2)
    assert_same_run(fit(state, small_classes, tmp_path, epochs=4), whole)


def test_batch_norm_patience_and_a_schedule_go_on(tmp_path: Path, small_classes) -> None:
    """Early stopping counts across the cut, and returns the best state of before it."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            x = nn.Dense(8)(inputs)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))

    optimizer = jt.optimizers.adam(jt.optimizers.step_lr(0.01, 1, 0.5, steps_per_epoch=4))
    state = jt.init_state(Network(), optimizer, small_classes.inputs[:1], key=jax.random.key(0))
    contrary = small_classes._replace(targets=(small_classes.targets + 1) % 3)
    options = {"validation_data": contrary, "patience": 4}
    whole = fit(state, small_classes, None, epochs=20, **options)
    stopped = len(whole[1]["epoch"])
    assert 5 <= stopped < 20
    for epochs in (1, 3, stopped - 1):
        fit(state, small_classes, tmp_path, epochs=epochs, **options)
    assert list_epochs(tmp_path)[-1] == stopped - 1
    assert_same_run(fit(state, small_classes, tmp_path, epochs=20, **options), whole)
    # A run that early stopping ended is at its end, however often it is called.
    assert_same_run(fit(state, small_classes, tmp_path, epochs=20, **options), whole)
    assert_same_run(fit(state, small_classes, tmp_path, epochs=25, **options), whole)


def test_every_third_and_the_last_are_kept(tmp_path: Path, small_state, small_classes) -> None:
    fit(small_state, small_classes, tmp_path, epochs=8, checkpoint_every=3, keep=2)
    assert list_epochs(tmp_path) == [6, 8]
    fit(small_state, small_classes, tmp_path, epochs=9, checkpoint_every=3, keep=2)
    assert list_epochs(tmp_path) == [8, 9]


def test_a_run_goes_on_from_the_state_it_returned(
    tmp_path: Path, small_state, small_classes
) -> None:
    whole = fit(small_state, small_classes, None, epochs=5)
    state, _ = fit(small_state, small_classes, tmp_path, epochs=2)
    assert_same_run(fit(state, small_classes, tmp_path, epochs=3), whole)


def test_weakly_typed_states_go_on(tmp_path: Path, small_classes) -> None:
    """jnp.full of a Python number is weakly typed, what comes of a step is not."""
    data = small_classes._replace(targets=small_classes.targets[:, None].astype(float))
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(0.01),
        data.inputs[:1],
        key=jax.random.key(0),
    )
    state = state.replace(params={"weight": jnp.full((6, 1), 0.5), "bias": jnp.full(1, 0.5)})
    assert state.params["weight"].weak_type
    options = {"loss_fn": jt.losses.mean_squared_error}
    whole = fit(state, data, None, epochs=4, **options)
    fit(state, data, tmp_path, epochs=2, **options)
    half = fit(state, data, tmp_path, epochs=2, **options)
    assert_same_run(fit(half[0], data, tmp_path, epochs=2, **options), whole)


def test_the_best_state_goes_on_too(tmp_path: Path, small_state, small_classes) -> None:
    """What patience returns is another state than the last one."""
    contrary = small_classes._replace(targets=(small_classes.targets + 1) % 3)
    options = {"validation_data": contrary, "patience": 9, "epochs": 3}
    best, _ = fit(small_state, small_classes, tmp_path, **options)
    assert best.step < 12
    with pytest.raises(jt.InputError, match=r"epochs is 1, but .* holds a checkpoint of epoch 3"):
        fit(best, small_classes, tmp_path, **{**options, "epochs": 1})
    _, history = fit(best, small_classes, tmp_path, **{**options, "epochs": 4})
    assert history["epoch"][-1] == best.step // 4 + 4


def test_what_is_not_json_is_no_configuration(tmp_path: Path, small_state, small_classes) -> None:
    for value in (np.ones(2), LOSS, {"deep": {LOSS}}):
        with pytest.raises(jt.InputError, match="what JSON can"):
            fit(small_state, small_classes, tmp_path, configuration={"odd": value})


def test_a_name_of_the_users_hides_nothing(tmp_path: Path, small_state, small_classes) -> None:
    named = {"batch_size": "as always"}
    fit(small_state, small_classes, tmp_path, configuration=named)
    with pytest.raises(jt.InputError, match="batch_size was 16 and is now 17"):
        fit(small_state, small_classes, tmp_path, configuration=named, batch_size=17)


def test_other_peoples_folders_are_left_alone(tmp_path: Path, small_state, small_classes) -> None:
    for name in ("0", "7", "007", "2024", "epoch-01", "epoch-x", "thesis.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    fit(small_state, small_classes, tmp_path, epochs=5, keep=1)
    assert list_epochs(tmp_path) == [5]
    assert len(list(tmp_path.glob("*/thesis.txt"))) == 7


def test_a_file_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, trained, monkeypatch
) -> None:
    """Too many open files, say: the checkpoint may be whole and stays where it is."""
    state, data, _, original = trained
    shutil.copytree(original, tmp_path / "a")

    def refuse(path: Path) -> str:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(checkpoint_files, "_digest_file", refuse)
    with pytest.raises(jt.InputError, match=r"epoch-3 cannot be read \(Too many open files\)"):
        fit(state, data, tmp_path / "a", epochs=4)
    assert list_epochs(tmp_path / "a") == [1, 2, 3]


def test_a_newer_format_is_no_damage(tmp_path: Path, trained) -> None:
    state, data, _, original = trained
    shutil.copytree(original, tmp_path / "a")
    file = tmp_path / "a" / "epoch-3" / "record.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    reseal(file.parent)
    with pytest.raises(jt.InputError, match="has the format 2, this jaxtrain has 1"):
        fit(state, data, tmp_path / "a", epochs=4)
    assert list_epochs(tmp_path / "a") == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 17}, "batch_size was 16 and is now 17"),
        ({"key": None}, "order of the examples was by key .* and is now as stored"),
        ({"loss_fn": jt.losses.soft_cross_entropy}, "loss was cross_entropy and is now soft_cross"),
        ({"metric_fns": {"accuracy": jt.metrics.accuracy}}, "columns was .* test_accuracy"),
        ({"epochs": 2}, "epochs is 2, but .* holds a checkpoint of epoch 3; expected at least 3"),
        (
            {"metric_fns": {"loss2": LOSS}},
            "metrics was cross_entropy and is now cross_entropy, c",
        ),
        ({"test_batch_size": 7}, "compiled evaluation .* was"),
        ({"patience": 5, "validation_data": True}, "patience was None and is now 5"),
        ({"configuration": {"note": 2}}, r"is of another run: note was 1 and is now 2; expected"),
        ({"resume": "never"}, "resume is 'never', but"),
    ],
)
def test_another_run_is_refused(tmp_path, small_state, small_classes, change, message) -> None:
    fit(small_state, small_classes, tmp_path, configuration={"note": 1})
    options = {"configuration": {"note": 1}, **change}
    data = small_classes
    if "validation_data" in change:
        options["validation_data"] = data
    if "loss_fn" in change:
        data = data._replace(targets=jax.nn.one_hot(data.targets, 3))
    with pytest.raises(jt.InputError, match=message):
        fit(small_state, data, tmp_path, **options)


def test_another_model_start_optimizer_or_data_set_is_refused(
    tmp_path: Path, small_state, small_classes
) -> None:
    fit(small_state, small_classes, tmp_path)
    inputs = small_classes.inputs

    def state(seed=0, dropout=0.2, width=8, rate=0.1, **options):
        model = jt.models.FeedForward((width, 3), dropout_rate=dropout, mean=0.0, std=1.0)
        optimizer = jt.optimizers.sgd(rate, **options)
        return jt.init_state(model, optimizer, inputs[:1], key=jax.random.key(seed))

    for other, message in [
        (state(dropout=0.3), r"model was FeedForward\(.*0\.2.* and is now FeedForward\(.*0\.3"),
        (state(seed=1), r"start \(by seed, optimizer and learning rate\) was"),
        (state(rate=0.2), r"start \(by seed, optimizer and learning rate\) was"),
        (state(momentum=0.9), "start .* was"),
        (state(weight_decay=0.1), "start .* was|compiled step .* was"),
    ]:
        with pytest.raises(jt.InputError, match=message):
            fit(other, small_classes, tmp_path)
    changed = small_classes._replace(inputs=inputs.at[3, 2].add(0.001))
    with pytest.raises(jt.InputError, match="training data was 50 examples with the sum"):
        fit(small_state, changed, tmp_path)
    fit(state(), small_classes, tmp_path)  # the same again is no other


def test_other_versions_are_said_and_taken(
    tmp_path: Path, small_state, small_classes, monkeypatch
) -> None:
    whole = fit(small_state, small_classes, None, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr("jaxtrain.versions.metadata.version", lambda name: "0.0.1")
        fit(small_state, small_classes, tmp_path, epochs=2)
    with pytest.warns(UserWarning, match=r"jax was 0\.0\.1 and is now .* last digits may differ"):
        assert_same_run(fit(small_state, small_classes, tmp_path, epochs=3), whole)


def test_must_insists(tmp_path: Path, small_state, small_classes) -> None:
    with pytest.raises(jt.InputError, match="resume is 'must' without checkpoint_dir"):
        fit(small_state, small_classes, None, resume="must")
    with pytest.raises(jt.InputError, match="checkpoint_dir is '', the current folder"):
        fit(small_state, small_classes, "")
    with pytest.raises(jt.InputError, match=r"resume is 'must', but .* holds no checkpoint"):
        fit(small_state, small_classes, tmp_path, resume="must")


def flip_a_byte(path: Path, choice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    path.write_bytes(content)


# In each place of a checkpoint.
DAMAGES = {
    "a byte flipped": lambda folder, file, choice: flip_a_byte(file, choice),
    "a file cut short": lambda folder, file, choice: os.truncate(
        file, choice.randrange(file.stat().st_size)
    ),
    "a byte more": lambda folder, file, choice: file.write_bytes(file.read_bytes() + b"\0"),
    "a file missing": lambda folder, file, choice: file.unlink(),
    "another file": lambda folder, file, choice: (folder / "arrays" / "more").write_bytes(b"1"),
    "an empty folder": lambda folder, file, choice: (shutil.rmtree(folder), folder.mkdir()),
    "a file in its place": lambda folder, file, choice: (
        shutil.rmtree(folder),
        folder.write_bytes(b""),
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple:
    """A run of three epochs, its four-epoch whole, and its checkpoints 1, 2, 3."""
    folder = tmp_path_factory.mktemp("trained")
    labels = jnp.arange(30) % 3
    data = jt.Dataset(jax.nn.one_hot(labels, 4) + 0.1 * jnp.arange(4), labels)
    model = jt.models.FeedForward(features=(4, 3), dropout_rate=0.2, mean=0.0, std=1.0)
    optimizer = jt.optimizers.sgd(0.1, momentum=0.9)
    state = jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))
    fit(state, data, folder, epochs=3)
    return state, data, fit(state, data, None, epochs=4), folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    tmp_path: Path, trained, damage: str
) -> None:
    """In every file of it."""
    state, data, whole, original = trained
    choice = random.Random(0)
    everywhere = damage in ("a byte flipped", "a file cut short", "a byte more", "a file missing")
    files = sorted(path for path in (original / "epoch-3").rglob("*") if path.is_file())
    for number, name in enumerate(files if everywhere else files[:1]):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        DAMAGES[damage](folder / "epoch-3", folder / name.relative_to(original), choice)
        if number % 5 == 0:
            with pytest.warns(UserWarning, match="checkpoint of epoch 3 is damaged .* epoch 2"):
                result = fit(state, data, folder, epochs=4)
            assert_same_run(result, whole)
            assert list_epochs(folder) == [2, 3, 4]
            assert (folder / "epoch-3.damaged").exists()
        else:
            with pytest.raises(checkpoint_files.DamagedError):
                read_checkpoint(folder / "epoch-3")


@pytest.mark.parametrize("change", [("\n", "\x0b"), ("\n", "\r"), ("\n", "\u2028"), ("\n", "\n\n")])
def test_sums_that_differ_only_in_how_lines_end_are_damaged(tmp_path, trained, change) -> None:
    folder = tmp_path / "epoch-3"
    shutil.copytree(trained[3] / "epoch-3", folder)
    file = folder / "SHA256SUMS"
    file.write_bytes(file.read_bytes().decode().replace(*change, 1).encode())
    with pytest.raises(checkpoint_files.DamagedError, match=r"is (no list of|in no list of) sums"):
        read_checkpoint(folder)


def test_two_damaged_ones_and_all_of_them(tmp_path: Path, trained) -> None:
    state, data, whole, original = trained
    shutil.copytree(original, tmp_path / "a")
    (tmp_path / "a" / "epoch-3" / "record.json").unlink()
    (tmp_path / "a" / "epoch-2" / "SHA256SUMS").write_text("")
    with pytest.warns(UserWarning, match="going on from epoch 1") as told:
        assert_same_run(fit(state, data, tmp_path / "a", epochs=4), whole)
    assert len(told) == 2
    assert (tmp_path / "a" / "epoch-2.damaged").is_dir()
    assert (tmp_path / "a" / "epoch-3.damaged").is_dir()
    shutil.copytree(original, tmp_path / "b")
    for epoch in (1, 2, 3):
        (tmp_path / "b" / f"epoch-{epoch}" / "SHA256SUMS").write_text("")
    for _ in range(2):  # nothing is set aside, so that it is not begun anew unasked
        with pytest.raises(jt.InputError, match=r"holds no whole checkpoint .*; delete"):
            fit(state, data, tmp_path / "b", epochs=4)


def test_a_checkpoint_under_another_epochs_name_is_not_taken(tmp_path: Path, trained) -> None:
    state, data, whole, original = trained
    shutil.copytree(original, tmp_path / "a")
    os.rename(tmp_path / "a" / "epoch-3", tmp_path / "a" / "epoch-4")
    with pytest.warns(UserWarning, match=r"epoch-4 is that of epoch 3\) .* going on from epoch 2"):
        assert_same_run(fit(state, data, tmp_path / "a", epochs=4), whole)


def test_what_is_left_of_a_killed_writer_is_not_taken(tmp_path: Path, trained) -> None:
    state, data, whole, original = trained
    shutil.copytree(original, tmp_path / "c")
    os.rename(tmp_path / "c" / "epoch-3", tmp_path / "c" / "epoch-3.unfinished")
    assert_same_run(fit(state, data, tmp_path / "c", epochs=4), whole)
    assert not list((tmp_path / "c").glob("*.unfinished"))


def reseal(folder: Path) -> None:
    """Sums that are right for whatever lies there, as a forger would make them."""
    names = [name for name in checkpoint_files._files(folder) if name != "SHA256SUMS"]
    sums = [f"{checkpoint_files._digest_file(folder / name)}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


# Where one of many arrays cannot be read, Orbax closes its event loop on those still being read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, trained) -> None:
    """Pickles and code in every file of it, with sums that fit."""
    state, data, _, original = trained
    trace = tmp_path / "executed"
    array = io.BytesIO()
    np.save(array, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(trace)))
    code = f"__import__('os').mkdir({str(trace)!r})"
    plants = [pickle.dumps(Bomb(trace)), array.getvalue(), archive.getvalue(), code.encode()]
    files = sorted(path for path in (original / "epoch-3").rglob("*") if path.is_file())
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        (folder / name.relative_to(original)).write_bytes(plants[number % len(plants)])
        if name.name != "SHA256SUMS":
            reseal(folder / "epoch-3")
        try:
            with pytest.warns(UserWarning, match="is damaged"):
                fit(state, data, folder, epochs=3)
        except pytest.fail.Exception:  # a file that Orbax writes and does not read
            assert name.name in ("commit_success.txt", "_CHECKPOINT_METADATA")
        assert not trace.exists()
    # Element types of Python objects, and code as names, in the record.
    for number, change in enumerate(["object", "O", code]):
        folder = tmp_path / f"record{number}"
        shutil.copytree(original, folder)
        record = json.loads((folder / "epoch-3" / "record.json").read_text())
        for spec in record["stored"].values():
            spec["dtype"] = change
        (folder / "epoch-3" / "record.json").write_text(json.dumps(record))
        reseal(folder / "epoch-3")
        with pytest.raises(checkpoint_files.DamagedError):
            read_checkpoint(folder / "epoch-3")
        assert not trace.exists()
    os.mkdir(trace)  # the bombs are real: what they would do can be done
    trace.rmdir()
    pickle.loads(plants[0])
    assert trace.exists()


def test_no_code_of_ours_can_unpickle_or_evaluate() -> None:
    sources = "".join(path.read_text() for path in Path(jt.__file__).parent.rglob("*.py"))
    for word in ("import pickle", "eval(", "exec(", "allow_pickle=True", "np.load(", "__import__"):
        assert word not in sources


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with store(tmp_path), pytest.raises(jt.InputError, match="in use by another run"):
        store(tmp_path).__enter__()
    with store(tmp_path):
        pass


def test_a_program_may_change_its_directory(
    tmp_path: Path, small_state, small_classes, monkeypatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def report(event) -> None:
        if isinstance(event, EpochDone):
            os.chdir(tmp_path / "elsewhere")

    fit(small_state, small_classes, Path("checkpoints"), report=report)
    assert list_epochs(tmp_path / "checkpoints") == [1, 2, 3]


def test_a_folder_whose_entering_fails_is_let_go(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "epoch-1.unfinished").mkdir()

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).__enter__()
    with store(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, small_state, small_classes) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(jt.InputError, match=r"checkpoint folder .*file.* cannot be written"):
        fit(small_state, small_classes, tmp_path / "file" / "below")


def test_a_folder_that_goes_away_stops_the_run(tmp_path: Path, small_state, small_classes) -> None:
    def report(event) -> None:
        if isinstance(event, EpochDone) and event.epoch == 2:
            while list_epochs(tmp_path / "checkpoints") != [1]:  # it is being written
                time.sleep(0.001)
            os.rename(tmp_path / "checkpoints", tmp_path / "elsewhere")

    with pytest.raises(jt.StorageError, match="could not be written"):
        fit(small_state, small_classes, tmp_path / "checkpoints", epochs=9, report=report)


def test_orbax_alone_reads_the_arrays(trained) -> None:
    import orbax.checkpoint as ocp

    _, _, _, folder = trained
    record, leaves = read_checkpoint(folder / "epoch-3")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as reader:
        found = reader.restore(folder / "epoch-3" / "arrays")
    for name, array in found.items():
        np.testing.assert_array_equal(array, leaves[name])
    kernel = next(
        number
        for number, spec in enumerate(record["trees"]["state"])
        if spec["path"] == ".params['Dense_0']['kernel']"
    )
    assert found[f"state_{kernel}"].shape == (4, 4)
