"""Pictures of a run, as matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxtrain._figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    Axes,
    Figure,
    MaxNLocator,
    PercentFormatter,
    label_axes,
)
from jaxtrain.dataset import Dataset
from jaxtrain.training.fit import History

# What other pictures need of the style.
__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "VERMILION", "YELLOW"]
__all__ += ["Axes", "Figure", "MaxNLocator", "confusion_matrix", "generalization_gap", "label_axes"]
__all__ += ["learning_curves", "line_fit", "prediction_grid"]

TRAIN: dict[str, Any] = {"color": BLUE, "linestyle": "-"}
TEST: dict[str, Any] = {"color": VERMILION, "linestyle": "--"}


def learning_curves(history: History, title: str) -> Figure:
    """Draws the loss of each step and epoch, and the test accuracy if any, against the epoch."""
    accuracy = "test_accuracy" in history
    figure = Figure(figsize=(9 if accuracy else 6, 3.8), layout="constrained")
    axes = figure.subplots(1, 2 if accuracy else 1, squeeze=False)[0]
    epochs = history["epoch"]

    losses = history.step_losses
    steps_per_epoch = len(losses) // len(epochs)
    if steps_per_epoch > 1:
        progress = epochs[0] - 1 + np.arange(1, len(losses) + 1) / steps_per_epoch
        axes[0].plot(progress, losses, color=GREY, linewidth=0.5, alpha=0.6, label="training step")
    marker = "o" if len(epochs) <= 30 else None
    # The mean over an epoch is drawn at its middle, the test loss at its end.
    axes[0].plot(
        epochs - (0.5 if steps_per_epoch > 1 else 1),
        history["train_loss"],
        **TRAIN,
        marker=marker,
        label="training, mean over epoch" if steps_per_epoch > 1 else "training, before the step",
    )
    if "test_loss" in history:
        axes[0].plot(epochs, history["test_loss"], **TEST, marker=marker, label="test, after epoch")
    axes[0].set_yscale("log")
    label_axes(axes[0], "epoch", "loss (log scale)")
    axes[0].legend()

    if accuracy:
        axes[1].plot(epochs, history["test_accuracy"], **TEST, marker=marker)
        axes[1].set_title(f"{history['test_accuracy'][-1]:.2%} after the last epoch", fontsize=10)
        axes[1].margins(y=0.12)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        label_axes(axes[1], "epoch", "test accuracy")
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(title)
    return figure


def generalization_gap(history: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draws training and validation loss, shades the gap and marks the best epoch.

    While both fall, the model learns; once the validation loss rises, it memorizes its examples
    (overfitting).
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    epochs, train, validation = (history[k] for k in ("epoch", "train_loss", "validation_loss"))
    marker = "o" if len(epochs) <= 30 else None
    ax.plot(epochs, train, **TRAIN, marker=marker, label="training, mean over epoch")
    ax.plot(epochs, validation, **TEST, marker=marker, label="validation, after epoch")
    ax.fill_between(epochs, train, validation, color=GREY, alpha=0.25, label="gap")
    best = int(np.argmin(validation))
    ax.plot(epochs[best], validation[best], "*", color="black", markersize=13, label="best epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(ax, "epoch", "loss")
    ax.legend()
    figure.suptitle(f"{title}: training against validation")
    return figure


def line_fit(
    train: Dataset,
    test: Dataset,
    before: ArrayLike,
    after: ArrayLike,
    title: str,
) -> Figure:
    """Draws training and test points, and the predicted line before and after training.

    Args:
      train: the training points, x and y of shape [examples, 1].
      test: the test points.
      before: predictions before training, at the training points and then the test points.
      after: the same after training.
      title: title of the figure.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    x = np.concatenate([train.inputs, test.inputs])
    ax.plot(x, before, color=GREY, linestyle=":", label="model before training")
    ax.plot(x, after, color=GREEN, linestyle="-", label="model after training")
    ax.scatter(
        train.inputs, train.targets, s=18, color=BLUE, marker="o", label="training data", zorder=3
    )
    ax.scatter(
        test.inputs, test.targets, s=22, color=VERMILION, marker="^", label="test data", zorder=3
    )
    label_axes(ax, "x", "y")
    ax.legend()
    figure.suptitle(title)
    return figure


def prediction_grid(
    groups: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], columns: int = 10
) -> Figure:
    """Draws images with their predicted and true labels, and marks the wrong ones.

    Args:
      groups: (heading, images [examples, height, width], labels [examples], predicted
        [examples]); each group starts a new row.
      columns: images per row.
    """
    rows = [-(-len(images) // columns) for _, images, _, _ in groups]
    figure = Figure(figsize=(columns * 0.9, sum(rows) * 1.12 + len(groups) * 0.5))
    parts = figure.subfigures(len(groups), 1, height_ratios=[count + 0.45 for count in rows])
    for part, count, (heading, images, labels, predicted) in zip(
        np.ravel(np.asarray(parts)), rows, groups, strict=True
    ):
        part.suptitle(heading, fontsize=10, y=1 - 0.1 / (count + 0.45))
        axes = part.subplots(count, columns, squeeze=False).ravel()
        part.subplots_adjust(
            left=0.01,
            right=0.99,
            bottom=0.02,
            top=1 - 0.65 / (count + 0.45),
            wspace=0.1,
            hspace=0.5,
        )
        for ax in axes:
            ax.axis("off")
        for ax, image, label, guess in zip(axes, images, labels, predicted, strict=False):
            ax.axis("on")
            ax.set(xticks=[], yticks=[])
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            wrong = guess != label
            text = f"✗ {guess}, is {label}" if wrong else f"{guess}"
            ax.set_title(text, fontsize=9, color=VERMILION if wrong else "black", pad=5)
            ax.spines[:].set(color=VERMILION if wrong else GREY, linewidth=2.5 if wrong else 0.5)
    return figure


def confusion_matrix(counts: np.ndarray, title: str) -> Figure:
    """Draws how often each label was predicted as each class.

    Args:
      counts: (weighted) counts [classes, classes], labels in rows; shaded by the fraction of the
        label's examples.
      title: title of the figure.
    """
    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    ax = figure.subplots()
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
    figure.suptitle(title)
    return figure
