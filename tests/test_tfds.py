"""Prepared data sets of TensorFlow Datasets are read without TensorFlow; errors name the cause."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain.data.tfds import TfdsSource, load_tfds, open_tfds
from jaxtrain.errors import InputError, MissingExtraError

COUNTS = {"train": 12, "test": 5}

UNTYPED = pytest.mark.skipif(
    hasattr(open_tfds, "__wrapped__"), reason="the type checker raises first"
)


def image_of(label: int) -> np.ndarray:
    """The image that belongs to a label, so that a wrong pair is seen."""
    return (np.arange(64, dtype=np.uint8) + label).reshape(8, 8, 1)


def prepare(folder: Path, *, version: str = "1.0.0", **changed: Any) -> None:
    """Prepares the data set `little` as TFDS does, in two shards a split, without TensorFlow."""
    import tensorflow_datasets as tfds
    from PIL import Image

    counts = changed.get("counts", COUNTS)
    supervised = changed.get("supervised", ("image", "label"))

    class Little(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [  # noqa: RUF012 as TFDS documents it
            tfds.core.BuilderConfig(name=name) for name in changed.get("configs", [])
        ]

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=100),
                "pixels": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "row": tfds.features.Tensor(shape=(None,), dtype=np.float32),
                "weight": np.float32,
                "large": np.int64,
                "text": tfds.features.Text(),
                "words": tfds.features.Tensor(shape=(2,), dtype=np.str_),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(split) for split in counts}

        def _generate_examples(self, split: str) -> Iterator[Any]:
            for i in range(counts[split]):
                label = i + 50 * (split != "train")
                png = io.BytesIO()  # TFDS encodes arrays with TensorFlow, and keeps bytes.
                Image.fromarray(image_of(label)[..., 0]).save(png, "PNG")
                yield (
                    i,
                    {
                        "image": png.getvalue(),
                        "label": label,
                        "pixels": image_of(label),
                        "row": np.ones(1 + label % 2, np.float32),
                        "weight": label / 2,
                        "large": 2**40 + label,
                        "text": "word" * label,
                        "words": ["one", "two"],
                    },
                )

    Little.name = changed.get("name", Little.name)
    configs = changed.get("configs", [None])
    for config in configs:
        builder = Little(data_dir=folder, config=config, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder)
    return folder


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the folder that the test may change."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


def edit_info(folder: Path, **changed: Any) -> None:
    path = folder / "little" / "1.0.0" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_examples_are_pairs_of_numpy_values_in_the_order_of_tfds(prepared: Path) -> None:
    import tensorflow_datasets as tfds

    source = open_tfds("little", data_dir=prepared)
    expected = tfds.data_source("little", split="train", data_dir=prepared)
    assert len(source) == 12
    assert sorted(int(label) for _, label in source) == list(range(12))
    for index, (image, label) in enumerate(source):
        assert label == expected[index]["label"]
        assert label.dtype == np.int64
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, image_of(int(label)))


def test_a_batch_is_the_examples_at_its_indices(prepared: Path) -> None:
    source = open_tfds("little", data_dir=prepared)
    batch = source.__getitems__(np.array([11, 0, 11, 5]))
    assert [label for _, label in batch] == [source[i][1] for i in (11, 0, 11, 5)]
    np.testing.assert_array_equal(batch[1][0], source[0][0])
    for index in (-1, 12):
        for read in (lambda i=index: source[i], lambda i=index: source.__getitems__([0, i])):
            with pytest.raises(IndexError, match=f"index is {index}; expected one from 0 to 11"):
                read()


def test_part_of_a_split_and_other_keys(prepared: Path) -> None:
    source = open_tfds("little", "train[4:]", prepared, keys=("text", "weight"))
    whole = open_tfds("little", "train", prepared)
    text, weight = source[0]
    assert len(source) == 8
    assert weight.dtype == np.float32
    assert weight == whole[4][1] / 2
    assert text == b"word" * int(whole[4][1])
    assert repr(source) == "TfdsSource('little', split='train[4:]', 8 examples)"


def test_features_that_are_not_used_are_not_decoded(prepared: Path, monkeypatch) -> None:
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", lambda *_: 1 / 0)
    pixels, label = open_tfds("little", data_dir=prepared, keys=("pixels", "label"))[3]
    np.testing.assert_array_equal(pixels, image_of(int(label)))


def test_load_gives_arrays_of_both_splits(prepared: Path) -> None:
    for (images, labels), count in zip(load_tfds("little", prepared), (12, 5), strict=True):
        assert images.shape == (count, 8, 8, 1)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(images, [image_of(int(label)) for label in labels])
    assert sorted(labels) == [50, 51, 52, 53, 54]


@pytest.mark.parametrize(("key", "dtype"), [("weight", np.float32), ("large", np.int64)])
def test_load_keeps_targets_that_are_no_labels(tmp_path: Path, key: str, dtype: type) -> None:
    prepare(tmp_path, supervised=("label", key))
    (labels, targets), _ = load_tfds("little", tmp_path)
    assert targets.dtype == dtype
    np.testing.assert_array_equal(targets, labels / 2 if key == "weight" else labels + 2**40)


def test_the_default_folder_the_version_and_the_configuration(tmp_path, monkeypatch) -> None:
    for version, train in (("1.0.0", 3), ("10.0.0", 4), ("2.0.0", 5)):
        prepare(tmp_path, version=version, counts={"train": train, "validation": 2})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    lengths = [len(open_tfds(f"little{v}")) for v in ("", ":1.0.0", ":2.*.*")]
    assert lengths == [4, 3, 5]
    assert [len(labels) for _, labels in load_tfds("little")] == [4, 2]
    (tmp_path / "little" / "incomplete.X_99.0.0").mkdir()
    shutil.copytree(tmp_path / "little" / "1.0.0", tmp_path / "little" / "99.0.0.old")
    assert len(open_tfds("little")) == 4


def test_a_configuration_must_be_given_if_there_are_several(tmp_path: Path) -> None:
    prepare(tmp_path, configs=["big", "small"])
    assert len(open_tfds("little/small", "test", tmp_path)) == 5
    with pytest.raises(InputError, match=r"'little'.* expected one of little/big, little/small"):
        open_tfds("little", data_dir=tmp_path)
    shutil.rmtree(tmp_path / "little" / "big")
    assert len(open_tfds("little", "test", tmp_path)) == 5


def test_another_process_unpickles_an_open_source_without_tensorflow(prepared, tmp_path) -> None:
    source = open_tfds("little", data_dir=prepared)
    label = int(source[7][1])  # The files are open now.
    assert isinstance(pickle.loads(pickle.dumps(source)), TfdsSource)
    (tmp_path / "pickled").write_bytes(pickle.dumps(source))
    program = f"""
import pickle, sys
import jaxtrain.data.tfds
assert "tensorflow_datasets" not in sys.modules
source = pickle.load(open("pickled", "rb"))
print(source, source[7][1], source.__getitems__([7])[0][0].sum())
jaxtrain.data.tfds.load_tfds("little", {str(prepared)!r})
print("tensorflow" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    pixels = image_of(label).sum()
    expected = f"TfdsSource('little', split='train', 12 examples) {label} {pixels}\nFalse\n"
    assert result.stdout == expected, result.stderr


@pytest.mark.parametrize("name", ["huggingface:mnist", "../little", "little:1"])
def test_a_name_that_is_none_of_tfds(prepared: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"the data set's name is .* expected a name in TFDS"):
        open_tfds(name, data_dir=prepared)


@pytest.mark.parametrize("name", ["mnist", "little:2.0.0", "little/big"])
def test_a_data_set_that_is_not_prepared(prepared: Path, name: str, monkeypatch) -> None:
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.DatasetInfo, "initialize_from_bucket", lambda _: 1 / 0)
    message = f"{name} is not prepared in {prepared};.*file_format='array_record'.*_and_prepare"
    with pytest.raises(InputError, match=message):
        open_tfds(name, data_dir=prepared)


def test_a_data_set_in_another_format(copied: Path) -> None:
    edit_info(copied, fileFormat="tfrecord")
    with pytest.raises(InputError, match=r"is in the format tfrecord; expected array_record.*conv"):
        open_tfds("little", data_dir=copied)


@pytest.mark.parametrize("split", ["dev", "train[x]", "train[:0]"])
def test_an_unknown_or_empty_split(prepared: Path, split: str) -> None:
    with pytest.raises(InputError, match=r"the split is .* expected one of train, test of l") as e:
        open_tfds("little", split, prepared)
    assert repr(split) in str(e.value)


def test_a_data_set_without_a_split_to_test(tmp_path: Path) -> None:
    prepare(tmp_path, counts={"train": 2, "dev": 2})
    with pytest.raises(InputError, match="splits train, dev; expected train and test"):
        load_tfds("little", tmp_path)


@pytest.mark.parametrize("keys", [("image", "lable"), pytest.param("label", marks=UNTYPED)])
def test_keys_must_be_two_features(prepared: Path, keys: Any) -> None:
    expected = rf"keys is {re.escape(repr(keys))} for the data set little; .* image, label, .*keys="
    with pytest.raises(InputError, match=expected) as raised:
        open_tfds("little", data_dir=prepared, keys=keys)
    assert raised.value.argument == "keys"


def test_a_data_set_without_a_pair_needs_keys(tmp_path: Path) -> None:
    prepare(tmp_path, supervised=None, counts={"train": 2})
    with pytest.raises(InputError, match=r"the supervised_keys are None .*; pass keys="):
        open_tfds("little", data_dir=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "missing", "overwritten"])
def test_a_damaged_file_is_named_with_the_example(copied: Path, damage: str) -> None:
    file = next((copied / "little" / "1.0.0").glob("*train*-00001-of-00002"))
    content = file.read_bytes()
    source = open_tfds("little", data_dir=copied)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-50_000] if damage == "cut" else b"x" * len(content))
    first = len(source) // 2
    assert source[first - 1][0].shape == (8, 8, 1)
    for read in (lambda: source[11], lambda: source.__getitems__([0, 11])):
        with pytest.raises(InputError, match=r"example 11 of little \(split 'train'\) cannot"):
            read()
    with pytest.raises(InputError, match=rf"example {first} of little .* prepare the data set"):
        load_tfds("little", copied)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_damaged_description(copied: Path, file: str) -> None:
    (copied / "little" / "1.0.0" / file).write_text("{")
    with pytest.raises(InputError, match=f"little in {copied} cannot be opened \\(.*prepare it"):
        open_tfds("little", data_dir=copied)


@pytest.mark.parametrize(
    ("key", "found"),
    [("row", r"ndarray of the shapes \(1,\), \(2,\)"), ("text", "values"), ("words", "object")],
)
def test_load_needs_numbers_of_one_shape(tmp_path: Path, key: str, found: str) -> None:
    prepare(tmp_path, supervised=(key, "label"))
    with pytest.raises(InputError, match=f"'{key}' .* has .*{found}.*stream and a transform"):
        load_tfds("little", tmp_path)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python"])
def test_a_missing_package_names_its_extra(prepared: Path, monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"is not installed.*'jaxtrain\[tfds\]'"):
        open_tfds("little", data_dir=prepared)
