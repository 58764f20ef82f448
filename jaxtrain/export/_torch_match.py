"""Matches PyTorch layers to model layers, by names, order and shapes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtrain.errors import InputError
from jaxtrain.export._torch_layers import Layer, Shape

# Tensors that the other libraries do not have.
_COUNTERS = {"num_batches_tracked"}
# Names of the tensors of layers; other tensors are single parameters of a module.
_PARTS = {
    *("weight", "bias", "running_mean", "running_var", "in_proj_weight", "in_proj_bias"),
    *("weight_ih", "weight_hh", "bias_ih", "bias_hh", *_COUNTERS),
}

_Signature = tuple[tuple[str, Shape], ...]


class TorchLayer(NamedTuple):
    """A layer of a state dict.

    Attributes:
      name: its name, such as "layer1.0.conv1".
      tensors: full names of its tensors, by their name within the layer.
      shapes: their shapes.
    """

    name: str
    tensors: dict[str, str]
    shapes: dict[str, Shape]


def torch_layers(shapes: Mapping[str, Shape]) -> list[TorchLayer]:
    """Groups the tensors of a state dict by layer.

    The layers of a deep LSTM are layers of their own, "lstm.l0" and "lstm.l1".
    """
    found: dict[str, TorchLayer] = {}
    for full, shape in shapes.items():
        name, part = _split(full, shapes)
        layer = found.setdefault(name, TorchLayer(name, {}, {}))
        layer.tensors[part] = full
        if part not in _COUNTERS:
            layer.shapes[part] = shape
    return list(found.values())


def _split(full: str, names: Collection[str]) -> tuple[str, str]:
    """Returns the layer of a tensor and the tensor's name within the layer."""
    name, _, part = full.rpartition(".")
    recurrent = re.fullmatch(r"((?:weight|bias)_[ih]h)_(l\d+(?:_reverse)?)", part)
    if recurrent is not None:
        kind, layer = recurrent.groups()
        first = full.removesuffix(layer) + "l0"
        is_deep = layer != "l0" or {first[:-1] + "1", first + "_reverse"} & set(names)
        return (f"{name}.{layer}" if is_deep else name), kind
    outer, _, last = name.rpartition(".")
    if last == "out_proj" and ".".join(filter(None, [outer, "in_proj_weight"])) in names:
        return outer, f"out_proj.{part}"
    return (name, part) if part in _PARTS else (full, "")


def _have_creation_order(tensors: Sequence[str]) -> bool:
    """Returns whether tensors are in the order of a module, or in one that a file gave them.

    A safetensors file sorts the names; once loaded, the tensors of a layer may also be apart.
    """
    layers = [name for name, _ in itertools.groupby(_split(full, tensors)[0] for full in tensors)]
    return list(tensors) != sorted(tensors) and len(layers) == len(set(layers))


def match(
    shapes: Mapping[str, Shape],
    ours: Sequence[Layer],
    mapping: Mapping[str, str],
    *,
    is_called_in_order: bool,
    strict: bool,
) -> list[tuple[TorchLayer, Layer]]:
    """Returns pairs of layers, in the order of ours.

    Args:
      shapes: shapes of the tensors of a state dict by name.
      ours: layers of the model.
      mapping: paths of the model by names of PyTorch, for layers that are known.
      is_called_in_order: whether `ours` are in the order of their calls.
      strict: whether every layer needs a counterpart.

    Raises:
      InputError: a layer has no counterpart, or more than one possible.
    """
    theirs = torch_layers(shapes)
    pairs = _mapped(theirs, ours, mapping)

    def left() -> tuple[list[TorchLayer], list[Layer]]:
        taken = {layer.path for layer in pairs.values()}
        return [x for x in theirs if x.name not in pairs], [x for x in ours if x.path not in taken]

    named = _by_name(*left())
    pairs |= {a.name: b for a, b in named if _fits(a, b)}
    if strict:
        misfits = [pair for pair in named if not _fits(*pair)]
        _check_counts([a for a, _ in misfits], [b for _, b in misfits])
        _check_counts(*left())
    are_created_in_order = _have_creation_order(list(shapes))
    pairs |= _by_shapes(*left(), are_created_in_order, is_called_in_order)
    if not pairs:
        raise InputError(
            "no layer of the state dict has a counterpart in the model; expected a state dict of a "
            "similar network"
        )
    by_path = {pairs[layer.name].path: layer for layer in theirs if layer.name in pairs}
    return [(by_path[layer.path], layer) for layer in ours if layer.path in by_path]


def _check_counts(theirs: Sequence[TorchLayer], ours: Sequence[Layer]) -> None:
    """Raises InputError, naming all layers beyond those of equal shapes on the other side."""
    extra = [f"{_described(x)} has no counterpart in the model" for x in beyond(theirs, ours)]
    missing = [f"{_described(x)} has none in the state dict" for x in beyond(ours, theirs)]
    if extra or missing:
        raise InputError(
            f"{'; '.join(extra + missing)}; expected a state dict of the same network (mapping= "
            "names layers, strict=False leaves out those without a counterpart)"
        )


def beyond(layers: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Returns the layers that outnumber those of the same shapes on the other side."""
    left, found = Counter(map(_signature, others)), []
    for layer in layers:
        left[_signature(layer)] -= 1
        if left[_signature(layer)] < 0:
            found.append(layer)
    return found


def _mapped(
    theirs: Sequence[TorchLayer], ours: Sequence[Layer], mapping: Mapping[str, str]
) -> dict[str, Layer]:
    """Returns the pairs that the user's mapping names."""
    by_name, by_path = {x.name: x for x in theirs}, {x.path: x for x in ours}
    for name, path in mapping.items():
        for key, where, known in ((name, "PyTorch", by_name), (path, "the model", by_path)):
            if key not in known:
                raise InputError(
                    f"mapping has the layer {key!r}, which {where} does not have; expected one of "
                    f"{_listed(list(known))}",
                    argument="mapping",
                )
        if list(mapping.values()).count(path) > 1:
            raise InputError(
                f"mapping has two layers for {path!r}; expected each layer once", argument="mapping"
            )
        if not _fits(by_name[name], by_path[path]):
            raise InputError(
                f"mapping has {_described(by_name[name])} for {_described(by_path[path])}; "
                "expected layers of the same shapes",
                argument="mapping",
            )
    return {name: by_path[path] for name, path in mapping.items()}


def _by_name(theirs: Sequence[TorchLayer], ours: Sequence[Layer]) -> list[tuple[TorchLayer, Layer]]:
    """Returns pairs of equal names.

    Names count only if one side has all names of the other. Otherwise a few may be equal by chance,
    such as the numbers of two sequences of which one also counts activations.
    """
    by_name = dict(zip(_short([layer.name for layer in theirs]), theirs, strict=True))
    by_path = dict(zip(_short([layer.path for layer in ours]), ours, strict=True))
    are_distinct = len(by_name) == len(theirs) and len(by_path) == len(ours)
    same = by_name.keys() & by_path.keys()
    is_subset = len(same) == min(len(by_name), len(by_path))
    return [(by_name[x], by_path[x]) for x in by_name if x in same and are_distinct and is_subset]


def _short(names: Sequence[str]) -> list[str]:
    """Returns names in lower case, with "_" for ".", without the modules that contain all layers.

    Such are the wrappers `_orig_mod` of `torch.compile` and `module` of `DataParallel`.
    """
    parents = [name.split(".")[:-1] for name in names] or [[]]
    ends = zip(min(parents), max(parents), strict=False)
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], ends)))
    return ["_".join(name.split(".")[shared:]).lower() for name in names]


def _by_shapes(
    theirs: Sequence[TorchLayer],
    ours: Sequence[Layer],
    are_created_in_order: bool,
    are_called_in_order: bool,
) -> dict[str, Layer]:
    """Returns pairs of equal shapes, several of which must have a known order."""
    expected = set(map(_signature, ours))
    shared = [x for x in dict.fromkeys(map(_signature, theirs)) if x in expected]
    # Single parameters of a module come before its layers, wherever they are used.
    ordered = [signature for signature in shared if signature[0][0] != ""]
    created = [x for x in theirs if _signature(x) in ordered]
    called = [x for x in ours if _signature(x) in ordered]
    are_known = are_created_in_order and are_called_in_order
    differing = next((x for x in zip(created, called, strict=False) if not _fits(*x)), None)
    is_same_order = are_known and differing is None and len(created) == len(called)
    pairs: dict[str, Layer] = {}
    for signature in shared:
        some: list[Any] = [x for x in theirs if _signature(x) == signature]
        own: list[Any] = [x for x in ours if _signature(x) == signature]
        names, paths = [x.name for x in some], [x.path for x in own]
        is_called = are_called_in_order and signature in ordered
        is_in_order = len(some) == 1 or (is_same_order and is_called)
        if not is_in_order or len(some) != len(own):
            is_numbered = is_called or _numbers_give_order(paths)
            if not (is_numbered and _numbers_give_order(names)) or len(some) != len(own):
                where = ""
                if are_known and differing is not None:
                    where = f" (the orders first differ at {differing[0].name} and "
                    where += f"{differing[1].path})"
                raise InputError(
                    f"the order of the layers does not determine which of {_listed(names)} in "
                    f"PyTorch is which of {_listed(paths)} in the model{where}; expected a "
                    f"mapping, such as mapping={{{names[0]!r}: {paths[0]!r}}}, or "
                    "module.state_dict() in place of a file, whose names may be sorted",
                    argument="mapping",
                )
            names.sort(key=_natural_sort_key)
            if not is_called:
                own.sort(key=lambda layer: _natural_sort_key(layer.path))
        pairs |= zip(names, own, strict=True)
    return pairs


def _described(layer: Any) -> str:
    """Returns the name of a layer with the shapes of its tensors."""
    parts = ", ".join(f"{name} {list(shape)}".strip() for name, shape in layer.shapes.items())
    return f"{layer[0] or 'the model'} ({parts})"


def _fits(theirs: TorchLayer, ours: Layer) -> bool:
    return _signature(theirs) == _signature(ours)


def _signature(layer: Any) -> _Signature:
    return tuple(sorted(layer.shapes.items()))


def _natural_sort_key(name: str) -> list[tuple[int, int | str]]:
    """Returns a key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _numbers_give_order(names: Sequence[str]) -> bool:
    """Returns whether names differ first by a number, such as "layer1.conv" and "layer2.conv"."""
    for a, b in itertools.combinations([name.split(".") for name in names], 2):
        first = next((pair for pair in zip(a, b, strict=False) if pair[0] != pair[1]), ())
        if len({re.sub(r"\d+$", "", part) for part in first}) > 1:
            return False
    return True


def _listed(names: Sequence[str], maximum: int = 8) -> str:
    more = f" and {len(names) - maximum} more" if len(names) > maximum else ""
    return ", ".join(names[:maximum]) + more
