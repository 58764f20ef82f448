"""from_torch returns the optimizer that a constructed optimizer of PyTorch is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt

torch = pytest.importorskip("torch")

PARAMS = {"0": {"weight": jnp.array([1.0, -2.0])}, "1": {"weight": jnp.array([0.5]), "bias": 2.0}}


def make(kind: str, groups: Any = None, **options: Any) -> tuple[Any, Any]:
    """Returns a module with the values of PARAMS, and an optimizer of it."""
    module = torch.nn.Module()
    for name, layer in PARAMS.items():
        child = torch.nn.Module()
        for part, value in layer.items():
            child.register_parameter(part, torch.nn.Parameter(torch.tensor(np.asarray(value))))
        module.add_module(name, child)
    params = module.parameters() if groups is None else groups(module)
    return module, getattr(torch.optim, kind)(params, **options)


def two_groups(module: Any) -> list[dict[str, Any]]:
    layers = dict(module.named_children())
    return [
        {"params": [layers["0"].weight], "lr": 0.5},
        {"params": [layers["1"].weight], "weight_decay": 0.1},
    ]


@pytest.mark.parametrize(
    ("kind", "groups", "options"),
    [
        ("SGD", None, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("SGD", two_groups, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        ("SGD", lambda module: module.named_parameters(), {"lr": torch.tensor(0.1)}),
        ("Adam", None, {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True, "foreach": True}),
        ("Adam", None, {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True}),
        ("AdamW", two_groups, {"lr": 0.01, "eps": 1e-3}),
        ("RMSprop", None, {"lr": 0.01, "alpha": 0.9, "centered": True, "momentum": 0.5}),
        ("Rprop", None, {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-4, 1.0)}),
        ("Adagrad", None, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3}),
        ("Adadelta", None, {"lr": 0.5, "rho": 0.8}),
    ],
)
def test_it_takes_the_steps_of_the_optimizer(kind: str, groups: Any, options: Any) -> None:
    module, theirs = make(kind, groups, **options)
    ours = jt.optimizers.from_torch(theirs, module if groups is two_groups else None)

    def update(carry: Any, _: Any) -> Any:
        params, opt_state = carry
        grads = jax.tree.map(lambda x: 2 * x + 0.1, params)
        updates, opt_state = ours.update(grads, opt_state, params)
        return (jax.tree.map(jnp.add, params, updates), opt_state), None

    params = jax.tree.map(jnp.asarray, PARAMS)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, length=3))(
        (params, ours.init(params))
    )
    for _ in range(3):
        for x in module.parameters():
            x.grad = 2 * x.detach() + 0.1
        theirs.step()
    for name, layer in params.items():
        for part, value in layer.items():
            expected = module.get_parameter(f"{name}.{part}").detach().numpy()
            np.testing.assert_allclose(value, expected, rtol=5e-5)


def stepped(kind: str) -> Any:
    module, optimizer = make(kind, lr=0.1)
    for x in module.parameters():
        x.grad = torch.ones_like(x)
    optimizer.step()
    return optimizer


def scheduled() -> Any:
    optimizer = make("SGD", lr=0.1)[1]
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (lambda: make("LBFGS")[1], "is a LBFGS; expected .* jaxtrain.optimizers.lbfgs or minimize"),
        (lambda: make("NAdam")[1], "is a NAdam; expected an optimizer"),
        (lambda: 0.1, "is a float; expected an optimizer"),
        (lambda: make("SGD", maximize=True)[1], "maximize is True .* expected maximize=False"),
        (lambda: make("SGD", two_groups)[1], r"2 groups .* from_torch\(torch_optimizer, module\)"),
        (lambda: stepped("Adam"), "has taken steps"),
        (scheduled, r"has a scheduler.*step_lr"),
    ],
)
def test_what_cannot_be_translated_is_refused(optimizer: Any, match: str) -> None:
    with pytest.raises(jt.errors.InputError, match=match):
        jt.optimizers.from_torch(optimizer())


def test_a_group_without_names_has_all_parameters() -> None:
    """Of a module, or of one in another layout; those without a gradient are not trained."""
    head = make("Adam", lambda module: [*module.children()][1].parameters())[1]
    match = r"Adam trains 2 numbers of unnamed .* has 4; .*from_torch\(torch_optimizer, module\)"
    params = jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(jt.errors.InputError, match=match):
        jt.optimizers.from_torch(head).init(params)
    jt.optimizers.from_torch(head).init(params["1"])
    jt.optimizers.from_torch(make("Adam")[1]).init({"kernel": jnp.ones((2, 2))})
    module, frozen = make("Adam")
    module.get_parameter("0.weight").requires_grad_(False)
    with pytest.raises(jt.errors.InputError, match=match):
        jt.optimizers.from_torch(frozen).init(params)


def test_groups_belong_to_one_module() -> None:
    module, optimizer = make("SGD", two_groups)
    with pytest.raises(jt.errors.InputError, match=r"a parameter .* the module does not have"):
        jt.optimizers.from_torch(optimizer, make("SGD")[0])
    with pytest.raises(jt.errors.InputError, match=r"none of the parameters .* 0\.weight"):
        jt.optimizers.from_torch(optimizer, module).init({"Dense_0": jnp.ones(2)})
