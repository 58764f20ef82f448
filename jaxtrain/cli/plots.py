"""Pictures of a run, as matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxtrain import metrics
from jaxtrain._figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLES,
    VERMILION,
    YELLOW,
    Axes,
    Figure,
    MaxNLocator,
    label_axes,
)
from jaxtrain.dataset import Dataset
from jaxtrain.training.history import History

# What other pictures need of the style.
__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "VERMILION", "YELLOW"]
__all__ += ["Axes", "Figure", "MaxNLocator", "confusion_matrix", "contours", "generalization_gap"]
__all__ += ["label_axes", "line_fit", "line_loss", "of_classifier", "predictions", "subplots"]


def subplots(
    title: str, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any
) -> tuple[Figure, Any]:
    """Returns a figure with a title, and its axes: one, or an array."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, **options)


def of_classifier(
    title: str, history: History, test: Dataset, logits: ArrayLike
) -> dict[str, Figure]:
    """Returns the pictures of a classifier of images, by file name.

    Args:
      title: name of the data set.
      history: the history of the run.
      test: images with pixels from 0 to 255 and labels.
      logits: the predictions of the test images, [examples, classes].
    """
    pictures = {"learning_curves.png": history.plot(title)}
    if "validation_loss" in history:
        pictures["overfitting.png"] = generalization_gap(history, title)
    # With NumPy, nothing is compiled.
    images, labels, logits = (np.asarray(each) for each in (test.inputs, test.targets, logits))
    pictures["predictions.png"] = predictions(images, labels, logits.argmax(axis=-1))
    counts = np.asarray(metrics.confusion_matrix(logits, labels)).astype(int)
    picture = confusion_matrix(counts, f"{title}: {len(labels)} test images")
    return pictures | {"confusion_matrix.png": picture}


def generalization_gap(history: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draws training and validation loss, shades the gap and marks the best epoch.

    While both fall, the model learns; once the validation loss rises, it memorizes its examples
    (overfitting).
    """
    figure, ax = subplots(f"{title}: training against validation", size=(6.5, 4))
    epochs, train, validation = (history[k] for k in ("epoch", "train_loss", "validation_loss"))
    marker = "o" if len(epochs) <= 30 else None
    ax.plot(epochs, train, **STYLES["train"], marker=marker, label="training, mean over epoch")
    ax.plot(
        epochs, validation, **STYLES["validation"], marker=marker, label="validation, after epoch"
    )
    ax.fill_between(epochs, train, validation, color=GREY, alpha=0.25, label="gap")
    best = int(np.argmin(validation))
    ax.plot(epochs[best], validation[best], "*", color="black", markersize=13, label="best epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(ax, "epoch", "loss")
    ax.legend()
    return figure


def line_fit(
    points: Mapping[str, Dataset], x: ArrayLike, lines: Sequence[ArrayLike], title: str
) -> Figure:
    """Draws data, and the predicted line before and after training.

    Args:
      points: one or two data sets by name, x and y of shape [examples, 1].
      x: where the lines are predicted.
      lines: the predictions at `x` before and after training.
      title: title of the figure.
    """
    figure, ax = subplots(title, size=(6, 4))
    ax.plot(x, lines[0], color=GREY, linestyle=":", label="model before training")
    ax.plot(x, lines[1], color=GREEN, linestyle="-", label="model after training")
    styles = [(18, BLUE, "o"), (22, VERMILION, "^")]
    for (label, data), (size, color, marker) in zip(points.items(), styles, strict=False):
        style = {"color": color, "marker": marker, "label": label}
        ax.scatter(data.inputs, data.targets, s=size, zorder=3, **style)
    label_axes(ax, "x", "y")
    ax.legend()
    return figure


def line_loss(data: Dataset, weight: ArrayLike, bias: ArrayLike = 0.0) -> Any:
    """Returns the mean squared error of y = weight · x + bias, for one line or arrays of them."""
    x, y = np.ravel(data.inputs), np.ravel(data.targets)
    errors = np.asarray(weight)[..., None] * x + np.asarray(bias)[..., None] - y
    return (errors**2).mean(axis=-1)


def contours(
    ax: Axes, weights: np.ndarray, biases: np.ndarray, loss: np.ndarray, levels: Any
) -> None:
    """Draws lines of equal loss over weight and bias; the levels of a list are written on them."""
    lines = ax.contour(weights, biases, loss, levels=levels, cmap="viridis")
    if isinstance(levels, list):
        ax.clabel(lines, fmt="%g", fontsize=8)
    label_axes(ax, "weight w", "bias b", grid=False)


def predictions(
    images: np.ndarray, labels: np.ndarray, predicted: np.ndarray, columns: int = 10
) -> Figure:
    """Draws the first images with their predicted labels, and the first that are wrong.

    Args:
      images: pixels from 0 to 255, [examples, height, width].
      labels: the true labels, [examples].
      predicted: the predicted ones, [examples].
      columns: images per row.
    """
    mistakes = np.flatnonzero(predicted != labels)[:20]
    groups = [("the first test images: predicted class", np.arange(min(30, len(labels))))]
    if len(mistakes):
        groups.append(("the first mistakes: ✗ predicted class, true class", mistakes))
    rows = [-(-len(at) // columns) for _, at in groups]
    figure = Figure(figsize=(columns * 0.9, sum(rows) * 1.17 + len(groups) * 0.45))
    top = 1 - 0.35 / figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=top)
    axes = figure.subplots(len(groups), 1, height_ratios=rows, squeeze=False).ravel()
    height, width = images.shape[1:]
    above, beside = height // 3, width // 10
    # One image per group: axes for each digit would take longer than all other pictures.
    for ax, count, (heading, at) in zip(axes, rows, groups, strict=True):
        empty = count * columns - len(at)
        cells = np.pad(images[at], [(0, empty), (above, 0), (beside, 0)])
        cells = cells.reshape(count, columns, *cells.shape[1:]).swapaxes(1, 2)
        grid = cells.reshape(count * (above + height), columns * (beside + width))
        style = {"cmap": "gray_r", "vmin": 0, "vmax": 255}
        ax.imshow(grid, extent=(0, grid.shape[1], grid.shape[0], 0), **style)
        ax.set(xlim=(0, grid.shape[1] + beside), ylim=(grid.shape[0] + beside, 0))
        ax.set_title(heading, fontsize=10)
        ax.axis("off")
        for place, index in enumerate(at):
            row, column = divmod(place, columns)
            left, top = column * (beside + width) + beside, row * (above + height) + above
            right, bottom = left + width, top + height
            guess, label = predicted[index], labels[index]
            wrong = guess != label
            text = f"✗ {guess}, is {label}" if wrong else f"{guess}"
            style = {"color": VERMILION if wrong else "black", "fontsize": 9}
            ax.text((left + right) / 2, top, text, ha="center", va="bottom", **style)
            style = {"color": VERMILION, "linewidth": 2.5} if wrong else {"color": GREY}
            x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
            ax.plot(x, y, **({"linewidth": 0.5} | style))
    return figure


def confusion_matrix(counts: np.ndarray, title: str) -> Figure:
    """Draws how often each label was predicted as each class.

    Args:
      counts: (weighted) counts [classes, classes], labels in rows; shaded by the fraction of the
        label's examples.
      title: title of the figure.
    """
    figure, ax = subplots(title, size=(6.2, 5.6))
    totals = counts.sum(axis=1, keepdims=True)
    fractions = counts / np.where(totals > 0, totals, 1)
    # The square root makes a few errors visible beside a diagonal near 1.
    image = ax.imshow(np.sqrt(fractions), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if fractions[row, column] > 0.3 else "black"
            ax.text(column, row, f"{count:g}", ha="center", va="center", fontsize=8, color=color)
    ticks = range(len(counts))
    ax.set(xticks=ticks, yticks=ticks)
    label_axes(ax, "predicted class", "true class", grid=False)
    bar = figure.colorbar(image, ax=ax, shrink=0.8, label="fraction of the true class (root scale)")
    marks = [0, 0.01, 0.05, 0.2, 0.5, 1]
    bar.set_ticks([math.sqrt(mark) for mark in marks], labels=[f"{mark:.0%}" for mark in marks])
    return figure
