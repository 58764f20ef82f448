"""One valid call of every public callable, and odd values to put in place of its arguments.

A call is Python code over the names that `names` returns, of which `callback_used` and others like
it make an object of the odd arguments, and use it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt

RUN = "loss_fn=loss_fn, epochs=1, batch_size=16, key=key"
CALLS = f"""
jt.Dataset(inputs, targets)
train.split(0.25, key)
train.take(indices)
train.replace(weights=weights)
jt.init_state(model, optimizer, inputs, key=key)
jt.with_optimizer(state, optimizer)
jt.set_learning_rate(state, 0.1)
jt.to_module(nnx_state)
jt.mixed_precision(model, "bfloat16")
jt.train_step(state, batch, loss_fn)
jt.eval_step(state, batch, loss_fn, metric_fns, key=None)
jt.gradients(state, batch, loss_fn)
jt.apply_gradients(state, state.params, model_state=None)
jt.train_epoch(state, train, loss_fn, batch_size=16, key=key)
jt.evaluate(state, test, loss_fn, metric_fns, batch_size=8, key=None)
jt.predict(state, inputs, batch_size=8, key=None)
jt.update_batch_stats(norm_state, train, batch_size=16, key=key)
jt.train(state, train, test, metric_fns=metric_fns, {RUN})
jt.fit(state, train, test, metric_fns=metric_fns, callbacks=[], {RUN})
jt.fit(state, train, test, metric_fns=metric_fns, steps=2, callbacks=[stop], loss_fn=loss_fn)
jt.sweep(run, {{"learning_rate": [0.1, 0.2]}}, at_once=1, callbacks=[])
jt.find_learning_rate(state, train, jt.optimizers.sgd, loss_fn=loss_fn, steps=20, key=key)
jt.minimize(distance, start, optimizer, max_steps=3)
jt.summary(state, inputs, targets, loss_fn=loss_fn)
jt.verify(state, batch, loss_fn)
jt.compare(torch_module, linear, line.inputs, line.targets, loss_fn=jt.losses.huber)
jt.save("new.safetensors", state)
jt.load("model.safetensors", state)
jt.load_checkpoint("run", state, weights_only=False, best=False)
jt.load_sweep("sweep.npz")
result["train_loss"]
result.final("train_loss")
result.run(0)
result.best("train_loss", over="learning_rate")
result.table(["train_loss"], over="learning_rate")
result.line_plot("train_loss", x="learning_rate")
table.heat_map("value", x="x", y="y")
result.save("new.npz")
result.to_csv("new.csv")
callback_used(jt.callbacks.checkpoint)("new", every=1, keep=3, resume="auto")
callback_used(jt.callbacks.csv)("log.csv", steps="steps.csv")
callback_used(jt.callbacks.json_lines)("log.jsonl")
callback_used(jt.callbacks.tensorboard)("board", histograms=False)
callback_used(jt.callbacks.early_stopping)(3, "test_loss", "min", min_delta=0.0, min_epochs=0)
callback_used(jt.callbacks.reduce_on_plateau)("test_loss", mode="min", factor=0.1, patience=1)
callback_used(jt.callbacks.every_steps)(2, print)
callback_used(jt.callbacks.progress)(100, 1)
jt.callbacks.profile("trace", (1, 2))
jt.data.line(0.7, 0.3)
jt.data.load("digits", None, shard=None)
jt.data.load_resolved("digits", None)
jt.data.noisy_line(10, 0.7, 0.3, 0.1, seed=0, width=2.0)
jt.data.points_on_line(2.0, 0.0)
jt.data.read_idx("data.idx")
stream_used(jt.data.stream)(train, 16, key, transform=None, workers=0)
jt.export.load_stablehlo("model.stablehlo")
jt.export.load_stablehlo("model.stablehlo")(inputs)
jt.export.load_torch(linear_state, torch_module, mapping=None, strict=True)
jt.export.load_torch(linear_state, "model.pt")
jt.export.to_torch(linear_state, torch_module, mapping=None, strict=True)
jt.export.onnx(linear_state, "new.onnx", line.inputs, input_names=["x"])
jt.export.stablehlo(linear_state, "new.stablehlo", line.inputs, platforms=("cpu",))
jt.losses.WeightedMean(weights, weights)
jt.losses.weighted_sum((1.0, loss_fn), (0.5, loss_fn))(logits, labels8)
jt.losses.weighted_sum((1.0, loss_fn), (0.5, loss_fn))
jt.losses.ignore_nan(jt.losses.huber)(scores, scores)
jt.losses.ignore_nan(jt.losses.huber)
jt.losses.cross_entropy(logits, labels8, label_smoothing=0.1, weight=class_weights)
jt.losses.soft_cross_entropy(logits, logits, label_smoothing=0.1, weight=class_weights)
jt.losses.huber(scores, scores, delta=1.0)
jt.losses.smooth_l1(scores, scores, beta=1.0)
jt.losses.mean_absolute_error(scores, scores)
jt.losses.mean_squared_error(scores, scores)
jt.losses.squared_error_sum(scores, scores)
jt.losses.euclidean_distance(scores, scores)
jt.losses.cosine_distance(scores, scores)
jt.losses.binary_cross_entropy(scores, scores)
jt.losses.sigmoid_binary_cross_entropy(scores, scores)
jt.metrics.accuracy(logits, labels8)
jt.metrics.balanced_accuracy(logits, labels8, ones8)
jt.metrics.confusion_matrix(logits, labels8, ones8)
jt.metrics.r2(scores, scores, ones8)
jt.metrics.f1("macro")(logits, labels8, ones8)
jt.metrics.precision("macro", threshold=0.0)
jt.metrics.recall("binary")
jt.metrics.roc_auc("macro")(logits, labels8, ones8)
jt.metrics.roc_auc("macro")
jt.metrics.top_k_accuracy(2)(logits, labels8)
jt.metrics.top_k_accuracy(2)
model_used(jt.models.FeedForward)((8, 10), 0.2, 0.1, 0.3)
model_used(jt.models.Linear)(3)
model_used(jt.models.LinearRegression)(1, True)
model_used(jt.models.Dropout)(0.5)
jt.models.dropout(inputs, 0.5, key)
jt.models.uniform_fan_in(8)(key, (8,))
jt.models.uniform_fan_in(8)
optimizer_used(jt.optimizers.accumulate_gradients)(optimizer, 2)
optimizer_used(jt.optimizers.adadelta)(1.0, 0.9, 1e-6, 0.0)
optimizer_used(jt.optimizers.adagrad)(0.1, 0.0, 0.0, 0.0, 1e-10)
optimizer_used(jt.optimizers.adam)(0.1, (0.9, 0.999), 1e-8, 0.0, False)
optimizer_used(jt.optimizers.adamw)(0.1, (0.9, 0.999), 1e-8, 0.01, False)
optimizer_used(jt.optimizers.average_parameters)(optimizer, 0.9, evaluate=True)
jt.optimizers.averaged_params(state.opt_state)
optimizer_used(jt.optimizers.clip_gradients)(optimizer, 1.0)
optimizer_used(jt.optimizers.evaluate_with)(optimizer, lambda opt_state, params: params)
jt.optimizers.from_torch(torch_optimizer, torch_module)
optimizer_used(jt.optimizers.lbfgs)(1.0, 10)
optimizer_used(jt.optimizers.make)("sgd", 0.1, momentum=0.9)
optimizer_used(jt.optimizers.record_gradient_norm)(optimizer)
jt.optimizers.records(state.opt_state)
optimizer_used(jt.optimizers.rmsprop)(0.1, 0.99, 1e-8, 0.0, 0.0, False)
optimizer_used(jt.optimizers.rprop)(0.1, (0.5, 1.2), (1e-6, 50.0))
optimizer_used(jt.optimizers.sgd)(0.1, 0.0, 0.0, 0.0, False)
optimizer_used(jt.optimizers.skip_nonfinite)(optimizer)
jt.optimizers.cosine_annealing_lr(0.1, 5, 0.0, steps_per_epoch=1)(2)
jt.optimizers.linear_lr(0.1, 0.5, 1.0, 5, steps_per_epoch=1)(2)
jt.optimizers.one_cycle_lr(0.1, 10, pct_start=0.3, anneal_strategy="cos")(2)
jt.optimizers.step_lr(0.1, 2, 0.1, steps_per_epoch=1)(2)
jt.optimizers.cosine_annealing_lr(0.1, 5, 0.0, steps_per_epoch=1)
jt.optimizers.linear_lr(0.1, 0.5, 1.0, 5, steps_per_epoch=1)
jt.optimizers.one_cycle_lr(0.1, 10, pct_start=0.3, anneal_strategy="cos")
jt.optimizers.step_lr(0.1, 2, 0.1, steps_per_epoch=1)
jt.parallel.replicate(linear_state, mesh)
jt.parallel.shard(train, mesh)
"""

# Public callables without a line above, and why.
NOT_CALLED = {
    **dict.fromkeys(("callbacks.wandb", "race", "parallel.initialize"), "starts processes"),
    "data.open_tfds": "needs a prepared data set",
    **dict.fromkeys(("reuse_freed_memory", "use_cpu_lowerings"), "changes the process"),
    **dict.fromkeys(("callbacks.Callback", "metrics.AccumulatedMetric"), "a base class"),
    **dict.fromkeys(("History", "Minimum", "Race", "Run", "TrainState", "Model"), "data"),
    **dict.fromkeys(("callbacks.SweepProgress", "data.Resolved", "data.Stream"), "data"),
    **dict.fromkeys(("losses.WeightedSum", "optimizers.Record", "optimizers.Stop"), "data"),
    **dict.fromkeys(
        ("sweeps.RangeTest", "sweeps.SweepResult", "sweeps.SweepRun", "sweeps.SweepTable"), "data"
    ),
    **dict.fromkeys(("export.load", "export.save"), "the functions of jt"),
}


def names(folder: Path) -> dict[str, Any]:
    """Returns what the calls refer to, and writes the files that they read."""
    import torch
    from flax import linen, nnx

    key = jax.random.key(0)
    inputs = jax.random.normal(key, (32, 8))
    targets = jnp.arange(32) % 10
    train = jt.Dataset(inputs, targets)
    model = jt.models.FeedForward((8, 10), 0.0, 0.0, 1.0)
    optimizer = jt.optimizers.sgd(0.1)
    # Committed to a device, as a state that a user has moved is.
    device = jax.devices()[0]
    state = jax.device_put(jt.init_state(model, optimizer, inputs[:1], key=key), device)
    loss_fn = jt.losses.cross_entropy
    line = jt.data.points_on_line()

    def run(learning_rate: Any) -> Any:
        own = jt.with_optimizer(state, jt.optimizers.sgd(learning_rate))
        return jt.train(own, train, loss_fn=loss_fn, epochs=1, batch_size=16)

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool) -> Any:
            return linen.BatchNorm(use_running_average=not train)(x)

    def callback_used(make: Callable[..., Any]) -> Callable[..., Any]:
        def use(*args: Any, **kwargs: Any) -> Any:
            callbacks = [make(*args, **kwargs)]
            return jt.fit(state, train, test, loss_fn=loss_fn, epochs=1, callbacks=callbacks)

        return functools.wraps(make)(use)

    def optimizer_used(make: Callable[..., Any]) -> Callable[..., Any]:
        def use(*args: Any, **kwargs: Any) -> Any:
            return jt.with_optimizer(linear_state, make(*args, **kwargs))

        return functools.wraps(make)(use)

    def model_used(make: Callable[..., Any]) -> Callable[..., Any]:
        def use(*args: Any, **kwargs: Any) -> Any:
            return jt.init_state(make(*args, **kwargs), None, inputs[:1], key=key)

        return functools.wraps(make, updated=())(use)

    def stream_used(make: Callable[..., Any]) -> Callable[..., Any]:
        def use(*args: Any, **kwargs: Any) -> Any:
            return jt.evaluate(state, make(*args, **kwargs), loss_fn)

        return functools.wraps(make)(use)

    test = train[:16]
    linear = jt.models.Linear(1)
    linear_state = jt.init_state(linear, optimizer, line.inputs[:1], key=key)
    linear_state = jax.device_put(linear_state, device)
    torch_module = torch.nn.Linear(1, 1)
    axes = {"x": [1.0, 2.0], "y": [1.0, 2.0]}
    table = jt.sweep(lambda x, y: {"value": x * y}, axes, at_once=1, callbacks=[])
    result = jt.sweep(run, {"learning_rate": [0.1, 0.2]}, at_once=1, callbacks=[])
    found = {
        "folder": folder, "jt": jt, "key": key, "inputs": inputs, "targets": targets,
        "train": train, "test": test,
        "batch": train[:16], "model": model, "optimizer": optimizer, "state": state,
        "loss_fn": loss_fn, "metric_fns": {"accuracy": jt.metrics.accuracy}, "line": line,
        "linear": linear, "linear_state": linear_state, "table": table, "run": run,
        "result": result, "stop": lambda run: True,
        "nnx_state": jt.init_state(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), None, line.inputs, key=key),
        "norm_state": jt.init_state(Normed(), optimizer, inputs, key=key),
        "indices": jnp.arange(4), "weights": jnp.ones(32), "ones8": jnp.ones(8),
        "logits": inputs[:8, :4], "labels8": jnp.arange(8) % 4, "scores": jnp.full((8, 2), 0.5),
        "class_weights": jnp.arange(1.0, 5.0), "torch_module": torch_module,
        "torch_optimizer": torch.optim.SGD(torch_module.parameters(), 0.1),
        "distance": lambda params: jnp.sum(jnp.square(params - 3)), "start": jnp.zeros(2),
        "mesh": jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,)),
        "callback_used": callback_used, "optimizer_used": optimizer_used,
        "model_used": model_used, "stream_used": stream_used,
    }  # fmt: skip
    jt.save(folder / "model.safetensors", state)
    callbacks = [jt.callbacks.checkpoint(folder / "run")]
    jt.fit(state, train, loss_fn=loss_fn, epochs=1, callbacks=callbacks)
    result.save(folder / "sweep.npz")
    jt.export.stablehlo(state, folder / "model.stablehlo", inputs, platforms=("cpu",))
    (folder / "data.idx").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 2]))
    torch.save(torch_module.state_dict(), folder / "model.pt")
    return found


class Opaque:
    """An object that nothing knows."""

    def __repr__(self) -> str:
        return "Opaque()"


def odd_values(valid: Any) -> dict[str, Any]:
    """Returns odd values by name; some are made from the valid one."""
    values = {
        "None": None,
        "True": True,
        "zero": 0,
        "negative": -1,
        "huge": 10**20,
        "fraction": 2.5,
        "nan": float("nan"),
        "infinity": float("inf"),
        "complex": 1j,
        "empty text": "",
        "text": "text",
        "null character": "a\0b",
        "missing path": Path("missing") / "file",
        "bytes": b"bytes",
        "list": [],
        "list of numbers": [1.0, 2.0],
        "tuple": (),
        "pair": (None, None),
        "dict": {},
        "nested": {"a": [1, {"b": None}]},
        "set": {1, 2},
        "generator": (number for number in range(3)),
        "function": lambda: None,
        "class": int,
        "module": jax,
        "object": Opaque(),
        "NumPy number": np.float64(0.5),
        "small NumPy integer": np.int8(3),
        "scalar": jnp.float32(0.5),
        "empty array": np.zeros((0, 8), np.float32),
        "other shape": np.ones((3, 5, 2), np.float32),
        "vector": jnp.ones(7),
        "array of NaN": np.full((32, 8), np.nan, np.float32),
        "complex array": np.ones((32, 8), np.complex64),
        "text array": np.array(["a", "b"]),
        "object array": np.array([None, {}], dtype=object),
        "masked array": np.ma.masked_array(np.ones((8, 2), np.float32), np.eye(8, 2)),
        "dates": np.array(["2020-01-01"], "datetime64[D]"),
        "keys": jax.random.split(jax.random.key(0), 2),
        "shape": jax.ShapeDtypeStruct((32, 8), jnp.float32),
        "data set": jt.Dataset(np.ones((4, 2), np.float32), np.ones(4, np.float32)),
    }
    leaves = jax.tree.leaves(valid)
    if leaves and all(isinstance(leaf, jax.Array) for leaf in leaves):
        values["other device"] = jax.device_put(valid, jax.devices()[1])
        values["half"] = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, float) else leaf,
            valid,
        )
    return values


@dataclasses.dataclass(frozen=True)
class Call:
    """A valid call, of which arguments are replaced."""

    text: str

    @property
    def name(self) -> str:
        """The function that is called, without arguments of the last call."""
        node: Any = ast.parse(self.text, mode="eval").body
        return ast.unparse(node.value if isinstance(node, ast.Subscript) else node.func)

    def bound(self, values: dict[str, Any]) -> tuple[Any, list[str], dict[str, Any]]:
        """Returns the function, the names of its positional arguments, and all by name."""
        node: Any = ast.parse(self.text, mode="eval").body
        if isinstance(node, ast.Subscript):
            function = eval(self.name, values).__getitem__
            given = {"0": eval(ast.unparse(node.slice), values)}
            return function, ["0"], given
        function = eval(self.name, values)
        given = {str(i): eval(ast.unparse(x), values) for i, x in enumerate(node.args)}
        positional = list(given)
        given |= {x.arg: eval(ast.unparse(x.value), values) for x in node.keywords}
        return function, positional, given


TRACED = "traced"
# Numbers of iterations or examples: a huge one is valid, and takes forever or no memory has it.
LONG = {"epochs", "steps", "max_steps", "examples"}
# Functions of arrays, which may raise JAX's own errors; see jaxtrain.errors.
PURE = (
    *("jt.losses.", "jt.metrics.", "jt.models.dropout", "jt.models.uniform_fan_in"),
    *("jt.gradients", "jt.apply_gradients", "jt.minimize", "train.take"),
    *(f"jt.optimizers.{name}(" for name in ("cosine_annealing_lr", "linear_lr", "step_lr")),
    "jt.optimizers.one_cycle_lr(",
)
OWN_ERRORS = tuple(
    each
    for each in vars(jt.errors).values()
    if inspect.isclass(each) and issubclass(each, Exception)
)


def is_documented(error: BaseException, name: str, odd: str) -> bool:
    """Returns whether a call may raise an error; see `jaxtrain.errors`."""
    if isinstance(error, OWN_ERRORS) or odd.endswith((": function", ": class")):
        return True  # a function of the user's own raises what it raises
    is_of_jax = isinstance(error, TypeError | ValueError | IndexError | OverflowError)
    is_of_jax |= type(error).__module__.startswith("jax")
    return name.startswith(PURE) and is_of_jax


def odd_calls(
    call: Call, values: dict[str, Any], count: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields calls with one or two odd arguments: which are odd, and a function that calls."""
    function, positional, given = call.bound(values)
    parameters = list(inspect.signature(function).parameters.values())
    optional = [
        each.name
        for each in parameters[len(positional) :]
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and each.name not in (*given, "parent", "name")  # those of Flax
    ]
    last = len(parameters) - 1
    title = {x: parameters[min(int(x), last)].name if x.isdigit() else x for x in given}
    pairs = [
        (name, odd)
        for name in (*given, *optional)
        for odd in (*odd_values(given.get(name)), TRACED)
        if not (odd == "huge" and title.get(name, name) in LONG)
    ]
    chosen = random.Random(call.text)
    for _ in range(count):
        odd = dict(chosen.sample(pairs, chosen.choice((1, 1, 1, 2))))

        def attempt(odd: dict[str, str] = odd) -> None:
            arguments = given | {
                name: odd_values(given.get(name))[kind]
                for name, kind in odd.items()
                if kind != TRACED
            }
            traced = {
                name: given[name] if is_numeric(given.get(name)) else 1.0
                for name, kind in odd.items()
                if kind == TRACED
            }

            def run(traced: dict[str, Any]) -> None:
                every = arguments | traced
                function(*[every.pop(name) for name in positional], **every)

            jax.jit(run)(traced) if traced else run({})

        yield ", ".join(f"{title.get(name, name)}: {kind}" for name, kind in odd.items()), attempt


def is_numeric(valid: Any) -> bool:
    leaves = jax.tree.leaves(valid)
    return bool(leaves) and all(isinstance(leaf, (jax.Array, float, int)) for leaf in leaves)
