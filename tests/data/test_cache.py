"""Arrays kept on disk: by whom they are made, when they are made again, and what goes on without them."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch

from tests.conftest import image_folder
from timm_sugar.data import ArrayCache, BadImageError, decode, decode_kept, eval_transform, load_source, with_digests
from timm_sugar.data import loading as loading_module

SHAPE = (3, 5, 7)
DATA_CONFIG = dict(input_size=(3, 24, 24), interpolation="bicubic", crop_pct=1.0, crop_mode="center")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TIMM_SUGAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def _content(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _never() -> np.ndarray:
    raise AssertionError("made again")


def _keep(seed: int, limit: int = 2**20) -> list[str]:
    said: list[str] = []
    found = ArrayCache(limit, said.append).array(f"key {seed}", SHAPE, lambda: _content(seed))
    np.testing.assert_array_equal(found, _content(seed))
    return said


def test_made_once_and_its_file_is_out_of_reach_of_what_is_written_to_it(folder):
    first = ArrayCache(2**20).array("key", SHAPE, _content)
    second = ArrayCache(2**20).array("key", SHAPE, _never)
    np.testing.assert_array_equal(first, _content())
    np.testing.assert_array_equal(second, _content())
    torch.from_numpy(second).zero_()
    np.testing.assert_array_equal(first, _content())
    np.testing.assert_array_equal(ArrayCache(2**20).array("key", SHAPE, _never), _content())
    (kept,) = folder.iterdir()
    assert kept.stat().st_size == 105 + 4


@pytest.mark.parametrize(("key", "shape"), [("other key", SHAPE), ("key", (5, 3, 7))])
def test_another_key_or_shape_is_another_array(key, shape, folder):
    ArrayCache(2**20).array("key", SHAPE, _content)
    other = ArrayCache(2**20).array(key, shape, lambda: _content(1, shape))
    np.testing.assert_array_equal(other, _content(1, shape))
    assert len([*folder.iterdir()]) == 2


@pytest.mark.parametrize(("key", "limit"), [("key", 0), (None, 2**20)])
def test_switched_off_nothing_is_kept_or_looked_up(key, limit, folder):
    ArrayCache(2**20).array("key", SHAPE, _content)
    for seed in (1, 2):
        found = ArrayCache(limit).array(key, SHAPE, lambda seed=seed: _content(seed))
        np.testing.assert_array_equal(found, _content(seed))
    assert len([*folder.iterdir()]) == 1


DAMAGES = {
    "first byte": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last byte": lambda content: content[:104] + bytes([content[104] ^ 128]) + content[105:],
    "checksum": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "two pieces swapped": lambda content: content[64:96] + content[32:64] + content[:32] + content[96:],
    "cut short": lambda content: content[:-40],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_again(damage, folder, monkeypatch):
    monkeypatch.setattr("timm_sugar.data.cache._PIECE", 32)
    assert _keep(0) == []
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert _keep(0) == [f"{path} is damaged; the images are decoded again"]
    assert path.read_bytes() == whole
    assert _keep(0) == []


def _two_arrays(limit: int = 2**20) -> list[str]:
    said: list[str] = []
    cache = ArrayCache(limit, said.append)
    for seed in (0, 1):
        found = cache.array(f"key {seed}", SHAPE, lambda seed=seed: _content(seed))
        np.testing.assert_array_equal(found, _content(seed))
    return said


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert _two_arrays() == ["decoded images are not kept for the next start: Not a directory"]


def test_no_home(monkeypatch):
    monkeypatch.delenv("TIMM_SUGAR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert _two_arrays() == ["decoded images are not kept for the next start: no home directory"]


def test_a_file_that_cannot_be_written_whole_costs_one_line_and_leaves_nothing(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # writes 64 bytes, then fails, as a full disk does
    try:
        said = _two_arrays()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said == ["decoded images are not kept for the next start: File too large"]
    assert [*folder.iterdir()] == []


def _files_by_seed(folder: Path) -> dict[int, Path]:
    content = {_content(seed).tobytes(): seed for seed in range(5)}
    return {content[path.read_bytes()[:-4]]: path for path in folder.iterdir()}


def test_what_was_used_longest_ago_makes_room(folder):
    for seed in (0, 1, 2):
        assert _keep(seed, 3 * 109) == []
    for seed, path in _files_by_seed(folder).items():
        os.utime(path, (seed, seed))
    _keep(0)  # used last
    assert _keep(3, 3 * 109) == []
    assert set(_files_by_seed(folder)) == {0, 2, 3}
    assert _keep(4, 3 * 109 - 1) == []
    assert len(_files_by_seed(folder)) == 2


def test_what_is_in_use_stays(folder):
    used = ArrayCache(109).array("key 0", SHAPE, _content)
    line = "0.0 GiB of decoded images are not kept: --cache-limit is too small"
    assert _keep(1, 109) == [line]
    assert set(_files_by_seed(folder)) == {0}
    np.testing.assert_array_equal(used, _content())
    del used
    assert _keep(1, 109) == []
    assert set(_files_by_seed(folder)) == {1}
    assert _keep(2, 108) == [line]
    assert set(_files_by_seed(folder)) == {1}


# Prints what it says; makes the array after a line on standard input, and prints that it makes it.
PROCESS = """
import sys
import numpy as np
from timm_sugar.data import ArrayCache

def make():
    print("making", flush=True)
    sys.stdin.readline()
    return np.full((1000, 1000), 7, np.uint8)

array = ArrayCache(2**24, lambda line: print(line, flush=True)).array("key", (1000, 1000), make)
print("sum", array.sum(), flush=True)
sys.stdin.read()  # with the array in use
"""
WAITING = "waiting for another process that decodes the same images"


@pytest.fixture
def start():
    started: list[subprocess.Popen[str]] = []

    def popen() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", PROCESS], stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    late = threading.Timer(60, process.kill)
    late.start()
    line = process.stdout.readline().strip()
    late.cancel()
    return line


def test_one_of_two_processes_makes_it_and_the_other_waits(start, folder):
    first = start()
    assert _line(first) == "making"
    second = start()
    assert _line(second) == WAITING
    first.stdin.write("go on\n")
    first.stdin.flush()
    assert (_line(first), _line(second)) == ("sum 7000000", "sum 7000000")
    assert [path.stat().st_size for path in folder.iterdir()] == [1_000_004]


def test_it_is_not_waited_for_that_the_array_falls_out_of_use(start, folder):
    ArrayCache(2**24).array("key", (1000, 1000), lambda: np.full((1000, 1000), 7, np.uint8))
    (kept,) = folder.iterdir()
    part = kept.rename(kept.with_suffix(".part"))
    with part.open("rb") as used:
        fcntl.flock(used, fcntl.LOCK_SH)  # as whoever has made it has it from its renaming on
        second = start()
        assert _line(second) == WAITING
        part.rename(kept)
        assert _line(second) == "sum 7000000"


def test_killed_while_it_makes_it_another_one_does(start, folder):
    first = start()
    assert _line(first) == "making"
    (part,) = folder.iterdir()
    second = start()
    assert _line(second) == WAITING
    part.write_bytes(b"what a killed process wrote")
    first.send_signal(signal.SIGKILL)
    assert _line(second) == "making"
    second.stdin.write("go on\n")
    second.stdin.flush()
    assert _line(second) == "sum 7000000"
    assert [path.stat().st_size for path in folder.iterdir()] == [1_000_004]


@pytest.fixture
def images(tmp_path):
    return with_digests(load_source(image_folder(tmp_path / "data", 24, ("train", "test")))).train


def _decoded(images, monkeypatch, **config) -> bool:
    """Whether images were decoded for what `decode_kept` returns, which is what `decode` does."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(loading_module, "decode", lambda *args, **more: calls.append(args) or decode(*args, **more))
        found = decode_kept(images, DATA_CONFIG | config, ArrayCache(2**24))
    assert torch.equal(found, decode(images, eval_transform(DATA_CONFIG | config)))
    return bool(calls)


def test_pixels_are_decoded_once(images, monkeypatch):
    assert [_decoded(images, monkeypatch) for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    "config", [{"input_size": (3, 16, 16)}, {"interpolation": "bilinear"}, {"crop_pct": 0.5}], ids=str
)
def test_each_way_to_resize_has_pixels_of_its_own(config, images, monkeypatch):
    assert [_decoded(images, monkeypatch, **more) for more in ({}, config, config, {})] == [True, True, False, False]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda images: images.subset(np.arange(24)[::-1].copy()), True),
        (lambda images: images.subset(np.arange(23)), True),
        (lambda images: images.subset(np.arange(24)), False),
    ],
    ids=["other order", "one less", "same"],
)
def test_pixels_are_those_of_the_images_in_their_order(change, again, images, monkeypatch):
    assert _decoded(images, monkeypatch)
    assert _decoded(change(images), monkeypatch) is again


def test_an_image_that_was_replaced_is_decoded(images, tmp_path, monkeypatch):
    assert _decoded(images, monkeypatch)
    blue, red = (next((tmp_path / "data" / "train" / name).iterdir()) for name in ("blue", "red"))
    blue.write_bytes(red.read_bytes())
    assert _decoded(with_digests(load_source(str(tmp_path / "data"))).train, monkeypatch)


def test_another_version_of_the_decoder_decodes(images, monkeypatch):
    assert _decoded(images, monkeypatch)
    monkeypatch.setattr(PIL, "__version__", "0.0")
    loading_module._decoder.cache_clear()
    assert _decoded(images, monkeypatch)
    monkeypatch.undo()
    loading_module._decoder.cache_clear()


def test_a_corrupt_image_is_named_and_nothing_of_it_is_kept(tmp_path, folder):
    data = image_folder(tmp_path / "bad", 24, ("train", "test"), corrupt=[("train", 17)])
    images = with_digests(load_source(data)).train
    for _ in range(2):
        with pytest.raises(
            BadImageError, match=r"^image .*/train/red/17\.png cannot be decoded: image file is truncat"
        ):
            decode_kept(images, DATA_CONFIG, ArrayCache(2**24))
    assert [*folder.iterdir()] == []
