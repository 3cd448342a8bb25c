"""Sources: names, folders, columns, splits."""

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.conftest import COLOURS, coloured_images, image_folder
from timm_sugar.data import BadImageError, load_source, readable, split_validation, stratified_sample


def test_digits_are_split_by_class_and_repeatable():
    source = load_source("digits")
    assert (len(source.train), len(source.test)) == (1438, 359)
    assert source.class_names == tuple("0123456789")
    assert not set(source.train.rows) & set(source.test.rows)
    assert np.bincount(source.test.labels).min() >= 34
    np.testing.assert_array_equal(source.test.rows, load_source("digits").test.rows)
    assert not np.array_equal(source.test.rows, load_source("digits", split_seed=1).test.rows)


def test_digits_keep_their_16_grey_levels():
    source = load_source("digits")
    from sklearn.datasets import load_digits

    pixels = np.asarray(source.train[5])
    expected = load_digits().images[source.train.rows[5]]
    np.testing.assert_allclose(pixels[:, :, 0], expected * 255 / 16, atol=0.5)
    assert (pixels == pixels[:, :, :1]).all()


def test_parquet_folder(parquet_folder):
    source = load_source(parquet_folder)
    assert (len(source.train), len(source.test)) == (240, 60)
    assert source.class_names == tuple(COLOURS)
    for index in (0, 100, 239):
        mean = np.asarray(source.train[index]).mean((0, 1))
        colour = [*COLOURS.values()][source.train.labels[index]]
        np.testing.assert_allclose(mean, colour, atol=15)


def test_image_folder(tmp_path):
    source = load_source(image_folder(tmp_path, 12, ("train", "test")))
    assert source.class_names == tuple(COLOURS)
    assert (len(source.train), len(source.test)) == (12, 12)
    assert source.train[3].size == (32, 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cifar11", "did you mean 'cifar10'[?] [(]or give ORG/NAME of the Hub, or a folder[)]"),
        ("./nowhere", "data folder './nowhere' does not exist"),
        ("/nowhere/at/all", "does not exist"),
    ],
)
def test_unknown_data(data, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_source(data)


def test_hub_data_without_network_is_one_line():
    with pytest.raises(FileNotFoundError, match="cannot load Hub data set 'nobody/nothing'") as caught:
        load_source("nobody/nothing")
    assert "\n" not in str(caught.value)


def _write(folder, split, columns, features):
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_label_column_is_found_or_named(tmp_path):
    images, labels = coloured_images(9, 0)
    features = {"image": datasets.Image(), "colour": datasets.Value("int64")}
    for split in ("train", "test"):
        _write(tmp_path, split, {"image": images, "colour": labels}, features)
    with pytest.raises(
        ValueError, match=r"no column label, labels or fine_label; .* --label-column, one of image, colour"
    ):
        load_source(str(tmp_path))
    with pytest.raises(ValueError, match="unknown label column 'color'; did you mean 'colour'"):
        load_source(str(tmp_path), label_column="color")
    source = load_source(str(tmp_path), label_column="colour")
    assert source.class_names == ("0", "1", "2")
    assert source.train.labels.tolist() == labels


def test_labels_as_text_are_refused(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Value("string")}
    for split in ("train", "test"):
        _write(tmp_path, split, {"image": coloured_images(3, 0)[0], "label": ["a", "b", "c"]}, features)
    with pytest.raises(ValueError, match="must hold class labels or whole numbers from 0, not string"):
        load_source(str(tmp_path))


def test_folder_without_images_or_held_out_split(tmp_path):
    _write(tmp_path, "train", {"label": [0, 1]}, {"label": datasets.Value("int64")})
    with pytest.raises(ValueError, match="no image column"):
        load_source(str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    images, labels = coloured_images(6, 0)
    _write(
        other,
        "train",
        {"image": images, "label": labels},
        {"image": datasets.Image(), "label": datasets.Value("int64")},
    )
    with pytest.raises(ValueError, match="no labelled split named test, validation, valid or val; it has train"):
        load_source(str(other))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="cannot load folder"):
        load_source(str(empty))


def test_unlabelled_test_split_gives_way_to_validation(tmp_path):
    images, labels = coloured_images(6, 0)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[*COLOURS])}
    _write(tmp_path, "train", {"image": images, "label": labels}, features)
    _write(tmp_path, "test", {"image": images, "label": [-1] * 6}, features)
    _write(tmp_path, "validation", {"image": images, "label": labels}, features)
    assert load_source(str(tmp_path)).test.labels.tolist() == labels


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100, 1000])
def test_stratified_sample_is_in_proportion_whatever_the_order(count):
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    for arrangement in (labels, np.random.default_rng(0).permutation(labels)):
        sample = stratified_sample(arrangement, count, seed=3)
        assert len(sample) == len(set(sample)) == min(count, 100)
        expected = np.array([50, 30, 20]) * min(count, 100) / 100
        assert np.abs(np.bincount(arrangement[sample], minlength=3) - expected).max() <= 1
    assert stratified_sample(labels, 50, 1).tolist() != stratified_sample(labels, 50, 2).tolist()


def test_split_validation_is_a_partition():
    train = load_source("digits").train
    rest, held_out = split_validation(train, 0.2, 0)
    assert (len(rest), len(held_out)) == (1150, 288)
    assert sorted([*rest.rows, *held_out.rows]) == sorted(train.rows)
    assert len(split_validation(train, 0.0, 0)[1]) == 0


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    for split in ("train", "test"):
        for mode in ("L", "P", "RGBA"):
            folder = tmp_path / split / mode
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (200, 10, 10)).convert(mode).save(folder / "0.png")
    source = load_source(str(tmp_path))
    assert {source.train[i].mode for i in range(3)} == {"RGB"}


def test_streaming_gives_the_same_images(parquet_folder):
    plain, streamed = load_source(parquet_folder), load_source(parquet_folder, streaming=True)
    assert streamed.class_names == plain.class_names
    for ours, theirs in ((plain.train, streamed.train), (plain.test, streamed.test)):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        for index in range(0, len(ours), 29):
            np.testing.assert_array_equal(np.asarray(ours[index]), np.asarray(theirs[index]))


def test_streaming_an_image_folder(tmp_path):
    source = load_source(image_folder(tmp_path, 12, ("train", "val")), streaming=True)
    assert source.class_names == tuple(COLOURS)
    assert (len(source.train), len(source.test)) == (12, 12)
    assert source.train[0].size == (32, 32)


def _tiny_imagenet(folder):
    wnids = {"n01443537": 0, "n01629819": 1, "n02226429": 2}
    images, labels = coloured_images(12, 0, size=64)
    names = {label: name for name, label in wnids.items()}
    annotations = []
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "test" / "images").mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "train" / names[label] / "images"
        place.mkdir(parents=True, exist_ok=True)
        (place.parent / f"{names[label]}_boxes.txt").write_text("")
        image.save(place / f"{names[label]}_{number}.JPEG")
        image.save(folder / "val" / "images" / f"val_{number}.JPEG")
        image.save(folder / "test" / "images" / f"test_{number}.JPEG")
        annotations.append(f"val_{number}.JPEG\t{names[label]}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    return str(folder), tuple(wnids)


def test_original_layout_of_tiny_imagenet(tmp_path):
    folder, wnids = _tiny_imagenet(tmp_path)
    source = load_source(folder)
    assert source.class_names == wnids
    assert (len(source.train), len(source.test)) == (12, 12)
    for images in (source.train, source.test):
        for index in range(12):
            colour = [*COLOURS.values()][images.labels[index]]
            np.testing.assert_allclose(np.asarray(images[index]).mean((0, 1)), colour, atol=15)
    path = tmp_path / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace(wnids[0], "n00000000"))
    with pytest.raises(ValueError, match=r"val_annotations\.txt names n00000000, which is not in train"):
        load_source(folder)


def test_a_corrupt_image_is_named_and_found(tmp_path):
    source = load_source(image_folder(tmp_path, 12, ("train", "val"), corrupt={("train", 2), ("train", 7)}))
    with pytest.raises(BadImageError, match="image in row 7 cannot be decoded: "):
        source.train[7]
    assert readable(source.train).tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert len(readable(source.test)) == 12


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val"])
def test_names_of_the_held_out_split(tmp_path, name):
    image_folder(tmp_path, 6, ("train", name))
    assert len(load_source(str(tmp_path)).test) == 6


def test_palette_and_grey_with_transparency(tmp_path):
    square = Image.new("RGB", (8, 8), (200, 10, 10))
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
        square.quantize(4).save(tmp_path / split / "a" / "0.png", transparency=b"\x80\xff")
        square.convert("LA").save(tmp_path / split / "b" / "1.png")
    train = load_source(str(tmp_path)).train
    assert [train[i].mode for i in range(2)] == ["RGB", "RGB"]
    assert train[0].getpixel((3, 3)) == (200, 10, 10)


def test_labels_beyond_the_class_names_are_refused(tmp_path):
    images, _ = coloured_images(4, 0)
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    for split in ("train", "test"):
        _write(tmp_path, split, {"image": images, "label": [0, 1, 5, 1]}, features)
    with pytest.raises(ValueError, match="must be class labels or the integers 0 to 2"):
        load_source(str(tmp_path))
