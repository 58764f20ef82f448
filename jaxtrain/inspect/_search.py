"""Searches for changes of a PyTorch module with which it computes what a model does."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain._differences import difference, explained, largest
from jaxtrain.inspect import _causes
from jaxtrain.inspect._torch_calls import Change, Reference, Site

# How long a search takes, and how many changes it finds.
SECONDS, _MAXIMUM_CHANGES = 60, 8
_OUTPUTS = Site("", "outputs", 0)
_Option = TypeVar("_Option")


class Search:
    """The search in some examples.

    Attributes:
      first: name in PyTorch of the first layer whose output differs without changes; "" are the
        outputs; None if none differs.
      changes: those found so far.
      is_done: whether both sides agree with the changes.
      is_stopped: whether the search ended because it took `SECONDS`.
    """

    def __init__(
        self,
        reference: Reference,
        exact: Reference,
        inputs: PyTree,
        layers: Mapping[str, np.ndarray],
        outputs: Sequence[np.ndarray],
        tolerance: float,
    ) -> None:
        """Starts a search.

        Args:
          reference: the module.
          exact: the module in float64.
          inputs: some examples.
          layers: entries of the outputs of the model's layers, by name in PyTorch, in the order
            of the model.
          outputs: leaves of the model's outputs in the layout of PyTorch.
          tolerance: of arrays, relative to the largest entry.
        """
        self._reference, self._inputs = reference, inputs
        forward, rounded = reference.evaluate(inputs), exact.evaluate(inputs)
        self.sites = {**forward.sites, _OUTPUTS: {}}
        # Layers whose outputs have no examples, such as embedded positions, are left out: the
        # model's output is known after it meets the examples.
        one = reference.evaluate(jax.tree.map(lambda leaf: leaf[:1], inputs)).layers
        is_one = len(jax.tree.leaves(inputs)[0]) == 1
        self._ours = {
            name: x
            for name, x in layers.items()
            if name in forward.layers and (is_one or one[name].size < forward.layers[name].size)
        }
        self._outputs = outputs
        self._noise = {
            name: difference(np.sort(x, None), np.sort(rounded.layers[name], None))
            for name, x in forward.layers.items()
            if name in self._ours
        }
        self._tolerance = tolerance
        self._deadline, self.is_stopped = time.monotonic() + SECONDS, False
        self.changes: list[Change] = []
        differences = self._differences(())
        index = _first(differences)
        self.is_done = index == len(differences)
        self.first = None if self.is_done else [*self._ours, ""][index]

    def run(self, changes: Sequence[Change] = ()) -> None:
        """Adds changes until both sides agree, or no change makes the first layer agree."""
        self.changes += changes
        all_changes = [
            change
            for site, arguments in self.sites.items()
            for change in _causes.in_evaluation(site, arguments)
        ]
        while len(self.changes) < _MAXIMUM_CHANGES:
            before = self._differences(self.changes)
            index = _first(before)
            self.is_done = index == len(before)
            if self.is_done:
                return
            found = self._best(index, all_changes)
            if not found:
                return
            self.changes += found

    def run_training(
        self, further: Sequence[Change], failing: Callable[[Sequence[Change]], float]
    ) -> None:
        """Adds changes with which fewer arrays differ in training.

        Args:
          further: changes of the module to try besides those of calls.
          failing: returns the number of arrays that differ with some changes.
        """
        count = failing(self.changes)
        calls = [
            change
            for site, arguments in self.sites.items()
            for change in _causes.in_training(site, arguments)
        ]
        groups = [change for change in _causes.joined(calls) if len(change.calls) > 1]
        while count and len(self.changes) < _MAXIMUM_CHANGES:
            for options in ([*groups, *further], calls):
                counts = [failing([*self.changes, x]) for x in self._in_time(options)]
                if min(counts, default=count) < count:
                    count = min(counts)
                    self.changes.append(options[counts.index(count)])
                    break
            else:
                break

    def _best(self, index: int, changes: Sequence[Change]) -> Sequence[Change]:
        """Returns the changes that lead furthest, or () if the first layer still differs."""
        start, stop = self._window(index)
        calls = list(self.sites)
        near, before = set(calls[start:stop]), set(calls[:stop])
        some = [change for change in changes if near & change.calls.keys()]
        pairs = (x for x in itertools.combinations(some, 2) if x[0].calls != x[1].calls)
        groups = list(_causes.joined(changes))
        for options in (
            [(x,) for x in groups if near & x.calls.keys()],
            [(x,) for x in groups if before & x.calls.keys()],
            pairs,
        ):
            best: Sequence[Change] = ()
            best_key = index, -math.inf
            for option in self._in_time(options):
                after = self._differences([*self.changes, *option])
                key = _first(after), -after[index]
                if key > best_key:
                    best, best_key = option, key
            if best_key[0] > index:
                return best
        return ()

    def _window(self, index: int) -> tuple[int, int]:
        """Returns the calls between the last layer that agrees and the first that differs."""
        names, order = list(self._ours), [site.layer for site in self.sites]
        calls = [[i for i, layer in enumerate(order) if layer == name] for name in names]
        start = max(calls[index - 1], default=-1) + 1 if index else 0
        stop = max(calls[index], default=-2) + 1 if index < len(names) else len(order)
        return (start, stop) if start < stop else (0, max(stop, 0) or len(order))

    def _differences(self, changes: Sequence[Change]) -> list[float]:
        """Returns the differences of layers and outputs in multiples of what is explained."""
        forward = self._reference.evaluate(self._inputs, changes)
        found = []
        for name, ours in self._ours.items():
            theirs = np.sort(forward.layers[name], None) if name in forward.layers else None
            noise = self._noise[name]
            found.append(_ratio(theirs, np.sort(ours, None), self._tolerance, noise))
        pairs = itertools.zip_longest(forward.outputs or (), self._outputs)
        found.append(max(_ratio(x, y, self._tolerance, 0.0) for x, y in pairs))
        return found

    def _in_time(self, options: Iterable[_Option]) -> Iterator[_Option]:
        """Yields options until the search has taken `SECONDS`."""
        for option in options:
            if time.monotonic() > self._deadline:
                self.is_stopped = True
                return
            yield option


def _first(differences: Sequence[float]) -> int:
    """Returns the index of the first difference that is not explained."""
    return next((i for i, x in enumerate(differences) if not x <= 1), len(differences))


def _ratio(theirs: Any, ours: Any, tolerance: float, noise: float) -> float:
    if theirs is None or ours is None:
        return math.inf
    return difference(theirs, ours) / max(explained(largest(theirs), tolerance, noise), 1e-12)
