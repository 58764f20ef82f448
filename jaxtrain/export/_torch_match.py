"""Finds which layer of PyTorch is which layer of a model, by names, order and shapes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

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
_AnyLayer = TypeVar("_AnyLayer")


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


def _torch_layers(shapes: Mapping[str, Shape]) -> list[TorchLayer]:
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
      is_called_in_order: whether `ours` are in the order of their calls, or only of their names.
      strict: whether every layer needs a counterpart.

    Raises:
      InputError: a layer has no counterpart, or more than one possible.
    """
    theirs = _torch_layers(shapes)
    pairs = _mapped(theirs, ours, mapping)
    is_created_in_order = _have_creation_order(list(shapes))
    if not is_created_in_order:
        theirs = sorted(theirs, key=lambda layer: _natural_sort_key(layer.name))
    if not is_called_in_order:
        ours = sorted(ours, key=lambda layer: _natural_sort_key(layer.path))
    theirs_left = [layer for layer in theirs if layer.name not in pairs]
    taken = {layer.path for layer in pairs.values()}
    left = [layer for layer in ours if layer.path not in taken]
    same, misfits = _by_name(theirs_left, left)
    if strict and misfits:
        _raise_misfits([_difference(a, b) for a, b in misfits])
    pairs |= same
    taken = {layer.path for layer in same.values()}
    theirs_left = [layer for layer in theirs_left if layer.name not in same]
    left = [layer for layer in left if layer.path not in taken]
    if strict:
        _check_counts(theirs_left, left)
    pairs |= _by_shapes(theirs_left, left, is_created_in_order, is_called_in_order)
    if not pairs:
        raise InputError(
            "no layer of the state dict has a counterpart in the model; expected a state dict of a "
            "similar network"
        )
    by_name = {layer.name: layer for layer in theirs}
    names = {layer.path: name for name, layer in pairs.items()}
    return [(by_name[names[layer.path]], layer) for layer in ours if layer.path in names]


def _by_name(
    theirs: Sequence[TorchLayer], ours: Sequence[Layer]
) -> tuple[dict[str, Layer], list[tuple[TorchLayer, Layer]]]:
    """Returns pairs of equal names, and those of them whose tensors differ.

    Names count only if one side has all names of the other. Otherwise a few may be equal by chance,
    such as the numbers of two sequences of which one also counts activations.
    """
    by_name = dict(zip(_short([layer.name for layer in theirs]), theirs, strict=True))
    by_path = dict(zip(_short([layer.path for layer in ours]), ours, strict=True))
    are_distinct = len(by_name) == len(theirs) and len(by_path) == len(ours)
    if not are_distinct or not (
        by_name.keys() <= by_path.keys() or by_path.keys() <= by_name.keys()
    ):
        return {}, []
    pairs = [(by_name[name], by_path[name]) for name in by_name if name in by_path]
    fit = {a.name: b for a, b in pairs if _fits(a, b)}
    return fit, [(a, b) for a, b in pairs if a.name not in fit]


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
    is_created_in_order: bool,
    is_called_in_order: bool,
) -> dict[str, Layer]:
    """Returns pairs of equal shapes, several of which must have a known order."""
    groups: dict[_Signature, tuple[list[TorchLayer], list[Layer]]] = {}
    for layer in theirs:
        groups.setdefault(_signature(layer), ([], []))[0].append(layer)
    for own in ours:
        groups.setdefault(_signature(own), ([], []))[1].append(own)
    groups = {signature: group for signature, group in groups.items() if all(group)}
    in_sequence = {signature for signature in groups if not _is_single(signature)}
    created = [layer for layer in theirs if _signature(layer) in in_sequence]
    called = [layer for layer in ours if _signature(layer) in in_sequence]
    different = [pair for pair in zip(created, called, strict=False) if not _fits(*pair)]
    are_known = is_created_in_order and is_called_in_order
    are_in_order = are_known and not different and len(created) == len(called)
    where = ""
    if are_known and different:
        where = f" (the orders first differ at {different[0][0].name} and {different[0][1].path})"
    pairs: dict[str, Layer] = {}
    for signature, (some, own_some) in groups.items():
        # Single parameters of a module come before its layers, wherever they are used.
        is_called = is_called_in_order and signature in in_sequence
        # If not all layers are in the same order, numbers in names may tell that of these.
        names_known = _numbers_give_order([layer.name for layer in some])
        paths_known = _numbers_give_order([layer.path for layer in own_some])
        is_clear = (are_in_order and is_called) or (
            (names_known or (is_created_in_order and not is_called)) and (paths_known or is_called)
        )
        if len(some) != len(own_some) or not (is_clear or len(some) == 1):
            _raise_unclear(some, own_some, where, is_created_in_order)
        pairs |= {layer.name: own for layer, own in zip(some, own_some, strict=True)}
    return pairs


def _is_single(signature: _Signature) -> bool:
    return any(name == "" for name, _ in signature)


def _raise_unclear(
    theirs: Sequence[TorchLayer], ours: Sequence[Layer], where: str, is_created_in_order: bool
) -> NoReturn:
    names, paths = [layer.name for layer in theirs], [layer.path for layer in ours]
    hint = (
        ""
        if is_created_in_order
        else (", or module.state_dict() in place of a safetensors file, whose names are sorted")
    )
    raise InputError(
        f"the order of the layers does not determine which of {_listed(names)} in PyTorch is which "
        f"of {_listed(paths)} in the model{where}; expected a mapping, such as "
        f"mapping={{{names[0]!r}: {paths[0]!r}}}{hint}",
        argument="mapping",
    )


def _mapped(
    theirs: Sequence[TorchLayer], ours: Sequence[Layer], mapping: Mapping[str, str]
) -> dict[str, Layer]:
    """Returns the pairs that the user's mapping names."""
    by_name = {layer.name: layer for layer in theirs}
    by_path = {layer.path: layer for layer in ours}
    for kind, given, known in (
        ("PyTorch", mapping.keys(), by_name),
        ("the model", mapping.values(), by_path),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(
                f"mapping has the layer {unknown[0]!r}, which {kind} does not have; expected one "
                f"of {_listed(list(known))}",
                argument="mapping",
            )
    twice = [path for path, count in Counter(mapping.values()).items() if count > 1]
    if twice:
        raise InputError(
            f"mapping has two layers for {twice[0]!r}; expected each layer once", argument="mapping"
        )
    pairs = {name: by_path[path] for name, path in mapping.items()}
    wrong = [
        _difference(by_name[name], layer)
        for name, layer in pairs.items()
        if not _fits(by_name[name], layer)
    ]
    if wrong:
        raise InputError(f"{'; '.join(wrong)}; expected layers of the same shapes in mapping")
    return pairs


def _check_counts(theirs: Sequence[TorchLayer], ours: Sequence[Layer]) -> None:
    """Raises InputError, naming all tensors that differ, unless there are as many of each shape."""
    extra, missing = _left_over(theirs, ours), _left_over(ours, theirs)
    if len(extra) == len(missing):
        texts = [_difference(a, b) for a, b in zip(extra, missing, strict=True)]
    else:
        texts = [
            f"{layer.tensors[part]} {list(shape)} has no counterpart in the model"
            for layer in extra
            for part, shape in layer.shapes.items()
        ]
        for own in missing:
            needs = ", ".join(f"{x or 'a tensor'} {list(shape)}" for x, shape in own.shapes.items())
            where = own.path or "the model"
            texts.append(f"{where} needs {needs}, which the state dict does not have")
    if texts:
        _raise_misfits(texts)


def _raise_misfits(texts: Sequence[str]) -> NoReturn:
    raise InputError(
        f"{'; '.join(texts)}; expected a state dict of the same network (mapping= names layers, "
        "strict=False leaves out those without a counterpart)"
    )


def _left_over(layers: Sequence[_AnyLayer], others: Sequence[Any]) -> list[_AnyLayer]:
    """Returns the layers beyond the number that the other side has of their shapes."""
    left, found = Counter(map(_signature, others)), []
    for layer in layers:
        if left[_signature(layer)] > 0:
            left[_signature(layer)] -= 1
        else:
            found.append(layer)
    return found


def _difference(theirs: TorchLayer, ours: Layer) -> str:
    """Describes how a layer of PyTorch differs from the one that should be the same."""
    texts = []
    where = f"for {ours.path}" if ours.path else "for the model"
    for part, shape in ours.shapes.items():
        full = theirs.tensors.get(part, ".".join(filter(None, [theirs.name, part])))
        found = theirs.shapes.get(part)
        if found is None:
            texts.append(f"{full} {list(shape)} is missing {where}")
        elif found != shape:
            hint = " (it looks transposed)" if found == shape[::-1] else ""
            texts.append(f"{full} has the shape {list(found)}, not {list(shape)} {where}{hint}")
    texts += [
        f"{theirs.tensors[part]} {list(shape)} is not used by {ours.path or 'the model'}"
        for part, shape in theirs.shapes.items()
        if part not in ours.shapes
    ]
    return "; ".join(texts)


def _fits(theirs: TorchLayer, ours: Layer) -> bool:
    return _signature(theirs) == _signature(ours)


def _signature(layer: Any) -> _Signature:
    return tuple(sorted(layer.shapes.items()))


def _natural_sort_key(name: str) -> list[tuple[int, int | str]]:
    """Returns a key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _numbers_give_order(names: Sequence[str]) -> bool:
    """Returns whether the numbers in some dotted names tell their order."""
    paths = [name.split(".") for name in names]
    for a in paths:
        for b in paths:
            first = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), None)
            if first is not None and len({re.sub(r"\d+$", "", part) for part in first}) > 1:
                return False
    return True


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
