"""Races: that both sides train the same, what is said where they do not, and the command."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as linen
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.errors import DisagreementError, InputError

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from jaxtrain.race import __main__ as command  # noqa: E402
from jaxtrain.race import contenders, processes, run  # noqa: E402
from jaxtrain.race.estimates import median_of  # noqa: E402
from jaxtrain.race.processes import by_value  # noqa: E402
from jaxtrain.race.result import Row, disturbances  # noqa: E402

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((48, 6), np.float32)
LABELS = RNG.integers(0, 3, 48)
QUICK = {"batch_size": 16, "rounds": 1, "seconds": 0.01, "log": lambda text: None}


class Net(nn.Module):
    """Dropout as a layer and as a function, and a layer with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4)
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        x = F.dropout(F.relu(self.norm(self.hidden(x))), 0.3, self.training)
        return self.output(self.drop(x))


class Noisy(nn.Module):
    """Adds noise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(6, 3)

    def forward(self, x):
        return self.output(x + torch.randn_like(x) if self.training else x)


@pytest.fixture(autouse=True)
def _in_this_process(request, monkeypatch) -> Iterator[None]:
    """Makes all calls in this process, except in slow tests."""
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(run, "call", call)
    yield
    torch.set_num_threads(threads)


def call(function, *arguments, **options):
    return function(*copy.deepcopy(arguments))


def race(module, data=(INPUTS, LABELS), loss_fn=jt.losses.cross_entropy, **options) -> jt.Race:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    return jt.race(module, data, loss_fn=loss_fn, optimizer=optimizer, **(QUICK | options))


def test_a_race_measures_steps_with_the_same_losses(tmp_path: Path) -> None:
    names = ("eager PyTorch", "train_step", "fit")
    result = race(Net(), contenders=names)
    assert [row.contender for row in result.rows] == list(names)
    assert [row.missing for row in result.rows] == [None] * 3
    for row in result.rows:
        assert row.milliseconds.median > 0
        assert row.speedup.median == pytest.approx(
            result.rows[0].milliseconds.median / row.milliseconds.median
        )
        assert row.contender in str(result)
    assert result.speedups["eager PyTorch"] == 1
    settings, agreement, *rest = result.notes
    assert "Not measured: how much rounds differ." in rest[-1]  # there is one
    assert "thread" in settings
    assert "fused" in settings
    largest = float(agreement.rpartition(" ")[2].rstrip("."))
    assert "20 steps without dropout agree" in agreement
    assert largest < 1e-5
    result.save(tmp_path / "race.json")
    saved = json.loads((tmp_path / "race.json").read_text())
    assert saved["rows"][2]["contender"] == "fit"
    assert saved["rows"][0]["speedup"] == {"low": 1, "median": 1, "high": 1}
    assert saved["machine"]["versions"]["torch"] == torch.__version__


def test_another_loss_is_noticed_in_the_first_step() -> None:
    with pytest.raises(DisagreementError, match=r"loss of step 1 is .* in train_epoch") as caught:
        race(
            nn.Linear(6, 3),
            torch_loss=lambda outputs, targets: 1.001 * F.cross_entropy(outputs, targets),
            contenders=("train_epoch",),
        )
    assert caught.value.step == 1
    assert caught.value.expected == pytest.approx(1.001 * caught.value.found, rel=1e-5)


def test_another_learning_rate_is_noticed(monkeypatch) -> None:
    wrong = lambda *_: jt.optimizers.sgd(0.051, momentum=0.9)  # noqa: E731
    monkeypatch.setattr(contenders, "from_torch", wrong)
    with pytest.raises(DisagreementError) as caught:
        race(nn.Linear(6, 3), contenders=("train_epoch",))
    assert caught.value.step in range(2, 10)


class Dense(linen.Module):
    """The port of a linear layer, perhaps with a mistake."""

    factor: float = 1.0

    @linen.compact
    def __call__(self, x):
        return self.factor * linen.Dense(3)(x)


def test_a_model_beside_the_module_starts_from_its_parameters() -> None:
    options = {"contenders": ("eager PyTorch", "train_epoch")}
    result = race(nn.Linear(6, 3), model=Dense(), **options)
    assert list(result.speedups) == ["eager PyTorch", "train_epoch", "train_epoch, Dense"]
    with pytest.raises(DisagreementError, match="in train_epoch, Dense and") as caught:
        race(nn.Linear(6, 3), model=Dense(1.01), **options)
    assert caught.value.step == 1


def test_a_module_of_half_precision_does_not_draw() -> None:
    result = race(nn.Linear(6, 3).bfloat16(), contenders=("eager PyTorch", "train_epoch"))
    assert "computes in half precision; the mean loss of 20 steps" in result.notes[1]
    assert set(result.speedups) == {"eager PyTorch", "train_epoch"}


def test_a_module_that_draws_is_compared_by_its_mean_loss() -> None:
    result = race(Noisy(), contenders=("eager PyTorch", "train_epoch"))
    assert "draws random numbers; the mean loss of 20 steps" in result.notes[1]
    assert set(result.speedups) == {"eager PyTorch", "train_epoch"}
    with pytest.raises(DisagreementError, match="the mean loss is"):
        race(
            Noisy(),
            torch_loss=lambda outputs, targets: 2 * F.cross_entropy(outputs, targets),
            contenders=("train_epoch",),
        )


EXPECTED = np.array([2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("found", "rounding", "step"),
    [
        (EXPECTED * (1 + 9e-5), 0.0, None),
        (EXPECTED + np.array([0, 3e-4, 0]), 0.0, 2),
        (EXPECTED + np.array([0, 3e-4, 0]), [0, 1e-4, 0], None),  # as rounding may change it
        (EXPECTED + np.array([0, 0, np.nan]), 0.0, 3),
    ],
)
def test_losses_may_differ_by_rounding(found, rounding, step: int | None) -> None:
    arguments = ({"fit": found}, EXPECTED, np.broadcast_to(rounding, 3))
    if step is None:
        assert "agree to" in run.compare(*arguments, inexact=None)
    else:
        with pytest.raises(DisagreementError) as caught:
            run.compare(*arguments, inexact=None)
        assert caught.value.step == step


def test_ctrl_c_returns_what_was_measured(monkeypatch) -> None:
    def interrupted(function, *arguments, **options):
        if function is run.measuring.measure:
            measured.append(function)
            if len(measured) == 2:
                raise KeyboardInterrupt
        return call(function, *arguments)

    measured: list = []
    monkeypatch.setattr(run, "call", interrupted)
    result = race(Noisy(), contenders=("eager PyTorch",), rounds=3)
    assert not result.complete
    assert len(result.rows[0].readings) == 1
    assert "Interrupted after round 1." in str(result)


@pytest.mark.parametrize(
    ("readings", "others", "sentence"),
    [
        ((1.0, 1.1), 0.0, "Nothing disturbed the machine noticeably."),
        ((1.0, 1.1), None, "Not measured: the load of other processes."),
        ((1.0,), None, "Not measured: the load of other processes, how much rounds differ."),
        ((1.0,), 0.5, "other processes kept 0.5 cores busy on average. Not measured: how much"),
        ((1.0, 1.5), None, "disturbed: rounds of fit differ by 40%. Not measured: the load"),
    ],
)
def test_what_is_not_measured_is_not_called_quiet(readings, others, sentence: str) -> None:
    row = Row("fit", milliseconds=median_of(readings), readings=readings)
    assert sentence in disturbances([row], others)


class Pairs:
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple:
        return torch.from_numpy(INPUTS)[index], int(LABELS[index])


@pytest.mark.parametrize(
    "data",
    [
        jt.Dataset(INPUTS, LABELS),
        (torch.from_numpy(INPUTS), torch.from_numpy(LABELS)),
        torch.utils.data.TensorDataset(torch.from_numpy(INPUTS), torch.from_numpy(LABELS)),
        Pairs(),
    ],
    ids=["Dataset", "tensors", "TensorDataset", "pairs"],
)
def test_data_of_either_library(data) -> None:
    found = run._arrays(data, 20)
    np.testing.assert_array_equal(found.inputs, INPUTS[:40])
    np.testing.assert_array_equal(found.targets, LABELS[:40])


def test_large_examples_are_few() -> None:
    images = np.zeros((100, 3, 2048, 2048), np.float32)  # 48 MiB each, never touched
    assert len(run._arrays((images, np.zeros(100, int)), 2)) == 2 * 5
    assert len(run._arrays((images, np.zeros(100, int)), 1)) == 5
    assert len(run._arrays((images[:, :, :512, :512], np.zeros(100, int)), 1)) == 85


TORCH_LOSSES = {
    jt.losses.cross_entropy: LABELS,
    functools.partial(jt.losses.cross_entropy, label_smoothing=0.2): LABELS,
    jt.losses.mean_squared_error: INPUTS[:, 3:],
    jt.losses.mean_absolute_error: INPUTS[:, 3:],
    functools.partial(jt.losses.huber, delta=0.5): INPUTS[:, 3:],
    functools.partial(jt.losses.smooth_l1, beta=0.5): INPUTS[:, 3:],
    jt.losses.sigmoid_binary_cross_entropy: (INPUTS[:, 3:] > 0).astype(np.float32),
}


@pytest.mark.parametrize(
    "loss_fn", TORCH_LOSSES, ids=lambda loss: getattr(loss, "func", loss).__name__
)
def test_the_losses_of_pytorch_are_those_of_jaxtrain(loss_fn) -> None:
    targets = TORCH_LOSSES[loss_fn]
    theirs = run._torch_loss(loss_fn)(torch.tensor(INPUTS[:, :3]), torch.tensor(targets))
    ours = loss_fn(INPUTS[:, :3], targets).mean()
    assert float(theirs) == pytest.approx(float(ours), rel=1e-5)


def other_loss(predictions, targets):
    return predictions[:, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": Net}, "the module is .*Net.*; expected a torch.nn.Module"),
        ({"optimizer": torch.optim.SGD(Net().parameters())}, "parameters that this Net does not"),
        ({"optimizer": jt.optimizers.sgd(0.1)}, "expected one of torch.optim, such as"),
        ({"data": (INPUTS[:8], LABELS[:8])}, "batch_size is 16 for 8 examples"),
        ({"data": INPUTS}, "no pairs of an input and a target"),
        ({"data": (INPUTS, None)}, "expected inputs and targets"),
        ({"loss_fn": other_loss}, "torch_loss is missing for other_loss"),
        ({"contenders": ("eager",)}, "expected some of eager PyTorch"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_arguments_are_checked(options: dict, message: str) -> None:
    module = options.pop("module", None) or Net()
    optimizer = torch.optim.SGD((module if isinstance(module, nn.Module) else Net()).parameters())
    arguments = {"loss_fn": jt.losses.cross_entropy, "optimizer": optimizer} | QUICK | options
    with pytest.raises(InputError, match=message):
        jt.race(module, arguments.pop("data", (INPUTS, LABELS)), **arguments)


FILE = """
import jaxtrain  # imports JAX, which PyTorch's process must not
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        return F.relu(self.layer(x.flatten(1)))

class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

def data():
    return torch.ones(64, 12), torch.ones(64, 3)

word = "x"
"""
SCRIPT = "import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])"


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    (tmp_path / "networks_of_a_user.py").write_text(FILE)
    (tmp_path / "script_of_a_user.py").write_text(SCRIPT)
    (tmp_path / "sys.py").write_text(FILE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "networks_of_a_user.py"
    sys.modules.pop("networks_of_a_user", None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere.py:Net"], "there is no file nowhere.py"),
        (["{file}"], "has no NAME; expected FILE.py:NAME"),
        (["script_of_a_user.py:Net"], r'SystemExit: 2.* below `if __name__ == "__main__":`'),
        (["sys.py:Net"], "sys.py has the name of the module sys"),
        (["{file}:Nets"], "has no Nets; expected one of its names: Net, NeedsWidth, Pair, data"),
        (["{file}:NeedsWidth"], "cannot be called without arguments .*width.*write a function"),
        (["{file}:word"], "is a str; expected a torch.nn.Module"),
        (["{file}:Net"], r"does not take inputs of the shape \(2, 1, 28, 28\) .*--shape 3,32,32"),
        (
            ["{file}:Pair", "--shape", "12"],
            "returns .*tuple.* for two examples; expected one tensor",
        ),
        (
            ["{file}:Net", "--shape", "12", "--loss", "hinge"],
            "--loss is hinge; expected one of cross",
        ),
        (
            ["{file}:Net", "--shape", "12", "--learning-rate=-1"],
            "torch.optim.SGD refuses its options",
        ),
        (
            ["{file}:Net", "--shape", "12", "--optimizer", "adagrad", "--momentum=1"],
            "refuses its opt",
        ),
        (
            ["{file}:Net", "--shape", "12", "--integers", "0"],
            "--integers is 0; expected an integer",
        ),
        (["no_package.no_module:Net"], "no_package.no_module cannot be imported .*ModuleNotFound"),
    ],
)
def test_mistakes_in_the_command_are_one_sentence(
    flags: list[str], message: str, file: Path, monkeypatch
) -> None:
    found = [flag.format(file=file) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["race", *found, "--batch-size", "8"])
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        command.main()
    assert "\n" not in str(caught.value.code)


def test_a_process_imports_no_file_of_the_user(file: Path) -> None:
    sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem).Net()
    imported = lambda module: sorted({"jax", type(module).__module__} & {*sys.modules})  # noqa: E731
    with by_value(module):
        assert processes.call(imported, module) == []


@pytest.mark.slow
def test_the_command_races_in_processes_of_their_own(file: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "jaxtrain.race",
                f"{file}:Net",
                "--quick",
                "--batch-size",
                "16",
            ),
            *("--dataset", f"{file}:data", "--loss", "mean_squared_error", "--optimizer", "adam"),
            *("--json", str(tmp_path / "race.json")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    eager, ours = json.loads((tmp_path / "race.json").read_text())["rows"]
    assert (eager["missing"], ours["missing"]) == (None, None)
    # The process of PyTorch has imported neither JAX nor the file.
    assert eager["peak_mib"] < ours["peak_mib"] - 50
    assert "train_epoch" in result.stdout
