"""scikit-learn's bundled digits in MNIST's shape: the data set that needs no network."""

from __future__ import annotations

import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain.data.idx import Images

# A fixed split, so that accuracies can be compared between runs and machines.
_TEST_FRACTION = 0.2
_SPLIT_SEED = 0


def load_digits() -> tuple[Images, Images]:
    """Loads the 1,797 images of 8 × 8 pixels with 17 grey levels, scaled to 28 × 28 and 256 levels.

    Each pixel becomes a block of 3 × 3, with a border of 2 pixels on each side, so that a digit
    fills 24 × 24 of the image (in MNIST 20 × 20).

    Returns:
      (images, labels) for training (1,437) and testing (360), stratified by class: images uint8
      [examples, 28, 28], labels int32 [examples].
    """
    with needs_extra("data"):
        from sklearn.datasets import load_digits as load_sklearn_digits
        from sklearn.model_selection import train_test_split

    bunch = load_sklearn_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.pad(images.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    labels = bunch.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=_TEST_FRACTION, random_state=_SPLIT_SEED, stratify=labels
    )
    return (train_images, train_labels), (test_images, test_labels)
