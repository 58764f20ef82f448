"""The command `python -m jaxtrain.race my_file.py:Net`: is it worth moving a module to JAX?"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import data, losses
from jaxtrain._arguments import check_integer
from jaxtrain._extras import needs_extra
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError, first_line
from jaxtrain.race.result import EAGER
from jaxtrain.race.run import CONTENDERS, most_batches, race

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "Rprop", "Adagrad", "Adadelta")
_QUICK: dict[str, Any] = {"rounds": 1, "seconds": 0.2, "contenders": (EAGER, "train_epoch")}
_SHAPE = (1, 28, 28)
_RANDOM_BATCHES = 50


def main() -> None:
    """Runs a race of the module that the command line names, and prints its result."""
    parser = argparse.ArgumentParser(
        "python -m jaxtrain.race",
        description="Train a PyTorch module in PyTorch and in JAX, and print which is faster.",
    )
    add = parser.add_argument
    add("module", help="FILE.py:NAME or package.module:NAME, a class without arguments, a function "
        "that returns a module, or a module")  # fmt: skip
    add("--model", help="the same network in Flax or Equinox, as FILE.py:NAME")
    add("--batch-size", type=int, default=64, help="examples per step (64)")
    add("--shape", type=_shape, help="shape of one random example, such as 3,32,32 (1,28,28)")
    add("--integers", type=int, help="random inputs are integers below this, as those of a text")
    add("--dataset", help="digits, mnist or another name of jaxtrain.data.load, or FILE.py:NAME, "
        "inputs and targets or a function that returns them; random by default")  # fmt: skip
    add("--data-dir", type=Path, help="folder of named data sets")
    add("--loss", default="cross_entropy", help="name in jaxtrain.losses (cross_entropy)")
    names = [name.lower() for name in OPTIMIZERS]
    add("--optimizer", default="sgd", choices=names, help="optimizer of torch.optim (sgd)")
    add("--learning-rate", type=float, default=0.01, help="its learning rate (0.01)")
    add("--momentum", type=float, help="its momentum")
    add("--contenders", nargs="+", choices=CONTENDERS, help="who takes part (all)")
    add("--rounds", type=int, help="readings of each contender (5)")
    add("--quick", action="store_true", help="one short round of eager PyTorch and train_epoch")
    add("--json", type=Path, help="file of the result")
    flags = parser.parse_args()
    # JAX would reserve most of a GPU's memory, which the processes of the race need.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes as well
    try:
        result = _race(flags)
        print(result)
        if flags.json is not None:
            result.save(flags.json)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        sys.exit(130)
    if not result.complete:
        sys.exit(130)


def _race(flags: argparse.Namespace) -> Any:
    with needs_extra("torch"):
        import cloudpickle  # noqa: F401
        import torch

        from jaxtrain.race.pytorch import LOSSES
    if flags.loss not in LOSSES:
        raise InputError(f"--loss is {flags.loss}; expected one of {', '.join(LOSSES)}")
    check_integer(flags.batch_size, "--batch-size", minimum=1)
    if flags.integers is not None:
        check_integer(flags.integers, "--integers", minimum=1)
    torch.manual_seed(0)
    module = _construct(flags.module)
    dataset = _dataset(flags, module)
    kind = next(name for name in OPTIMIZERS if name.lower() == flags.optimizer)
    options = {} if flags.momentum is None else {"momentum": flags.momentum}
    try:
        optimizer = getattr(torch.optim, kind)(module.parameters(), flags.learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"torch.optim.{kind} refuses its options ({error}); expected a module with parameters, "
            "a positive --learning-rate, and --momentum for SGD and RMSprop alone"
        ) from error
    chosen = {"rounds": flags.rounds, "contenders": flags.contenders}
    settings = (_QUICK if flags.quick else {}) | {k: x for k, x in chosen.items() if x is not None}
    model = None if flags.model is None else _call(_load(flags.model), flags.model)
    return race(
        *(module, dataset),
        loss_fn=getattr(losses, flags.loss),
        optimizer=optimizer,
        batch_size=flags.batch_size,
        model=model,
        **settings,
    )


def _load(target: str) -> Any:
    """Returns what FILE.py:NAME or package.module:NAME is."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise InputError(f"{target} has no NAME; expected FILE.py:NAME, as in net.py:Net")
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise InputError(f"there is no file {place}; expected FILE.py:NAME, as in net.py:Net")
    sys.path.insert(0, str(Path(place).resolve().parent) if is_file else str(Path.cwd()))
    try:
        source = importlib.import_module(Path(place).stem if is_file else place)
    except (Exception, SystemExit) as error:  # of any statement of the file
        raise InputError(
            f"{place} cannot be imported ({type(error).__name__}: {error}); expected a file whose "
            'training is below `if __name__ == "__main__":`'
        ) from error
    file = getattr(source, "__file__", None)  # None for a folder, and for built-in modules
    if is_file and (file is None or Path(file).resolve() != Path(place).resolve()):
        raise InputError(
            f"{place} has the name of the module {source.__name__}; expected another file name"
        )
    if not hasattr(source, name):
        found = vars(source).items()
        names = [each for each, x in found if each[0] != "_" and not inspect.ismodule(x)]
        raise InputError(f"{place} has no {name}; expected one of its names: {', '.join(names)}")
    return getattr(source, name)


def _construct(target: str) -> Any:
    """Returns the PyTorch module that a class or a function of a file returns."""
    import torch

    found = _load(target)
    module = found if isinstance(found, torch.nn.Module) else _call(found, target)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{target} is a {type(module).__name__}; expected a torch.nn.Module")
    return module.cpu()


def _call(found: Any, target: str) -> Any:
    """Returns what a class or a function returns, or an object as it is."""
    if not inspect.isroutine(found) and not inspect.isclass(found):
        return found
    try:
        return found()
    except Exception as error:  # of any kind, by the constructor
        raise InputError(
            f"{target} cannot be called without arguments ({type(error).__name__}: {error}); "
            "expected a class or a function without arguments: write a function that returns the "
            "module"
        ) from error


def _dataset(flags: argparse.Namespace, module: Any) -> Any:
    """Returns the data set that the flags name, or random examples."""
    if flags.dataset is not None and ":" in flags.dataset:
        return _call(_load(flags.dataset), flags.dataset)
    if flags.dataset is not None:
        train, _ = data.load(flags.dataset, flags.data_dir)
        images = np.asarray(train.inputs, np.float32) / 255
        # Most modules take channels; some take rows, and some a vector.
        layouts = [images[:, None], images, images.reshape(len(images), -1)]
        errors = []
        for layout in layouts:
            try:
                _outputs(module, layout)
            except InputError as error:
                errors.append(error)
            else:
                return Dataset(layout, np.asarray(train.targets))
        raise errors[0]
    example = flags.shape or _SHAPE
    batches = min(_RANDOM_BATCHES, most_batches(4 * flags.batch_size * math.prod(example)))
    shape = (flags.batch_size * batches, *example)
    generator = np.random.default_rng(0)
    inputs: np.ndarray = (
        generator.standard_normal(shape, np.float32)
        if flags.integers is None
        else generator.integers(0, flags.integers, shape)
    )
    outputs = _outputs(module, inputs)
    return Dataset(inputs, _targets(outputs, flags.loss, len(inputs), generator))


def _outputs(module: Any, inputs: np.ndarray) -> Any:
    """Returns the outputs for two examples."""
    import torch

    sample = torch.from_numpy(inputs[:2])
    try:
        with torch.no_grad():
            outputs = copy.deepcopy(module).eval()(sample)
    except Exception as error:  # of any layer
        reason = first_line(error)
        raise InputError(
            f"{type(module).__name__} does not take inputs of the shape {tuple(sample.shape)} "
            f"({reason}); give the shape of one example, such as --shape 3,32,32 (with --integers "
            "1000 for a text), or --dataset FILE.py:NAME"
        ) from error
    if not isinstance(outputs, torch.Tensor) or outputs.ndim == 0 or len(outputs) != 2:
        found = f"shape {tuple(outputs.shape)}" if hasattr(outputs, "shape") else type(outputs)
        raise InputError(
            f"{type(module).__name__} returns {found} for two examples; expected one tensor with "
            "an output for each: use jaxtrain.race in Python, with a loss of your own"
        )
    return outputs


def _targets(outputs: Any, loss: str, examples: int, generator: np.random.Generator) -> np.ndarray:
    """Returns random targets that fit outputs and a loss."""
    shape = (examples, *outputs.shape[1:])
    if loss == "cross_entropy":
        return generator.integers(0, shape[-1], shape[:-1])
    if "binary" in loss:
        return generator.integers(0, 2, shape).astype(np.float32)
    return generator.standard_normal(shape, np.float32)


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; expected 3,32,32, for example"
        ) from None
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; expected 3,32,32, for example")
    return sizes


if __name__ == "__main__":
    main()
