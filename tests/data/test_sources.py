"""Sources: names, folders, columns, splits."""

import gc
import importlib.util
import io
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


def test_folder_without_images_or_held_out_split(tmp_path):
    _write(tmp_path, "train", {"label": [0, 1]}, {"label": datasets.Value("int64")})
    with pytest.raises(ValueError, match=r"no column of images, or of bytes of image files; it has label \(int64\)"):
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
    with pytest.raises(FileNotFoundError, match="holds no files; images belong in train/CLASS and test/CLASS, parquet"):
        load_source(str(empty))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves train.csv open
def test_the_reason_why_datasets_fails_is_in_the_line(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileNotFoundError, match=f"cannot load folder '{tmp_path}': An error occurred .*: ") as caught:
        load_source(str(tmp_path))
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()


@pytest.mark.parametrize("streaming", [False, True])
def test_characters_of_patterns_in_the_path_of_parquet_files(tmp_path, streaming):
    folder = tmp_path / "[a-z]*?"
    folder.mkdir()
    _write_table(folder)
    source = load_source(str(folder), streaming=streaming)
    assert _names_seen(source.test, [*COLOURS]) == ([*COLOURS], [*COLOURS])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows(tmp_path, streaming):
    folder = _write_table(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "train.parquet").slice(0, 0), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has no images to train on; a classifier needs two classes or more"):
        load_source(folder, streaming=streaming)
    folder = _write_table(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "train.parquet").slice(0, 0), tmp_path / "train-0.parquet")
    source = load_source(folder, streaming=streaming)
    assert _names_seen(source.train, [*COLOURS]) == ([*COLOURS], [*COLOURS])
    _write_table(tmp_path, label=pa.array(["blue", "green", "red"]))
    table = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "train-0.parquet")
    assert load_source(folder, streaming=streaming).class_names == ("blue", "green", "red")


def test_without_datasets_the_extra_is_named_where_it_is_needed(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    for data in (_write_table(tmp_path), "cifar10"):
        with pytest.raises(
            ModuleNotFoundError, match=r"datasets is not installed; .* pip install 'timm-sugar\[train\]'"
        ):
            load_source(data)
    assert len(load_source(image_folder(tmp_path / "images", 6, ("train", "test"))).train) == 6


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
    with pytest.raises(ValueError, match="test images have classes that training lacks: 'n00000000'"):
        load_source(folder)


def test_a_corrupt_image_is_named_and_found(tmp_path):
    source = load_source(image_folder(tmp_path, 12, ("train", "val"), corrupt={("train", 2), ("train", 7)}))
    with pytest.raises(BadImageError, match=f"image {tmp_path}/train/green/07.png cannot be decoded: "):
        source.train[7]
    assert readable(source.train).tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert len(readable(source.test)) == 12


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val"])
def test_names_of_the_held_out_split(tmp_path, name):
    image_folder(tmp_path, 6, ("train", name))
    assert len(load_source(str(tmp_path)).test) == 6


def test_labels_beyond_the_class_names_are_refused(tmp_path):
    images, _ = coloured_images(4, 0)
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    for split in ("train", "test"):
        _write(tmp_path, split, {"image": images, "label": [0, 1, 5, 1]}, features)
    with pytest.raises(ValueError, match="class labels, text or the whole numbers 0 to 2, found '0', '1', '5'"):
        load_source(str(tmp_path))


def _bytes(image):
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


def _names_seen(images, names):
    """The colours that are seen in images, beside those that their labels say."""
    seen = [min(COLOURS, key=lambda name: np.abs(np.asarray(images[i]).mean((0, 1)) - COLOURS[name]).sum())
            for i in range(len(images))]  # fmt: skip
    return seen, [names[label] for label in images.labels]


def _write_named(folder, file, names, count=6, kind="names", seed=0):
    """A parquet file of coloured images whose labels are numbers of `names`, text, or in pandas' categories."""
    images, labels = coloured_images(count, seed)
    colours = [[*COLOURS][label] for label in labels]
    kept = [(image, name) for image, name in zip(images, colours, strict=True) if name in names]
    images, colours = [image for image, _ in kept], [name for _, name in kept]
    folder.mkdir(exist_ok=True, parents=True)
    if kind == "names":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {"image": images, "label": [names.index(name) for name in colours]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / file)
        return
    labels = {"text": pa.array(colours), "large text": pa.array(colours, pa.large_string()),
              "categories": pa.array(colours).dictionary_encode()}[kind]  # fmt: skip
    items = pa.array([{"bytes": _bytes(image), "path": None} for image in images])
    pq.write_table(pa.table({"image": items, "label": labels}), folder / file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("test_names", [["red", "green", "blue"], ["green", "red"], ["blue", "green", "purple", "red"]])
def test_labels_go_by_name_whatever_their_order(tmp_path, test_names, streaming):
    _write_named(tmp_path, "train-0.parquet", ["blue", "green", "red"])
    _write_named(tmp_path, "test-0.parquet", test_names)
    if "blue" in test_names:
        source = load_source(str(tmp_path), streaming=streaming)
    else:
        with pytest.warns(UserWarning, match="has no test image of 'blue'$"):
            source = load_source(str(tmp_path), streaming=streaming)
    assert source.class_names == ("blue", "green", "red")
    for images in (source.train, source.test):
        seen, said = _names_seen(images, source.class_names)
        assert seen == said
    assert set(said) == {"blue", "green", "red"} & set(test_names)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_may_order_their_classes_each_in_its_way(tmp_path, streaming):
    for number, names in enumerate((["green", "red"], ["red", "blue", "green"], ["blue"])):
        _write_named(tmp_path / "data", f"train-{number:05}-of-00003.parquet", names, seed=number)
    _write_named(tmp_path / "data", "validation-00000-of-00001.parquet", ["red", "green", "blue"], seed=9)
    source = load_source(str(tmp_path), streaming=streaming)
    assert source.class_names == ("green", "red", "blue")
    assert (len(source.train), len(source.test)) == (4 + 6 + 2, 6)
    for images in (source.train, source.test):
        seen, said = _names_seen(images, source.class_names)
        assert seen == said
    with pytest.raises(BadImageError, match=rf"image in row 1 of {tmp_path}/data/train-00002-of-00003\.parquet cannot"):
        _spoiled(source.train)[11]


def _spoiled(images):
    from dataclasses import replace

    return replace(images, read=lambda row: 1 / 0)


@pytest.mark.parametrize("kind", ["text", "large text", "categories"])
def test_labels_as_text_are_classes_in_alphabetical_order(tmp_path, kind):
    _write_named(tmp_path, "train.parquet", ["red", "blue", "green"], kind=kind)
    _write_named(tmp_path, "test.parquet", ["red", "blue", "green"], kind="names")
    source = load_source(str(tmp_path))
    assert set(source.class_names) == set(COLOURS)
    for images in (source.train, source.test):
        seen, said = _names_seen(images, source.class_names)
        assert seen == said
    _write_named(tmp_path, "test.parquet", ["red", "blue", "green"], kind=kind)
    assert load_source(str(tmp_path)).class_names == ("blue", "green", "red")


def test_classes_that_do_not_fit_are_said(tmp_path):
    _write_named(tmp_path, "train.parquet", ["blue", "green"])
    _write_named(tmp_path, "test.parquet", ["red"])
    with pytest.raises(ValueError, match="no class in common; training has 'blue', 'green', test has 'red'"):
        load_source(str(tmp_path))
    _write_named(tmp_path, "test.parquet", ["blue", "red"], count=9)
    with pytest.raises(ValueError, match="test images have classes that training lacks: 'red'"):
        load_source(str(tmp_path))
    _write_named(tmp_path, "train.parquet", ["blue", "green", "red"])
    (tmp_path / "test.parquet").unlink()
    images, labels = coloured_images(6, 0)
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    _write(tmp_path, "test", {"image": images, "label": labels}, features)
    with pytest.raises(ValueError, match="some files have class names and others have numbers without names"):
        load_source(str(tmp_path))


def test_a_class_without_training_images_is_said(tmp_path):
    images, labels = coloured_images(6, 0)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["grey", *COLOURS])}
    for split in ("train", "test"):
        _write(tmp_path, split, {"image": images, "label": [label + 1 for label in labels]}, features)
    with pytest.warns(UserWarning, match="has no training image of 'grey'"):
        assert load_source(str(tmp_path)).class_names == ("grey", *COLOURS)


def _write_table(folder, image=None, label=None, **columns):
    images, labels = coloured_images(3, 0)
    columns = {"image": pa.array([_bytes(i) for i in images]) if image is None else image, **columns}
    columns["label"] = pa.array(labels) if label is None else label
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return str(folder)


def test_a_column_of_bytes_holds_images(tmp_path):
    folder = _write_table(tmp_path)
    for streaming in (False, True):
        source = load_source(folder, streaming=streaming)
        seen, said = _names_seen(source.train, [*COLOURS])
        assert seen == said == [*COLOURS]


def test_the_image_column_is_found_or_named(tmp_path):
    images, labels = coloured_images(3, 0)
    masks, _ = coloured_images(3, 1, size=4)
    features = {name: datasets.Image() for name in ("mask", "image", "depth")} | {"label": datasets.Value("int64")}

    def write(name):
        renamed = {name if key == "image" else key: kind for key, kind in features.items()}
        for split in ("train", "test"):
            columns = {"mask": masks, name: images, "depth": masks, "label": labels}
            _write(tmp_path, split, columns, renamed)

    for name in ("img", "image"):
        write(name)
        assert load_source(str(tmp_path)).train[0].size == (32, 32)
    assert load_source(str(tmp_path), image_column="mask").train[0].size == (4, 4)
    with pytest.raises(ValueError, match=r"column 'label' holds .*int64.*, not images"):
        load_source(str(tmp_path), image_column="label")
    with pytest.raises(ValueError, match="unknown image column 'imgae'; did you mean 'image'"):
        load_source(str(tmp_path), image_column="imgae")
    write("photo")
    with pytest.raises(ValueError, match="several image columns; name one with --image-column: mask, photo, depth"):
        load_source(str(tmp_path))
    assert load_source(str(tmp_path), image_column="photo").train[0].size == (32, 32)


@pytest.mark.parametrize("streaming", [False, True])
def test_nulls_are_named_by_row(tmp_path, streaming):
    good = _bytes(coloured_images(1, 0)[0][0])
    source = load_source(_write_table(tmp_path, image=pa.array([good, None, b""])), streaming=streaming)
    for row, reason in ((1, "it is null"), (2, "it is empty")):
        message = rf"image in row {row} of {tmp_path}/train\.parquet cannot be decoded: {reason}; repair or remove"
        with pytest.raises(BadImageError, match=message):
            source.train[row]
    assert readable(source.train).tolist() == [0]
    folder = _write_table(tmp_path, label=pa.array([0, None, 1]))
    with pytest.raises(
        ValueError, match=r"the image in row 1 of .*/test\.parquet has no label|train\.parquet has no label"
    ):
        load_source(folder, streaming=streaming)


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        (pa.array([0.0, 1.0, 2.0]), "float64"),
        (pa.array([True, False, True]), "bool"),
        (pa.array([[0], [1], [2]]), "[Ll]ist"),
    ],
)
def test_labels_of_other_kinds_are_refused(tmp_path, label, kind):
    message = (
        rf"train\.parquet|test\.parquet: label column 'label' must hold class labels, text or whole .*, not {kind}"
    )
    with pytest.raises(ValueError, match=message):
        load_source(_write_table(tmp_path, label=label))


def test_one_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has one class, 'cat'; a classifier needs two classes or more"):
        load_source(_write_table(tmp_path, label=pa.array(["cat"] * 3)))


def test_a_number_without_a_name_is_refused(tmp_path):
    _write_named(tmp_path, "test.parquet", ["blue", "green", "red"])
    _write_named(tmp_path, "train.parquet", ["blue", "green", "red"])
    table = pq.read_table(tmp_path / "train.parquet")
    position = table.schema.get_field_index("label")
    pq.write_table(
        table.set_column(position, table.schema.field("label"), [[0, 1, 2, 3, 0, 1]]), tmp_path / "train.parquet"
    )
    with pytest.raises(
        ValueError, match=r"train\.parquet: label 3 in row 3 has no class name; .* names the labels 0 to 2"
    ):
        load_source(str(tmp_path))


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    folder = _write_table(tmp_path)
    for content in (b"", b"PAR1 and no more", (tmp_path / "test.parquet").read_bytes()[:-20]):
        (tmp_path / "test.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.parquet cannot be read: "):
            load_source(folder)


def test_parquet_files_of_several_configurations_are_not_mixed(tmp_path):
    for name in ("fine", "coarse"):
        _write_named(tmp_path / name, "train-0.parquet", ["blue", "green", "red"])
        _write_named(tmp_path / name, "test-0.parquet", ["blue", "green", "red"])
    with pytest.raises(
        ValueError, match="parquet files for training in several folders, 'coarse', 'fine'; give one of"
    ):
        load_source(str(tmp_path))
    assert len(load_source(str(tmp_path / "fine")).train) == 6


def test_a_parquet_file_replaced_within_the_clocks_grain_is_read_anew(tmp_path):
    folder = _write_table(tmp_path)
    assert len(load_source(folder).train) == 3
    before = os.stat(tmp_path / "train.parquet")
    images, labels = coloured_images(6, 0)
    pq.write_table(pa.table({"image": [_bytes(i) for i in images], "label": labels}), tmp_path / "train.parquet")
    os.utime(tmp_path / "train.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    train = load_source(folder).train
    assert len(train) == 6
    seen, said = _names_seen(train, [*COLOURS])
    assert seen == said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves metadata.csv open
def test_other_files_are_read_by_the_folder_of_their_split(tmp_path):
    """Images whose labels are in metadata.csv."""
    images, labels = coloured_images(6, 0)
    tmp_path = tmp_path / "[a-z]*"
    for split in ("train", "test"):
        (tmp_path / split / "test_tube").mkdir(parents=True)
        lines = ["file_name,label"]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            image.save(tmp_path / split / "test_tube" / f"{number}.png")
            lines.append(f"test_tube/{number}.png,{[*COLOURS][label]}")
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    source = load_source(str(tmp_path))
    gc.collect()
    for part in (source.train, source.test):
        seen, said = _names_seen(part, source.class_names)
        assert sorted(seen) == sorted(said)
        assert seen == said
        assert len(seen) == 6


def test_a_class_that_a_validation_split_would_take_whole_is_refused(tmp_path):
    images, _ = coloured_images(100, 0, size=4)
    label = pa.array([f"class {n:03}" for n in range(100)])
    source = load_source(_write_table(tmp_path, image=pa.array([_bytes(i) for i in images]), label=label))
    message = (
        r"^a validation split of 0\.1 takes every training image of 10 classes, for example the image in row \d+ of .*"
        r"parquet; add images to these classes or use a smaller --val-fraction, or 0$"
    )
    with pytest.raises(ValueError, match=message):
        split_validation(source.train, 0.1, 0)
    rest, held_out = split_validation(source.train, 0.0, 0)
    assert (len(rest), len(held_out)) == (100, 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_image_files_of_the_hub_that_datasets_would_sort_otherwise_are_refused(tmp_path, monkeypatch, streaming):
    folder, build = image_folder(tmp_path / "photos", 6, ("train", "test")), datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path: build({"me/photos": folder}[path]))
    source = load_source("me/photos", streaming=streaming)
    for images in (source.train, source.test):
        seen, said = _names_seen(images, source.class_names)
        assert seen == said
        assert len(seen) == 6
    (tmp_path / "photos" / "train" / "red").rename(tmp_path / "photos" / "train" / "test_tube")
    message = "'me/photos': train/test_tube/04.png is not SPLIT/CLASS/FILE, or its class is named like a split; "
    with pytest.raises(ValueError, match=message) as caught:
        load_source("me/photos", streaming=streaming)
    assert "hf download --repo-type dataset me/photos --local-dir DIR` and give --data DIR" in str(caught.value)
    (tmp_path / "photos" / "train" / "test_tube").rename(tmp_path / "photos" / "train" / "blue" / "sub")
    with pytest.raises(ValueError, match=r"train/blue/sub/04\.png is not SPLIT/CLASS/FILE, or"):
        load_source("me/photos", streaming=streaming)
