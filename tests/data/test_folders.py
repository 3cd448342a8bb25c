"""Folders of images: the first level names the split, the second the class, whatever they are called."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from timm_sugar.data import BadImageError, load_source


def _image(path, level=0):
    """A grey square, whose level tells it from the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), level).save(path)


def _folder(root, train, test, held_out="test"):
    """Images at the given paths below train/ and test/, the first of level 1, the next of level 2, and so on."""
    for split, paths in (("train", train), (held_out, test)):
        for level, path in enumerate(paths, 1):
            _image(root / split / path, level)
    return str(root)


def _found(images, class_names):
    """Class and level of each image, in order."""
    return [(class_names[label], images[i].getpixel((0, 0))[0]) for i, label in enumerate(images.labels)]


CLASSES = ["bus", "car", "dev", "eval", "evaluation", "test", "test_tube", "train", "training", "val-1", "validation"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation", "Test", "testing", "dev"])
def test_classes_may_be_called_like_splits(tmp_path, held_out, streaming):
    files = [f"{name}/{number}.png" for name in CLASSES for number in range(2)]
    source = load_source(_folder(tmp_path, files, files[::2], held_out), streaming=streaming)
    assert source.class_names == tuple(CLASSES)
    assert _found(source.train, CLASSES) == [(name, 2 * i + n + 1) for i, name in enumerate(CLASSES) for n in range(2)]
    assert _found(source.test, CLASSES) == [(name, i + 1) for i, name in enumerate(CLASSES)]


def test_any_depth_belongs_to_the_class(tmp_path):
    train = ["cat/0.png", "cat/sub0/x.png", "cat/sub1/test/x.png", "dog/train/sub0/x.png", "dog/x.png"]
    source = load_source(_folder(tmp_path, train, ["dog/other/x.png", "cat/0.png"]))
    assert source.class_names == ("cat", "dog")
    assert _found(source.train, source.class_names) == [("cat", 1), ("cat", 2), ("cat", 3), ("dog", 4), ("dog", 5)]
    assert _found(source.test, source.class_names) == [("cat", 2), ("dog", 1)]


def test_what_is_no_image_is_left_out_and_said(tmp_path):
    files = ["a/1.png", "a/2.PNG", "a/3.JpG", "b/1.png", "b/2.tiff"]
    folder = _folder(tmp_path, files, ["a/1.png", "b/1.png"])
    for hidden in (".DS_Store", "a/.DS_Store", "a/._1.png", ".ipynb_checkpoints/1.png", "__MACOSX/a/1.png"):
        _image(tmp_path / "train" / f"{hidden}.png")
        (tmp_path / "train" / f"{hidden}.png").rename(tmp_path / "train" / hidden)
    assert _found(load_source(folder).train, "ab") == [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5)]
    (tmp_path / "train" / "a" / "notes.txt").write_text("text")
    (tmp_path / "train" / "b" / "photo.heic").write_text("text")
    with pytest.warns(
        UserWarning, match=r"has files that are not images and are left out: '.*/notes\.txt' and 1 more$"
    ):
        assert len(load_source(folder).train) == 5


def test_classes_of_one_split_alone(tmp_path):
    folder = _folder(tmp_path, ["a/1.png", "b/1.png"], ["a/1.png"])
    with pytest.warns(UserWarning, match="has no test image of 'b'$"):
        assert load_source(folder).class_names == ("a", "b")
    (tmp_path / "train" / "empty").mkdir()
    _image(tmp_path / "test" / "b" / "1.png")
    with pytest.warns(UserWarning, match="train has class folders without images: 'empty'$"):
        assert load_source(folder).class_names == ("a", "b")
    _image(tmp_path / "test" / "empty" / "1.png")
    with (
        pytest.warns(UserWarning, match="class folders without images"),
        pytest.raises(ValueError, match="test images have classes that training lacks: 'empty'"),
    ):
        load_source(folder)
    shutil.rmtree(tmp_path / "test")
    _image(tmp_path / "test" / "A" / "1.png")
    _image(tmp_path / "test" / "B" / "1.png")
    with (
        pytest.warns(UserWarning, match="class folders without images"),
        pytest.raises(ValueError, match="no class in common; training has 'a', 'b', test has 'A', 'B'"),
    ):
        load_source(folder)


NO_TEST = "no test images in class folders, test/CLASS or val/CLASS"


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a/1.png", "b/1.png", "x.png"], ["a/1.png"], r"train/x\.png is not in a class folder; .*/train/CLASS$"),
        (["1.png", "2.png"], ["a/1.png"], r"train/1\.png is not in a class folder"),
        (["a/1.png", "b/1.png"], ["a/1.png", "x.png"], r"test/x\.png is not in a class folder"),
        (["a/1.png", "b/1.png"], ["x.png"], NO_TEST),
        (["a/1.png", "b/1.png"], [], NO_TEST),
        (["a/1.png", "a/2.png"], ["a/1.png"], "has one class, 'a'; a classifier needs two classes or more"),
        ([], ["a/1.png", "b/1.png"], "has images but no folder train; they belong in train/CLASS"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tmp_path, train, test, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_source(_folder(tmp_path, train, test))
    assert "\n" not in str(caught.value)


def test_classes_without_a_folder_for_the_split(tmp_path):
    for name in ("cat", "dog"):
        _image(tmp_path / name / "1.png")
    with pytest.raises(FileNotFoundError, match="has images but no folder train; they belong in train/CLASS"):
        load_source(str(tmp_path))


def test_two_folders_of_one_split_are_refused(tmp_path):
    folder = _folder(tmp_path, ["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"])
    _image(tmp_path / "Train" / "a" / "1.png")
    with pytest.raises(ValueError, match="Train and train both hold the train split; keep one"):
        load_source(folder)


def test_a_test_without_labels_gives_way_to_validation(tmp_path):
    folder = _folder(tmp_path, ["a/1.png", "b/1.png"], ["1.png", "2.png"])
    _image(tmp_path / "val" / "a" / "1.png", 7)
    _image(tmp_path / "val" / "b" / "1.png", 8)
    assert _found(load_source(folder).test, "ab") == [("a", 7), ("b", 8)]


def test_links_to_folders_and_files_are_followed(tmp_path):
    store, root = tmp_path / "store", tmp_path / "root"
    for level, name in enumerate(("cat", "dog"), 1):
        _image(store / name / "x.png", level)
        for split in ("train", "test"):
            (root / split).mkdir(parents=True, exist_ok=True)
            (root / split / name).symlink_to(store / name, target_is_directory=True)
    _image(store / "one.png", 3)
    (root / "train" / "bird").mkdir()
    (root / "train" / "bird" / "y.png").symlink_to(store / "one.png")
    (root / "test" / "bird").symlink_to("../train/bird", target_is_directory=True)
    linked = tmp_path / "linked"
    linked.symlink_to(root, target_is_directory=True)
    for folder in (root, linked):
        source = load_source(str(folder))
        assert _found(source.train, source.class_names) == [("bird", 3), ("cat", 1), ("dog", 2)]
        assert _found(source.test, source.class_names) == [("bird", 3), ("cat", 1), ("dog", 2)]
    (root / "train" / "bird" / "z.png").symlink_to("nowhere")
    with pytest.raises(BadImageError, match=r"train/bird/z\.png cannot be read: No such file or directory$"):
        load_source(str(root)).train[1]
    (store / "cat" / "loop").symlink_to(store, target_is_directory=True)
    with pytest.raises(ValueError, match="leads back, through a symbolic link, to a folder that contains it"):
        load_source(str(root))


@pytest.mark.parametrize("name", ["[a-z]*", "what?", "a b", "train", "é", "x{1}!"])
def test_characters_that_patterns_are_made_of(tmp_path, name):
    files = [f"{name}/1.png", "b/1.png", f"b/{name}.png"]
    folder = _folder(tmp_path / name, files, files)
    assert _found(load_source(folder).train, sorted([name, "b"])) == sorted([(name, 1), ("b", 2), ("b", 3)])


def test_the_same_name_of_a_class_in_two_spellings_of_unicode(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    source = load_source(_folder(tmp_path, [f"{composed}/1.png", "tea/1.png"], [f"{decomposed}/1.png", "tea/1.png"]))
    assert source.class_names == (composed, "tea")
    assert sorted(source.test.labels) == [0, 1]


@pytest.mark.parametrize("given", [".", "./", "../data", "../data/train/.."])
def test_the_folder_may_be_given_in_any_way(tmp_path, monkeypatch, given):
    files = ["a/1.png", "b/1.png"]
    monkeypatch.chdir(_folder(tmp_path / "data", files, files))
    source = load_source(given)
    assert source.name == given
    assert _found(source.train, "ab") == [("a", 1), ("b", 2)]


def test_the_same_file_name_in_several_classes(tmp_path):
    files = [f"{name}/0.png" for name in "abc"]
    assert _found(load_source(_folder(tmp_path, files, files)).train, "abc") == [("a", 1), ("b", 2), ("c", 3)]


def test_images_are_in_the_order_of_their_paths(tmp_path):
    files = ["a/10.png", "a/2.png", "a b/1.png", "a-1/1.png", "B/1.png", "a/Z.png"]
    source = load_source(_folder(tmp_path, files, files))
    assert source.class_names == ("B", "a", "a b", "a-1")
    assert [level for _, level in _found(source.train, source.class_names)] == [5, 3, 4, 1, 2, 6]


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    folder = _folder(tmp_path, ["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=r"Permission denied: '.*train/b'"):
        load_source(folder)


def test_a_corrupt_file_is_named_by_its_path(tmp_path):
    folder = _folder(tmp_path, ["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"])
    for content, reason in ((b"", "it is empty"), (b"\x89PNG", "it is not in a format that Pillow reads")):
        (tmp_path / "test" / "b" / "1.png").write_bytes(content)
        test = load_source(folder).test
        with pytest.raises(
            BadImageError, match=rf"^image {tmp_path}/test/b/1\.png cannot be decoded: {reason}; repair"
        ):
            test[1]
        np.testing.assert_array_equal(np.asarray(test[0]), 1)
