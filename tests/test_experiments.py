"""The scripts: their figures, files and flags; and as a user runs them, in processes."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxtrain as jt
from experiments import (
    gradient_descent,
    learning_rate,
    linear_regression,
    loss_landscape,
    losses,
    minibatch_regression,
    mnist,
    optimizers,
    speedrun,
    sweep,
)
from jaxtrain.cli import command, plots, tables
from jaxtrain.cli.flags import OptimizerName, TrainingFlags

ROOT = Path(__file__).parents[1]
COMMON = {
    *("experiment", "dataset", "epochs", "seed", "device", "train_loss", "test_loss"),
    *("compile_seconds", "train_seconds", "total_seconds", "versions"),
}
SCRIPTS = [
    *(gradient_descent, learning_rate, linear_regression, loss_landscape, losses),
    *(minibatch_regression, mnist, optimizers, speedrun, sweep),
]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """No MNIST on disk, and no network: a proxy that does not exist."""
    nowhere = "http://127.0.0.1:9"
    inherited = {name: value for name, value in os.environ.items() if name != "JAXTRAIN_DATA_DIR"}
    cache = str(tmp_path / "cache")
    proxies = {"XDG_CACHE_HOME": cache, "https_proxy": nowhere, "http_proxy": nowhere}
    return {**inherited, **proxies, "COLUMNS": "120"}


def run(environment, script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / f"{script}.py", *map(str, flags)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def main(monkeypatch, capsys):
    """Calls a script in this process; returns its status, and what it prints on stderr, stdout."""

    def call(script, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            command.main(script.Config, script.run)
        out, err = capsys.readouterr()
        return ended.value.code, err, out

    return call


def read_history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[!.]*")}


def assert_one_line_error(status: int, err: str, out: str, *parts: str) -> None:
    assert status == 1, err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert out == ""


def test_mnist_without_network_trains_on_digits_and_says_so(environment, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    flags = ("--epochs", 8, "--optimizer", "adam", "--learning-rate", 0.003)
    result = run(environment, "mnist", "--output-dir", folder, *flags)
    assert result.returncode == 0, result.stderr
    assert "This is not MNIST" in result.stderr
    assert "$JAXTRAIN_DATA_DIR" in result.stderr
    assert "epoch 8:" in result.stderr
    assert "digits (this is not MNIST)" in result.stdout
    assert result.stdout.splitlines()[-1] == f"results: {folder}"
    assert "\x1b" not in result.stdout + result.stderr
    assert names_of(folder) == {
        *("config.json", "summary.json", "history.csv", "model.safetensors"),
        *("learning_curves.png", "predictions.png", "confusion_matrix.png"),
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= COMMON | {"test_accuracy", "notice"}
    assert (summary["dataset"], summary["epochs"]) == ("digits", 8)
    assert summary["test_accuracy"] > 0.9
    _, test = jt.data.load("digits")
    mean, std = jt.data.STATISTICS["digits"]
    model = jt.models.FeedForward(mean=mean, std=std)
    state = jt.init_state(model, jt.optimizers.sgd(0.01), test.inputs[:1], key=jax.random.key(9))
    trained = jt.load(folder / "model.safetensors", state)
    metrics = jt.evaluate(trained, test, mnist.LOSS, mnist.METRICS)
    assert float(metrics["accuracy"]) == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert list(read_history(folder)[0]) == [
        *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("learning_rate", "seconds"),
    ]


def test_mnist_asked_for_by_name_never_falls_back(environment, tmp_path: Path) -> None:
    result = run(environment, "mnist", "--dataset", "mnist", "--output-dir", tmp_path / "out")
    hints = ("--data-dir", "$JAXTRAIN_DATA_DIR", "t10k-labels-idx1-ubyte", "--dataset digits")
    assert_one_line_error(result.returncode, result.stderr, result.stdout, *hints)
    assert names_of(tmp_path / "out") == set()


def test_mistakes_end_with_one_sentence(main, tmp_path: Path) -> None:
    flags = ("--dataset", "digits", "--output-dir", tmp_path, "--log-interval", 0)
    wrong = main(mnist, *flags, "--optimizer", "adam", "--momentum", 0.9)
    assert_one_line_error(*wrong, "momentum is 0.9", "(--momentum)")
    diverged = main(mnist, *flags, "--learning-rate", 1e30)
    assert_one_line_error(*diverged, "at learning rate 1e+30", "--max-gradient-norm 1")
    status, err, _ = main(mnist, "--log", "tensorbord")
    assert status == 2
    assert "invalid choice 'tensorbord' for argument '--log'" in err
    if jax.default_backend() != "gpu":
        gpu = main(losses, "--device", "gpu", "--output-dir", tmp_path)
        assert_one_line_error(*gpu, "--device is gpu", "jaxtrain[cuda]", "--device cpu")


def test_help_names_every_flag(main) -> None:
    status, _, shown = main(mnist, "--help")
    assert status == 0
    for field in dataclasses.fields(mnist.Config):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", shown)


def test_digits_are_trained_for_longer_than_mnist() -> None:
    found = [mnist.with_defaults(mnist.Config(), name) for name in ("mnist", "digits")]
    assert [(each.epochs, each.learning_rate) for each in found] == [(5, 0.01), (60, 0.05)]


def test_a_terminal_shows_a_progress_bar(environment, tmp_path: Path) -> None:
    terminal, screen = pty.openpty()
    flags = ["--epochs", "3", "--output-dir", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "experiments/linear_regression.py", *flags],
        env={**environment, "TERM": "xterm-256color"},
        cwd=ROOT,
        stdout=screen,
        stderr=screen,
    )
    os.close(screen)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(terminal)
    assert process.wait(30) == 0
    for part in ("━", "epoch 3/3", "epoch 3:"):
        assert part in shown.decode()


def test_a_logger_without_its_package_is_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(jt.errors.MissingExtraError, match=r"pip install 'jaxtrain\[wandb\]'"):
        mnist.run(mnist.Config(tmp_path / "out", log=("csv", "wandb")))
    assert not (tmp_path / "out").exists()


# Script, flags, pictures: all that finish within seconds.
QUICK = [
    (linear_regression, {"epochs": 400}, {"fit", "last_epochs", "learning_curves"}),
    (linear_regression, {"loss": "mean_squared_error", "optimizer": "lbfgs"}, {"fit"}),
    (losses, {}, {"losses"}),
    (loss_landscape, {}, {"loss_curve", "loss_surface"}),
    (loss_landscape, {"as_published": True}, {"loss_surface"}),
    (gradient_descent, {}, {"descent", "descent_on_surface"}),
    (gradient_descent, {"as_published": True}, {"descent"}),
    (learning_rate, {}, {"learning_rates"}),
    (learning_rate, {"learning_rates": (0.5, 1.0)}, {"learning_rates"}),  # both diverge
    (minibatch_regression, {}, {"fit", "path"}),
    (minibatch_regression, {"as_published": True}, {"fit", "path"}),
]


@pytest.mark.parametrize(
    ("script", "flags", "pictures"), QUICK, ids=lambda value: getattr(value, "__name__", "")
)
def test_tutorials_reach_their_figures(script, flags, pictures, tmp_path, capsys) -> None:
    """Figures are those of `TUTORIALS.md`; log_interval 0 prints nothing on stderr."""
    if issubclass(script.Config, TrainingFlags):
        flags = {"log_interval": 0, **flags}
    summary = script.run(script.Config(**flags, output_dir=tmp_path))
    assert all(tables.Comparison(**row).agrees for row in summary["figures"])
    assert summary["figures"] or "optimizer" in flags or script is loss_landscape
    assert {path.stem for path in tmp_path.glob("*.png")} >= pictures
    assert {f"{name}.png" for name in pictures} <= set(summary["pictures"])
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["figures"] == summary["figures"]
    assert written.keys() >= COMMON
    assert read_history(tmp_path)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"results: {tmp_path}"
    assert captured.err == ""


def test_linear_regression_writes_what_others_rely_on(tmp_path: Path, capsys) -> None:
    config = linear_regression.Config(output_dir=tmp_path, log=("jsonl",))
    summary = linear_regression.run(config)
    assert summary["weight"] == pytest.approx(0.6990308165550232, abs=1e-6)
    assert summary["bias"] == pytest.approx(0.3093104660511017, abs=1e-6)
    assert names_of(tmp_path) == {
        *("config.json", "summary.json", "history.csv", "model.safetensors", "log.jsonl"),
        *("learning_curves.png", "fit.png", "last_epochs.png"),
    }
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 200
    rows = read_history(tmp_path)
    assert len(rows) == 200
    assert rows[0].keys() >= {"epoch", "train_loss", "test_loss", "seconds", "weight", "bias"}
    captured = capsys.readouterr()
    assert "│ 0.6990, true 0.7" in captured.out
    assert "epoch 10: train loss 0.2092  test loss 0.3598" in captured.err
    with pytest.raises(jt.errors.InputError, match="contains a finished run"):
        linear_regression.run(config)


def digits_losses(folder: Path, **flags) -> list[str]:
    flags |= {"dataset": "digits", "epochs": 2, "log_interval": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "of_classifier", lambda *_: {})  # pictures take longer than epochs
        mnist.run(mnist.Config(folder, **flags))
    return [row["test_loss"] for row in read_history(folder)]


@pytest.fixture(scope="module")
def usual_losses(tmp_path_factory) -> list[str]:
    return digits_losses(tmp_path_factory.mktemp("usual"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag",
    [
        *({"batch_size": 32}, {"learning_rate": 0.02}, {"weight_decay": 0.5}, {"momentum": 0.9}),
        *({"optimizer": "adam"}, {"gamma": 0.5}, {"dropout": 0.5}, {"seed": 43}),
        *({"shuffle": False}, {"max_gradient_norm": 0.1}),
    ],
    ids=str,
)
def test_every_flag_changes_the_training(flag, usual_losses, tmp_path: Path) -> None:
    assert digits_losses(tmp_path, **flag) != usual_losses


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (learning_rate, {"learning_rates": ()}, "--learning-rates is empty"),
        (learning_rate, {"learning_rates": (0.1, -1.0)}, r"learning_rate is -1\.0"),
        (learning_rate, {"max_steps": 10**11}, "max_steps is 100000000000"),
        (optimizers, {"sweep_epochs": 0}, "sweep_epochs is 0"),
        (minibatch_regression, {"epochs": -1}, "epochs is -1"),
        (minibatch_regression, {"optimizer": "lbfgs"}, "line search"),
        (linear_regression, {"log_interval": -1}, "log_interval is -1"),
        (linear_regression, {"resume": "required"}, "without --checkpoint-dir"),
        (mnist, {"dataset": "digits", "batch_size": 0}, "batch_size is 0"),
        (mnist, {"dataset": "digits", "patience": 3}, "validation_loss"),
        (mnist, {"dataset": "digits", "validation": 1.5}, r"fraction is 1\.5"),
        (speedrun, {"seeds": 0}, "seeds is 0"),
        (speedrun, {"dataset": "digits", "warmup": -1.0}, r"pct_start is -1\.0"),
        (sweep, {"dataset": "digits", "seeds": 1, "at_once": 0}, "at_once is 0"),
    ],
)
def test_a_flag_out_of_range_is_named_and_earlier_results_stay(
    script, flags, message, tmp_path: Path
) -> None:
    (tmp_path / "history.csv").write_text("of an earlier run")
    with pytest.raises(jt.errors.InputError, match=message):
        script.run(script.Config(**flags, output_dir=tmp_path))
    assert names_of(tmp_path) == {"history.csv"}


def test_mini_batches_in_pytorchs_order_end_where_pytorch_does() -> None:
    """T5's reference run: start and permutations of torch's seed 0."""
    torch = pytest.importorskip("torch")
    data = jt.data.noisy_line(150, 2.0, 6.0, 0.3, seed=100, width=5.0)
    torch.manual_seed(0)
    start = torch.randn(1).item(), torch.randn(1).item()
    expected = minibatch_regression.START_WEIGHT, minibatch_regression.START_BIAS
    assert start == pytest.approx(expected)
    model, optimizer = jt.models.LinearRegression(), jt.optimizers.sgd(0.01)
    state = jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))
    state = state.replace(params={"weight": jnp.array([start[:1]]), "bias": jnp.array(start[1:])})
    loader = torch.utils.data.DataLoader(torch.arange(150), batch_size=150, shuffle=True)
    for _ in range(99):
        (order,) = loader
        shuffled = data.take(jnp.asarray(order.numpy()))
        state, _ = jt.train_epoch(state, shuffled, minibatch_regression.LOSS, batch_size=20)
    assert state.params["weight"].item() == pytest.approx(2.0620, abs=5e-5)
    assert state.params["bias"].item() == pytest.approx(5.8549, abs=5e-5)
    loss = jt.evaluate(state, data, minibatch_regression.LOSS)["loss"].item()
    assert loss == pytest.approx(0.10407, abs=5e-6)


def test_a_figure_out_of_tolerance_is_marked() -> None:
    rows = [tables.Comparison("a", 1.0, 1.1, 0.2), tables.Comparison("b", 1.0, 1.3, 0.2)]
    assert [row.agrees for row in rows] == [True, False]
    assert list(tables.comparison_rows(rows)) == [
        ("a", "1.000", "1.100", "+1.0e-01"),
        ("b", "1.000", "1.300", "+3.0e-01  ✗ more than 0.2"),
    ]


@pytest.mark.slow
def test_eight_solvers_on_digits(tmp_path: Path, monkeypatch) -> None:
    """Two of them choose among several rates, in batches and with all examples."""
    for name, rates in optimizers.CANDIDATES.items():
        if name not in ("adam", "rprop"):
            monkeypatch.setitem(optimizers.CANDIDATES, name, rates[-2:][:1])
    config = optimizers.Config(
        dataset="digits", examples=400, epochs=3, log_interval=0, output_dir=tmp_path
    )
    summary = optimizers.run(config)
    assert summary["solvers"].keys() == set(get_args(OptimizerName))
    assert len(read_history(tmp_path)) == 8 * 3
    assert (tmp_path / "optimizers.png").exists()
    assert all(np.isfinite(solver["test_loss"]) for solver in summary["solvers"].values())
    assert summary["test_accuracy"] > 0.6


def test_a_sweep_on_digits(tmp_path: Path, capsys) -> None:
    folder, grid = tmp_path / "out", {"learning_rates": (0.01, 0.1), "seeds": 2, "epochs": 3}
    checkpoints = tmp_path / "checkpoints"
    config = sweep.Config(folder, dataset="digits", checkpoint_dir=checkpoints, **grid)
    summary = sweep.run(config)
    assert names_of(folder) == {
        *("config.json", "summary.json", "history.csv", "model.safetensors", "sweep.safetensors"),
        *("heat_map.png", "learning_rates.png"),
    }
    assert summary["learning_rate"] == 0.1
    losses = jt.load_sweep(folder / "sweep.safetensors").final("train_loss")
    found = [row["train_loss"] for row in summary["table"]]  # numbers, not text
    assert found == pytest.approx(losses.mean(axis=1).tolist())
    assert len(read_history(folder)) == 2 * 2 * 3
    assert jt.load_sweep(folder / "sweep.safetensors")["test_accuracy"].shape == (2, 2, 3)
    output = capsys.readouterr()
    assert "4/4 runs" in output.err
    assert "learning_rate" in output.out
    again = sweep.run(dataclasses.replace(config, overwrite=True))
    assert "4/4 runs restored from the checkpoint folder" in capsys.readouterr().err
    assert again["test_accuracy"] == summary["test_accuracy"]


def test_a_speedrun_on_digits(tmp_path: Path, capsys) -> None:
    summary = speedrun.run(speedrun.Config(tmp_path, dataset="digits", seeds=2, epochs=2))
    assert names_of(tmp_path) == {
        *("config.json", "summary.json", "history.csv", "model.safetensors", "accuracies.png")
    }
    assert summary.keys() >= COMMON
    assert summary["test_accuracy"] == pytest.approx(np.mean(summary["test_accuracies"]))
    assert summary["lowest_test_accuracy"] == min(summary["test_accuracies"]) > 0.85
    assert len({row["test_loss"] for row in read_history(tmp_path)}) == 2 * 2  # the seeds differ
    output = capsys.readouterr()
    assert "2/2 runs" in output.err
    assert f"{summary['lowest_test_accuracy']:.2%} lowest" in output.out


def test_mnist_with_a_range_test_validation_and_early_stopping(tmp_path: Path) -> None:
    config = mnist.Config(
        tmp_path,
        dataset="digits",
        find_learning_rate=True,
        validation=0.2,
        patience=2,
        log_interval=0,
    )
    summary = mnist.run(config)
    rate = summary["learning_rate"]
    assert 0.03 < rate < 0.5
    assert {"range_test.png", "overfitting.png"} <= set(summary["pictures"])
    found = [float(row["validation_loss"]) for row in read_history(tmp_path)]
    assert len(found) == int(np.argmin(found)) + 1 + 2 < 60
    explicit = {"find_learning_rate": False, "learning_rate": rate, "overwrite": True}
    again = mnist.run(dataclasses.replace(config, **explicit))
    assert again["test_loss"] == summary["test_loss"]
    assert not (tmp_path / "range_test.png").exists()


def test_each_run_of_an_experiment_has_its_own_logs_with_pictures(tmp_path: Path) -> None:
    names = ("csv", "jsonl", "tensorboard")
    config = gradient_descent.Config(tmp_path, epochs=2, log_interval=0, log=names)
    gradient_descent.run(config)
    for part, steps in (("batch", [1, 2]), ("stochastic", [1, 2, 3, 4, 5, 6])):
        assert len((tmp_path / f"log_{part}.jsonl").read_text().splitlines()) == len(steps) + 2
        assert (tmp_path / f"steps_{part}.csv").read_text().count("\n") == len(steps) + 1
        events = EventAccumulator(str(tmp_path / "tensorboard" / part)).Reload()
        assert [event.step for event in events.Scalars("step_loss")] == steps
    pictures = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert pictures.Tags()["images"] == ["descent", "descent_on_surface"]


def test_a_resumed_run_continues_its_logs(tmp_path: Path) -> None:
    folder, checkpoints = tmp_path / "out", tmp_path / "checkpoints"
    options = {"log_interval": 0, "log": ("jsonl",), "checkpoint_dir": checkpoints}
    for epochs in (2, 3):
        minibatch_regression.run(minibatch_regression.Config(folder, epochs=epochs, **options))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 25))
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [1, 2, 3]
