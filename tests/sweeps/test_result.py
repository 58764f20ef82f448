"""SweepResult: the best run, tables, files and pictures of a sweep solved by hand."""

from __future__ import annotations

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from tests.checkpoint.helpers import forge


def run(slope, seed):
    """Loss after epoch t: slope / t + seed; NaN for slope 9."""
    epoch = jnp.arange(1, 5)
    loss = jnp.where(slope == 9, jnp.nan, slope / epoch + seed)
    return {
        "epoch": epoch,
        "test_loss": loss,
        "test_accuracy": 1 / (1 + loss),
        "step_losses": jnp.stack([loss, loss], axis=1),
    }


@pytest.fixture(scope="module")
def result() -> jt.sweeps.SweepResult:
    return jt.sweep(run, {"slope": [4.0, 8.0], "seed": [0, 1, 2]})


@pytest.fixture(scope="module")
def diverged() -> jt.sweeps.SweepResult:
    return jt.sweep(run, {"slope": [4.0, 9.0], "seed": [0, 1, 2]})


def test_final_is_the_last_epoch(result) -> None:
    assert result.final("test_loss").tolist() == [[1, 2, 3], [2, 3, 4]]


def test_final_is_the_best_epoch_after_early_stopping(small_state, small_classes, tmp_path) -> None:
    train, validation = small_classes.split(0.2, jax.random.key(0))

    def run(learning_rate):
        state = jt.with_optimizer(small_state, jt.optimizers.sgd(learning_rate))
        return jt.train(
            state,
            train,
            validation=validation,
            loss_fn=jt.losses.cross_entropy,
            epochs=30,
            batch_size=16,
            early_stopping=jt.callbacks.early_stopping(2),
        )

    result = jt.sweep(run, {"learning_rate": [1.0, 3.0]}, at_once=2)
    losses = result["validation_loss"]
    assert np.isnan(losses).any()
    np.testing.assert_array_equal(result.final("validation_loss"), np.nanmin(losses, axis=1))
    frame = result.to_pandas()
    assert len(frame) == np.isfinite(losses).sum()
    assert frame.groupby("run")["epoch"].max().tolist() == np.isfinite(losses).sum(axis=1).tolist()
    result.save(tmp_path / "sweep.safetensors")
    loaded = jt.load_sweep(tmp_path / "sweep.safetensors")
    np.testing.assert_array_equal(loaded.final("validation_loss"), result.final("validation_loss"))


def test_final_metrics_of_a_diverged_run_are_nan() -> None:
    def run(slope):
        return {
            "train_loss": jnp.full(2, jnp.where(slope > 1, jnp.nan, slope)),
            "test_accuracy": jnp.array([0.2, 0.1]),
            "epoch": jnp.array([1, 2]),
        }

    result = jt.sweep(run, {"slope": [1.0, 2.0]})
    np.testing.assert_array_equal(result.final("test_accuracy"), np.float32([0.1, np.nan]))
    assert result.final("epoch").tolist() == [2, 2]


def test_best_is_smallest_or_largest_by_the_name_of_the_column(result) -> None:
    best = result.best("test_loss")
    assert best.configuration == {"slope": 4.0, "seed": 0}
    assert best.history["test_loss"].tolist() == pytest.approx([4, 2, 4 / 3, 1])
    assert best.state is None
    assert result.best("test_accuracy").configuration == best.configuration
    assert result.best("test_accuracy", mode="min").configuration == {"slope": 8.0, "seed": 2}


def test_best_over_seeds_is_not_the_run_with_the_luckiest_seed() -> None:
    losses = jnp.array([[0.0, 9.0, 9.0], [3.0, 2.0, 4.0], [0.0, 0.0, jnp.nan]])  # means 6, 3, nan
    result = jt.sweep(lambda a, seed: {"loss": losses[a, seed]}, {"a": [0, 1, 2], "seed": range(3)})
    assert result.best("loss").configuration == {"a": 0, "seed": 0}
    assert result.best("loss", over="seed").configuration == {"a": 1, "seed": 0}
    assert result.best("loss", over=["a"]).configuration == {"a": 0, "seed": 0}


def test_best_skips_diverged_runs_unless_all_have_diverged(diverged) -> None:
    assert diverged.best("test_accuracy", mode="min").configuration == {"slope": 4.0, "seed": 2}
    nan = jt.sweep(run, {"slope": [9.0], "seed": [0, 1]})
    with pytest.raises(jt.errors.InputError, match="test_loss is NaN in all 2 runs"):
        nan.best("test_loss")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda result: result["loss"],
            "no column 'loss'; expected one of epoch, test_loss, test_accuracy, step_losses",
        ),
        (
            lambda result: result.final("step_losses"),
            r"'step_losses' has the shape \[4, 2\] in each run",
        ),
        (lambda result: result.table(over="x"), "over has 'x'; expected axes of the sweep: slope,"),
        (lambda result: result.line_plot("test_loss", x="x"), "the sweep has no axis 'x'"),
        (
            lambda result: result.line_plot("test_loss", over=["slope", "seed"]),
            r"all axes of the sweep \(slope, seed\); expected one",
        ),
        (
            lambda result: result.heat_map("test_loss", over=["slope", "seed"]),
            "over has slope, seed of slope, seed; expected all axes but two",
        ),
        (
            lambda result: result.heat_map("test_loss", over="seed", x="seed"),
            "the sweep has no axis 'seed' besides seed; expected one of slope",
        ),
    ],
)
def test_a_missing_column_or_axis_is_named(result, call, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        call(result)


def test_the_table_shows_mean_and_sample_standard_deviation(result) -> None:
    table = result.table(["test_loss"], over="seed")  # of 1, 2, 3 and 2, 3, 4
    assert str(table) == "slope  test_loss\n    4      2 ± 1\n    8      3 ± 1"
    assert table.frame.to_dict("records") == [
        {"slope": 4.0, "test_loss": 2.0, "test_loss_deviation": 1.0, "diverged": 0},
        {"slope": 8.0, "test_loss": 3.0, "test_loss_deviation": 1.0, "diverged": 0},
    ]
    assert len(result.table().frame) == 6
    assert str(result.table(["test_loss"], over=["slope", "seed"])) == "test_loss\n  2.5 ± 1"


def test_the_table_counts_diverged_runs(diverged) -> None:
    table = diverged.table("test_loss", over="seed")
    assert str(table).splitlines() == [
        "slope  test_loss  diverged",
        "    4      2 ± 1    0 of 3",
        "    9        nan    3 of 3",
    ]
    assert table.frame["diverged"].tolist() == [0, 3]


def test_a_column_with_the_name_of_an_axis_is_told_apart() -> None:
    result = jt.sweep(lambda rate, seed: {"rate": rate / 2}, {"rate": [1.0, 2.0], "seed": [0, 1]})
    assert str(result.table(over="seed")).splitlines()[0] == "rate  history_rate"
    assert result.line_plot("rate", over="seed").axes[0].lines[0].get_ydata().tolist() == [0.5, 1]
    assert result.heat_map("rate").axes[0].images[0].get_array().tolist() == [[0.5, 0.5], [1, 1]]


def test_a_data_frame_has_one_row_per_run_and_epoch(result) -> None:
    frame = result.to_pandas()
    names = ["run", "slope", "seed", "epoch", "test_loss", "test_accuracy", "step_losses"]
    assert list(frame.columns) == names
    assert len(frame) == 24
    assert frame.iloc[-1][["run", "slope", "seed", "epoch", "test_loss"]].tolist() == [
        5,
        8,
        2,
        4,
        4,
    ]
    assert frame["test_loss"].dtype == np.float32
    np.testing.assert_array_equal(frame["step_losses"][0], [4, 4])
    means = frame[frame["epoch"] == 4].groupby("slope")["test_loss"].mean()
    assert means.to_dict() == {4.0: 2, 8.0: 3}


def test_a_data_frame_of_runs_without_epochs_has_one_row_each() -> None:
    result = jt.sweep(lambda a: {"loss": a, "weights": a * jnp.ones((2, 2))}, {"a": [1.0, 2.0]})
    frame = result.to_pandas()
    assert frame["loss"].tolist() == [1, 2]
    assert frame["weights"][1].tolist() == [[2, 2], [2, 2]]


def test_csv_has_the_rows_of_the_data_frame_with_exact_values(tmp_path) -> None:
    def run(learning_rate):
        rates = learning_rate * jnp.ones(3)
        return {"epoch": jnp.arange(3), "learning_rate": rates, "steps": jnp.ones((3, 2))}

    jt.sweep(run, {"learning_rate": [0.0123456789]}).to_csv(tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "learning_rate", "epoch", "history_learning_rate"]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {row["learning_rate"] for row in rows} == {"0.0123456789"}


def test_a_saved_sweep_is_read_back(tmp_path) -> None:
    def run(widths, scale):
        return {"loss": scale * jnp.ones(len(widths)).sum()}

    axes = {"widths": [(2, 3), (4,)], "scale": [1.0, 0.5]}
    result = jt.sweep(run, axes)
    result.save(tmp_path / "sweep.safetensors")
    found = jt.load_sweep(tmp_path / "sweep.safetensors")
    assert found.axes == {"widths": ((2, 3), (4,)), "scale": (1.0, 0.5)}
    assert found.configurations == result.configurations
    assert found["loss"].tolist() == [[2, 1], [1, 0.5]]
    assert found.best("loss").configuration == {"widths": (4,), "scale": 0.5}
    assert str(found.table()) == str(result.table())


def test_another_file_is_no_sweep(small_state, tmp_path) -> None:
    jt.save(tmp_path / "params.safetensors", small_state)
    with pytest.raises(jt.errors.InputError, match=r"params\.safetensors"):
        jt.load_sweep(tmp_path / "params.safetensors")
    with pytest.raises(jt.errors.InputError, match="cannot be read"):
        jt.load_sweep(tmp_path / "missing")


def test_a_saved_sweep_that_contradicts_itself_is_no_sweep(tmp_path) -> None:
    """Each file has a correct checksum."""
    path = tmp_path / "sweep.safetensors"
    jt.sweep(lambda slope: {"loss": slope}, {"slope": range(4)}).save(path)
    content = path.read_bytes()
    for changes in (
        *({"indices": [[0, 1, 2]]}, {"indices": [[0, 1, 2, 2]]}, {"indices": [[0, 1, 2, 4]]}),
        *({"indices": [[0, 1], [2, 3]]}, {"indices": None}, {"indices": [[0, 1, 2, "3"]]}),
        *({"rows": [0]}, {"rows": ["a"] * 4}, {"rows": None}, {"columns": ["other"]}),
        *({"columns": 3}, {"sweep": {"axes": {}, "zipped": False}}, {"sweep": []}),
        {"sweep": {"axes": {name: [0] * 1000 for name in "abcdef"}, "zipped": False}},
        {"sweep": {"axes": {"slope": [0, 1, 2, 3], "other": [1]}, "zipped": True}},
    ):
        path.write_bytes(content)
        forge(path, lambda _, record, changes=changes: record["metadata"].update(changes))
        with pytest.raises(jt.errors.InputError, match="is not a saved sweep; expected a file"):
            jt.load_sweep(path)


def test_a_heat_map_shows_the_mean_over_the_other_axes() -> None:
    result = jt.sweep(
        lambda a, b, c: {"loss": 100.0 * a + 10.0 * b + c},
        {"a": [1, 2], "b": [0, 1, 2], "c": [1, 3]},
    )
    for axes in ({"x": "b", "y": "a"}, {"over": "c"}, {"over": ["c"], "x": "b"}):
        axis, _ = result.heat_map("loss", **axes).axes
        image = np.asarray(axis.images[0].get_array())
        assert image.tolist() == [[102, 112, 122], [202, 212, 222]]
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("b", "a")


def test_a_heat_map_needs_a_product_of_two_axes() -> None:
    axes = {"a": [1, 2], "b": [1, 2]}
    zipped = jt.sweep(lambda a, b: {"loss": a + b}, axes, zipped=True)
    with pytest.raises(jt.errors.InputError, match="axes a, b are zipped; expected a product"):
        zipped.heat_map("loss")
    with pytest.raises(jt.errors.InputError, match="expected two axes for a heat map"):
        jt.sweep(lambda a: {"loss": a}, {"a": [1, 2]}).heat_map("loss")
    with pytest.raises(jt.errors.InputError, match="no column 'x', since its runs return no hist"):
        jt.sweep(lambda a: a, {"a": [1]})["x"]


def test_a_line_plot_has_a_band_of_one_standard_deviation(result) -> None:
    figure = result.line_plot("test_loss", over="seed")
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [4, 8]
    assert line.get_ydata().tolist() == [2, 3]
    vertices = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {tuple(each) for each in vertices.tolist()} == {(4, 1), (4, 3), (8, 2), (8, 4)}
    lines = result.line_plot("test_loss", x="seed").axes[0].lines
    assert [each.get_label() for each in lines] == ["slope 4", "slope 8"]


def test_a_line_plot_is_drawn_from_left_to_right() -> None:
    result = jt.sweep(lambda rate: {"loss": 2 * rate}, {"rate": [0.5, 0.25, 1.0]})
    (line,) = result.line_plot("loss").axes[0].lines
    assert line.get_xdata().tolist() == [0.25, 0.5, 1]
    assert line.get_ydata().tolist() == [0.5, 1, 2]


def test_no_two_lines_look_the_same() -> None:
    result = jt.sweep(lambda a, b: {"loss": a + b}, {"a": [1.0, 2.0], "b": range(13)})
    lines = result.line_plot("loss", x="a").axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 13


@pytest.mark.filterwarnings("error")
def test_a_heat_map_of_diverged_runs_is_drawn() -> None:
    axes = {"a": [1, 2], "b": [1, 2]}
    figure = jt.sweep(lambda a, b: {"loss": jnp.nan * (a + b)}, axes).heat_map("loss")
    assert [text.get_text() for text in figure.axes[0].texts] == 4 * ["diverged"]


def test_the_representation_names_runs_axes_and_columns(result) -> None:
    assert repr(result) == (
        "SweepResult(6 runs, slope: 2, seed: 3; epoch, test_loss, test_accuracy, step_losses)"
    )
