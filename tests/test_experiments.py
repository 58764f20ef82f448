"""The scripts as a user runs them: output, files, and how errors end."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
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
from jaxtrain.cli import tables
from jaxtrain.cli.flags import OptimizerName, Safety, TrainingFlags
from jaxtrain.cli.runs import RunFolder

ROOT = Path(__file__).parents[1]
COMMON = {
    *("experiment", "dataset", "epochs", "seed", "device", "train_loss", "test_loss"),
    *("compile_seconds", "train_seconds", "total_seconds", "versions"),
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """No MNIST on disk, and no network: a proxy that does not exist."""
    nowhere = "http://127.0.0.1:9"
    inherited = {name: value for name, value in os.environ.items() if name != "JAXTRAIN_DATA_DIR"}
    return {
        **inherited,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "https_proxy": nowhere,
        "http_proxy": nowhere,
        "COLUMNS": "120",
    }


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


def read_history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def assert_one_line_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert result.stdout == ""


def test_linear_regression(environment, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run(environment, "linear_regression", "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == f"results: {folder}"
    assert "│ 0.6990, true 0.7" in result.stdout
    assert "epoch 10: train loss 0.2092  test loss 0.3598" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert {path.name for path in folder.glob("[!.]*")} == {
        *("config.json", "summary.json", "history.csv", "model.safetensors"),
        *("learning_curves.png", "fit.png", "last_epochs.png"),
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= COMMON | {"weight", "bias"}
    assert summary["weight"] == pytest.approx(0.6990308165550232, abs=1e-6)
    assert summary["bias"] == pytest.approx(0.3093104660511017, abs=1e-6)
    rows = read_history(folder)
    assert len(rows) == 200
    assert rows[0].keys() >= {"epoch", "train_loss", "test_loss", "seconds", "weight", "bias"}


def test_mnist_without_network_trains_on_digits_and_says_so(environment, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run(environment, "mnist", "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    assert "This is not MNIST" in result.stderr
    assert "$JAXTRAIN_DATA_DIR" in result.stderr
    assert "epoch 60:" in result.stderr
    assert "digits (this is not MNIST)" in result.stdout
    assert {path.name for path in folder.glob("[!.]*")} == {
        *("config.json", "summary.json", "history.csv", "model.safetensors"),
        *("learning_curves.png", "predictions.png", "confusion_matrix.png"),
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= COMMON | {"test_accuracy", "notice"}
    assert summary["dataset"] == "digits"
    assert "put train-images-idx3-ubyte" in summary["notice"]
    assert summary["test_accuracy"] > 0.9
    _, test = jt.data.load("digits")
    mean, std = jt.data.STATISTICS["digits"]
    state = jt.init_state(
        jt.models.FeedForward(mean=mean, std=std),
        jt.optimizers.sgd(0.01),
        test.inputs[:1],
        key=jax.random.key(9),
    )
    trained = jt.load(folder / "model.safetensors", state)
    metrics = jt.evaluate(trained, test, mnist.LOSS, mnist.METRICS)
    assert float(metrics["accuracy"]) == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert list(read_history(folder)[0]) == [
        *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("learning_rate", "seconds"),
    ]


def test_log_interval_0_prints_nothing_and_config_json_has_the_flags(
    environment, tmp_path: Path
) -> None:
    flags = {
        "--dataset": "digits",
        "--epochs": 2,
        "--batch-size": 32,
        "--test-batch-size": 50,
        "--learning-rate": 0.003,
        "--weight-decay": 0.01,
        "--optimizer": "adam",
        "--gamma": 0.5,
        "--dropout": 0.1,
        "--seed": 7,
        "--device": "cpu",
        "--log-interval": 0,
        "--output-dir": tmp_path / "out",
    }
    result = run(
        environment, "mnist", *(part for pair in flags.items() for part in pair), "--no-shuffle"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name, value in flags.items():
        expected = str(value) if isinstance(value, Path) else value
        assert config[name[2:].replace("-", "_")] == expected
    assert config["shuffle"] is False
    rates = [float(row["learning_rate"]) for row in read_history(tmp_path / "out")]
    assert rates == pytest.approx([0.003, 0.0015])


@pytest.mark.parametrize(
    "flag",
    [
        *({"batch_size": 32}, {"learning_rate": 0.02}, {"weight_decay": 0.5}, {"momentum": 0.9}),
        *({"optimizer": "adam"}, {"gamma": 0.5}, {"dropout": 0.5}, {"seed": 43}),
        {"shuffle": False},
    ],
    ids=str,
)
def test_every_flag_changes_the_training(flag, digits, tmp_path: Path) -> None:
    def step_losses(config: mnist.Config) -> np.ndarray:
        config = mnist.with_defaults(dataclasses.replace(config, epochs=2), "digits")
        start = mnist.make_start(config, digits)
        return mnist.train(config, digits, start, RunFolder(tmp_path, config))[1].step_losses

    plain = mnist.Config(log_interval=0)
    changed = step_losses(dataclasses.replace(plain, **flag))
    usual = step_losses(plain)
    assert len(changed) != len(usual) or (changed[24:] != usual[24:]).any()


def test_mnist_asked_for_by_name_never_falls_back(environment, tmp_path: Path) -> None:
    result = run(environment, "mnist", "--dataset", "mnist", "--output-dir", tmp_path / "out")
    assert_one_line_error(
        result,
        "the proxy cannot be reached",  # at the first attempt, not after a time limit
        *("--data-dir", "$JAXTRAIN_DATA_DIR", "t10k-labels-idx1-ubyte", "--dataset digits"),
    )
    assert not (tmp_path / "out" / "history.csv").exists()


def test_errors_end_with_one_sentence(environment, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    digits = ("--dataset", "digits", "--output-dir", tmp_path / "out")
    for flags, *parts in [
        (("--output-dir", tmp_path / "file"), f"{tmp_path}/file cannot be written"),
        ((*digits, "--epochs", -1), "epochs is -1", "at least 0"),
        ((*digits, "--learning-rate", -0.5), "learning_rate is -0.5", "not negative"),
        ((*digits, "--optimizer", "adam", "--momentum", 0.9), "momentum is 0.9"),
        ((*digits, "--learning-rate", 1e30), "step", "at learning rate 1e+30", "smaller"),
        ((*digits, "--dropout", 1.5), "dropout_rate is 1.5"),
        ((*digits, "--gamma", 0.9, "--batch-size", 0), "batch_size is 0"),
    ]:
        result = run(environment, "mnist", "--log-interval", 0, *flags)
        assert_one_line_error(result, *parts)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_a_missing_gpu_is_one_sentence(environment, tmp_path: Path) -> None:
    result = run(environment, "linear_regression", "--device", "gpu", "--output-dir", tmp_path)
    assert_one_line_error(result, "--device is gpu", "--device cpu")


@pytest.mark.parametrize("moment", ["compiling", "training"])
def test_ctrl_c_ends_with_one_line_and_keeps_the_completed_epochs(
    environment, tmp_path: Path, moment: str
) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, ROOT / "experiments" / "mnist.py", "--dataset", "digits"]
    flags = ["--epochs", "1000000", "--log-interval", "10", "--output-dir", folder]
    with subprocess.Popen(
        [*command, *flags], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        if moment == "training":
            for line in process.stderr:
                if line.startswith("epoch 3:"):
                    break
        else:
            while not folder.exists():
                time.sleep(0.05)
            time.sleep(1.5)  # after loading and initialization; compiling takes two seconds
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    last = rest.strip().splitlines()[-1]
    assert last.startswith("interrupted")
    assert "Traceback" not in rest
    if moment == "training":
        count = len(read_history(folder))
        assert count >= 3
        assert f"the completed epochs ({count}) are in {folder}/history.csv" in last
    elif "compiled in" not in rest:  # as on any but a much faster machine
        assert last == "interrupted"
        assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("script", "flags", "wrong", "message"),
    [
        (linear_regression, {"epochs": 5}, {"epochs": -1}, "epochs is -1"),
        (sweep, {"epochs": 1, "seeds": 1}, {"parallel": 0}, "at_once is 0"),
        (speedrun, {"seeds": 1}, {"learning_rate": -1.0}, r"learning_rate is -1\.0"),
    ],
)
def test_an_error_leaves_the_results_of_an_earlier_run(
    script, flags, wrong, message, tmp_path: Path
) -> None:
    images = {} if script is linear_regression else {"dataset": "digits"}
    config = script.Config(output_dir=tmp_path, overwrite=True, **images, **flags)
    script.run(config)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    assert "summary.json" in before
    with pytest.raises(jt.errors.InputError, match=message):
        script.run(dataclasses.replace(config, **wrong))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")} == before


def test_a_terminal_shows_a_progress_bar(environment, tmp_path: Path) -> None:
    terminal, screen = pty.openpty()
    command = [sys.executable, ROOT / "experiments" / "mnist.py", "--dataset", "digits"]
    process = subprocess.Popen(
        [*command, "--epochs", "3", "--output-dir", tmp_path / "out"],
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
    text = shown.decode()
    assert "━" in text
    assert "69/69" in text  # 3 epochs of 23 steps
    assert "epoch 3:" in text


SCRIPTS = [
    *(gradient_descent, learning_rate, linear_regression, loss_landscape, losses),
    *(minibatch_regression, mnist, optimizers, speedrun, sweep),
]
# Script, flags, pictures: all that finish within seconds.
QUICK = [
    (linear_regression, {"epochs": 400}, {"fit", "last_epochs", "learning_curves"}),
    (linear_regression, {"loss": "mean_squared_error", "optimizer": "adam"}, {"fit"}),
    (linear_regression, {"optimizer": "lbfgs", "loss": "mean_squared_error"}, {"fit"}),
    (losses, {}, {"losses"}),
    (loss_landscape, {}, {"loss_curve", "loss_surface"}),
    (loss_landscape, {"as_published": True}, {"loss_surface"}),
    (gradient_descent, {}, {"descent", "descent_on_surface"}),
    (gradient_descent, {"as_published": True}, {"descent"}),
    (gradient_descent, {"optimizer": "rprop"}, {"descent"}),
    (learning_rate, {}, {"learning_rates"}),
    (learning_rate, {"optimizer": "adam"}, {"learning_rates"}),
    (minibatch_regression, {}, {"fit", "path"}),
    (minibatch_regression, {"as_published": True}, {"fit", "path"}),
    (minibatch_regression, {"seed": 3}, {"fit", "path"}),
]


@pytest.mark.parametrize(
    ("script", "flags", "pictures"), QUICK, ids=lambda value: getattr(value, "__name__", "")
)
def test_tutorials_reach_their_figures(script, flags, pictures, tmp_path, capsys) -> None:
    if issubclass(script.Config, TrainingFlags):
        flags = {"log_interval": 0, **flags}
    summary = script.run(script.Config(**flags, output_dir=tmp_path))
    disagreeing = [row for row in summary["figures"] if not tables.Comparison(**row).agrees]
    assert not disagreeing
    if "optimizer" not in flags and "loss" not in flags and script is not loss_landscape:
        assert summary["figures"]
    assert {path.stem for path in tmp_path.glob("*.png")} >= pictures
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["figures"] == summary["figures"]
    assert written.keys() >= COMMON
    assert read_history(tmp_path)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"results: {tmp_path}"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (learning_rate, {"learning_rates": ()}, "--learning-rates is empty"),
        (learning_rate, {"threshold": float("nan")}, "--threshold is nan"),
        (learning_rate, {"threshold": 1e300}, r"--threshold is 1e\+300"),
        (learning_rate, {"max_steps": 10**11}, "max_steps is 100000000000"),
        (losses, {"weight": 1e38}, r"--weight is 1e\+38"),
        (learning_rate, {"learning_rates": (0.1, -1.0)}, r"learning_rate is -1\.0"),
        (optimizers, {"epochs": 0}, "epochs is 0"),
        (optimizers, {"sweep_epochs": 0}, "sweep_epochs is 0"),
        (minibatch_regression, {"epochs": -1}, "epochs is -1"),
        (minibatch_regression, {"optimizer": "lbfgs"}, "line search"),
        (mnist, {"dataset": "digits", "optimizer": "lbfgs"}, "expected --dropout 0"),
        (mnist, {"dataset": "digits", "patience": 3}, "--patience is 3 without validation data"),
        (mnist, {"dataset": "digits", "validation": 1.5}, r"fraction is 1\.5"),
        (
            mnist,
            {"find_learning_rate": True, "learning_rate": 0.1},
            "--learning-rate is 0.1 with --find-learning-rate",
        ),
        (
            mnist,
            {"dataset": "digits", "find_learning_rate": True, "optimizer": "lbfgs", "dropout": 0.0},
            "an optimizer with a line search, such as L-BFGS",
        ),
        (linear_regression, {"log_interval": -1}, "log_interval is -1"),
        (speedrun, {"seeds": 0}, "seeds is 0"),
        (speedrun, {"batch_size": 0}, "batch_size is 0"),
        (speedrun, {"dataset": "digits", "label_smoothing": 2.0}, r"label_smoothing is 2\.0"),
        (speedrun, {"dataset": "digits", "warmup": -1.0}, r"pct_start is -1\.0"),
        (speedrun, {"dataset": "digits", "learning_rate": -1.0}, r"learning_rate is -1\.0"),
    ],
)
def test_flags_out_of_range_are_named(script, flags, message, tmp_path: Path) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        script.run(script.Config(**flags, output_dir=tmp_path))


def test_rates_that_all_diverge_are_drawn_as_diverging(tmp_path: Path) -> None:
    config = learning_rate.Config(learning_rates=(0.5, 1.0), output_dir=tmp_path)
    assert learning_rate.run(config)["stops"] == ["loss not finite"] * 2
    assert (tmp_path / "learning_rates.png").exists()


def test_a_descent_to_huge_losses_is_drawn(tmp_path: Path) -> None:
    config = gradient_descent.Config(
        epochs=3, learning_rate=1e15, log_interval=0, output_dir=tmp_path
    )
    gradient_descent.run(config)
    assert (tmp_path / "descent.png").exists()


def test_zero_epochs_leave_a_summary(tmp_path: Path) -> None:
    config = mnist.Config(
        dataset="digits", epochs=0, validation=0.1, log_interval=0, output_dir=tmp_path
    )
    assert mnist.run(config)["train_loss"] is None


def test_mini_batches_in_pytorchs_order_end_where_pytorch_does(tmp_path: Path) -> None:
    """T5's reference run: start and permutations of torch's seed 0."""
    torch = pytest.importorskip("torch")
    data = jt.data.noisy_line(150, 2.0, 6.0, 0.3, seed=100, width=5.0)
    torch.manual_seed(0)
    weight, bias = torch.randn(1).item(), torch.randn(1).item()
    assert weight == pytest.approx(minibatch_regression.START_WEIGHT)
    assert bias == pytest.approx(minibatch_regression.START_BIAS)
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(0.01),
        data.inputs[:1],
        key=jax.random.key(0),
    ).replace(params={"weight": jnp.array([[weight]]), "bias": jnp.array([bias])})
    loss_fn = jt.losses.mean_squared_error
    loader = torch.utils.data.DataLoader(torch.arange(150), batch_size=150, shuffle=True)
    for _ in range(99):
        (order,) = loader
        shuffled = data.take(jnp.asarray(order.numpy()))
        state, _ = jt.train_epoch(state, shuffled, loss_fn, batch_size=20)
    assert state.params["weight"].item() == pytest.approx(2.0620, abs=5e-5)
    assert state.params["bias"].item() == pytest.approx(5.8549, abs=5e-5)
    loss = jt.evaluate(state, data, loss_fn)["loss"].item()
    assert loss == pytest.approx(0.10407, abs=5e-6)


def test_a_figure_out_of_tolerance_is_marked() -> None:
    rows = [tables.Comparison("a", 1.0, 1.1, 0.2), tables.Comparison("b", 1.0, 1.3, 0.2)]
    assert [row.agrees for row in rows] == [True, False]
    assert list(tables.comparison_rows(rows)) == [
        ("a", "1.000", "1.100", "+1.0e-01"),
        ("b", "1.000", "1.300", "+3.0e-01  ✗ more than 0.2"),
    ]


def test_eight_solvers_on_digits(tmp_path: Path) -> None:
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
    folder = tmp_path / "out"
    config = sweep.Config(
        output_dir=folder,
        dataset="digits",
        learning_rates=(0.01, 0.1),
        seeds=2,
        epochs=3,
        checkpoint_dir=tmp_path / "checkpoints",
    )
    summary = sweep.run(config)
    assert {path.name for path in folder.glob("[!.]*")} == {
        *("config.json", "summary.json", "history.csv", "model.safetensors", "sweep.safetensors"),
        *("heat_map.png", "learning_rates.png"),
    }
    assert summary["learning_rate"] == 0.1
    assert len(read_history(folder)) == 2 * 2 * 3
    result = jt.load_sweep(folder / "sweep.safetensors")
    assert result["test_accuracy"].shape == (2, 2, 3)
    output = capsys.readouterr()
    assert "4/4 runs" in output.err
    assert "learning_rate" in output.out
    again = sweep.run(dataclasses.replace(config, overwrite=True))
    assert "4/4 runs restored from the checkpoint folder" in capsys.readouterr().err
    assert again["test_accuracy"] == summary["test_accuracy"]


def test_a_speedrun_on_digits(tmp_path: Path, capsys) -> None:
    config = speedrun.Config(dataset="digits", seeds=3, epochs=10, output_dir=tmp_path)
    summary = speedrun.run(config)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {
        *("config.json", "summary.json", "history.csv", "model.safetensors", "accuracies.png")
    }
    assert summary.keys() >= COMMON
    assert summary["test_accuracy"] == pytest.approx(np.mean(summary["test_accuracies"]))
    assert summary["lowest_test_accuracy"] == min(summary["test_accuracies"]) > 0.93
    history = read_history(tmp_path)
    assert len(history) == 3 * 10
    assert len({row["test_loss"] for row in history}) == 3 * 10  # the seeds differ
    output = capsys.readouterr()
    assert "3/3 runs" in output.err
    assert f"{summary['lowest_test_accuracy']:.2%} lowest" in output.out


def test_mnist_at_the_learning_rate_of_a_range_test(tmp_path: Path, capsys) -> None:
    config = mnist.Config(
        dataset="digits", find_learning_rate=True, epochs=20, log_interval=0, output_dir=tmp_path
    )
    summary = mnist.run(config)
    assert 0.03 < summary["learning_rate"] < 0.3
    assert summary["test_accuracy"] > 0.93
    assert summary["figures"] == []
    assert "range_test.png" in summary["pictures"]
    rate = summary["learning_rate"]
    assert f"│ {rate:g}" in capsys.readouterr().out
    explicit = dataclasses.replace(
        config, find_learning_rate=False, learning_rate=rate, overwrite=True
    )
    assert mnist.run(explicit)["test_loss"] == summary["test_loss"]
    assert not (tmp_path / "range_test.png").exists()


def test_validation_and_early_stopping_on_digits(tmp_path: Path) -> None:
    config = mnist.Config(
        dataset="digits",
        validation=0.2,
        patience=3,
        learning_rate=0.3,
        log_interval=0,
        output_dir=tmp_path,
    )
    mnist.run(config)
    losses = [float(row["validation_loss"]) for row in read_history(tmp_path)]
    assert len(losses) == int(np.argmin(losses)) + 1 + 3 < 60
    assert (tmp_path / "overfitting.png").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(environment, script) -> None:
    result = run(environment, Path(script.__file__).stem, "--help")
    assert result.returncode == 0
    fields = {field.name for field in dataclasses.fields(script.Config)}
    if "safety" in fields:  # a group of flags without a prefix
        fields |= {field.name for field in dataclasses.fields(Safety)}
    for name in fields - {"safety"}:
        assert re.search(rf"--{name.replace('_', '-')}\b", result.stdout)


def test_a_reader_that_leaves_early_causes_no_traceback(environment) -> None:
    with subprocess.Popen(
        [sys.executable, "experiments/mnist.py", "--help"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_compiled_programs_are_cached_for_the_next_run(environment, tmp_path: Path) -> None:
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    flags = ("--epochs", 5, "--log-interval", 0, "--output-dir", tmp_path / "out")
    compiled = tmp_path / "cache" / "jaxtrain" / "compiled"

    run(environment, "linear_regression", "--no-compilation-cache", *flags)
    assert not compiled.exists()
    first = run(environment, "linear_regression", *flags, "--overwrite")
    kept = {path.name for path in compiled.rglob("*compiled_steps*-cache")}
    assert kept
    again = run(environment, "linear_regression", *flags, "--overwrite")
    assert {path.name for path in compiled.rglob("*compiled_steps*-cache")} == kept
    shutil.rmtree(compiled)
    after = run(environment, "linear_regression", *flags, "--overwrite")
    assert first.returncode == again.returncode == after.returncode == 0
    assert "error" not in (first.stderr + again.stderr + after.stderr).lower()


def test_no_compilation_cache_overrides_the_environment(environment, tmp_path: Path) -> None:
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "mine")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    flags = ("--epochs", 5, "--log-interval", 0, "--output-dir", tmp_path / "out")
    run(environment, "linear_regression", "--no-compilation-cache", *flags)
    assert not list((tmp_path / "mine").glob("*"))
    run(environment, "linear_regression", *flags, "--overwrite")
    assert list((tmp_path / "mine").glob("*-cache"))


def test_a_cache_folder_that_cannot_be_written_is_not_used(environment, tmp_path: Path) -> None:
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment["MPLCONFIGDIR"] = str(tmp_path / "matplotlib")  # it would complain on its own
    (tmp_path / "cache").write_text("not a folder")
    flags = ("--epochs", 5, "--log-interval", 0, "--output-dir", tmp_path / "out")
    result = run(environment, "linear_regression", *flags)
    assert (result.returncode, result.stderr) == (0, "")


LOG_FILES = {"log.csv", "steps.csv", "log.jsonl", "tensorboard"}


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_adds_files_with_losses_metrics_and_pictures(environment, tmp_path: Path) -> None:
    flags = ("--epochs", 4, "--log-interval", 0, "--output-dir", tmp_path)
    logs = ("--log", "tensorboard", "csv", "jsonl", "--log-histograms")
    result = run(environment, "linear_regression", *flags, *logs)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} >= LOG_FILES
    history = read_history(tmp_path)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{n: v for n, v in row.items() if n != "step"} for row in rows] == history
    assert (tmp_path / "steps.csv").read_text().count("\n") == 5
    assert [row["step"] for row in read_lines(tmp_path / "log.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4]
    events = read_events(tmp_path / "tensorboard")
    assert [event.step for event in events.Scalars("step_loss")] == [1, 2, 3, 4]
    assert set(events.Tags()["histograms"]) == {"params.weight", "params.bias"}
    pictures = json.loads((tmp_path / "summary.json").read_text())["pictures"]
    assert set(events.Tags()["images"]) == {Path(name).stem for name in pictures}
    (image,) = events.Images("fit")
    assert image.step == 4
    assert image.encoded_image_string == (tmp_path / "fit.png").read_bytes()

    result = run(environment, "linear_regression", *flags, "--epochs", 2, "--overwrite")
    assert result.returncode == 0, result.stderr
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name in left if name in LOG_FILES or "tfevents" in name]


def test_each_run_of_an_experiment_has_its_own_logs(tmp_path: Path) -> None:
    names = ("jsonl", "tensorboard")
    config = gradient_descent.Config(output_dir=tmp_path, epochs=2, log_interval=0, log=names)
    gradient_descent.run(config)
    assert len(read_lines(tmp_path / "log_batch.jsonl")) == 4
    assert len(read_lines(tmp_path / "log_stochastic.jsonl")) == 8
    for part, steps in (("batch", [1, 2]), ("stochastic", [1, 2, 3, 4, 5, 6])):
        events = read_events(tmp_path / "tensorboard" / part)
        assert [event.step for event in events.Scalars("step_loss")] == steps
    assert read_events(tmp_path / "tensorboard").Tags()["images"] == [
        "descent",
        "descent_on_surface",
    ]
    listed = json.loads((tmp_path / "summary.json").read_text())["logs"]
    assert set(listed) == {
        str(path.relative_to(tmp_path))
        for pattern in ("*.jsonl", "*tfevents*")
        for path in tmp_path.rglob(pattern)
    }
    assert len(listed) == 5
    notes = tmp_path / "log_notes.jsonl"
    notes.write_text("mine")
    (tmp_path / "log_link.jsonl").symlink_to(notes)
    again = dataclasses.replace(config, log=("csv",), overwrite=True)
    gradient_descent.run(again)
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {notes.name, "log_link.jsonl"}
    assert not list(tmp_path.rglob("*tfevents*"))
    assert (tmp_path / "steps_stochastic.csv").read_text().count("\n") == 7


def test_a_resumed_run_continues_its_logs_and_may_have_other_ones(tmp_path: Path) -> None:
    config = minibatch_regression.Config(
        output_dir=tmp_path / "out",
        log_interval=0,
        epochs=2,
        log=("tensorboard", "jsonl"),
        safety=Safety(checkpoint_dir=tmp_path / "checkpoints"),
    )
    minibatch_regression.run(config)
    (tmp_path / "out" / "summary.json").unlink()  # as if it had been interrupted
    minibatch_regression.run(
        dataclasses.replace(config, epochs=3, log=("tensorboard", "jsonl", "csv"))
    )
    rows = read_lines(tmp_path / "out" / "log.jsonl")
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 25))
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [1, 2, 3]
    losses = read_events(tmp_path / "out" / "tensorboard").Scalars("step_loss")
    assert [event.step for event in losses] == list(range(1, 25))
    assert (tmp_path / "out" / "log.csv").read_text().count("\n") == 2  # the third epoch


def test_log_files_of_the_user_are_not_removed(tmp_path: Path) -> None:
    """Beside those of a run that wrote logs; and without, whatever its files were edited to."""
    mine = [tmp_path / "log_notes.csv", tmp_path / "log_2024.jsonl"]
    config = linear_regression.Config(
        output_dir=tmp_path, epochs=1, log_interval=0, log=("csv",), overwrite=True
    )
    linear_regression.run(config)
    config = dataclasses.replace(config, log=())
    for log in (None, [], 5, {"csv": 1}, "jsonl", ["csv", "jsonl"], ["../a", [], "\0"]):
        for path in mine:
            path.write_text("mine")
        if log is not None:
            for name, key in (("config.json", "log"), ("summary.json", "logs")):
                (tmp_path / name).write_text(json.dumps({key: log}))
        linear_regression.run(config)
        assert [path.read_text() for path in mine] == ["mine", "mine"], log
        assert not (tmp_path / "log.csv").exists()


@pytest.mark.parametrize(("log", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_without_its_extra_ends_with_one_sentence(
    environment, tmp_path: Path, log: str, package: str
) -> None:
    program = (
        f"import runpy, sys; sys.modules[{package!r}] = None\n"
        f"sys.argv = ['mnist', '--log', {log!r}, '--output-dir', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(ROOT / 'experiments/mnist.py')!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: the package {package} is not installed; install it with "
        f"pip install 'jaxtrain[{log}]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_log_is_one_sentence(environment, tmp_path: Path) -> None:
    result = run(environment, "mnist", "--log", "tensorbord", "--output-dir", tmp_path / "out")
    assert_one_line_error(result, "--log is 'tensorbord'", "tensorboard", "jsonl")
