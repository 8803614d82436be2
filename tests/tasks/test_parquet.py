"""Finding, decoding and refusing images, on Parquet files that the tests write themselves."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from lossguard.tasks.parquet import Images, ImageSource, SplitSource, digest, load_images

SOURCE = ImageSource(
    name="tiny",
    repository="someone/tiny",
    folder="data",
    shape=(6, 4, 3),
    classes=3,
    train=SplitSource("train", 9),
    test=SplitSource("valid", 3),
)


def pixels(count: int, shape: tuple[int, int, int] = SOURCE.shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def encode(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, kind, **options)
    return stream.getvalue()


def table(images: Sequence[bytes | None], labels: Any, column: str = "image") -> pl.DataFrame:
    structs = [{"bytes": image, "path": None} for image in images]
    kind = pl.Struct({"bytes": pl.Binary, "path": pl.String})
    return pl.DataFrame({column: pl.Series(structs, dtype=kind), "label": labels})


def labels(count: int) -> list[int]:
    return [index % SOURCE.classes for index in range(count)]


TRAIN, VALID = pixels(9), pixels(3, seed=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set's folder in the one that LOSSGUARD_DATA names, with both splits."""
    monkeypatch.setenv("LOSSGUARD_DATA", str(tmp_path))
    folder = tmp_path / SOURCE.name
    folder.mkdir()
    table([encode(image) for image in TRAIN], labels(9)).write_parquet(folder / "train.parquet")
    table([encode(image) for image in VALID], labels(3)).write_parquet(folder / "valid.parquet")
    return folder


def write_train(
    folder: Path, images: list[Any], classes: Any = None, column: str = "image"
) -> None:
    classes = labels(len(images)) if classes is None else classes
    table(images, classes, column).write_parquet(folder / "train.parquet")


# What is there


def test_local_files_are_decoded_exactly(folder: Path) -> None:
    train, test, note = load_images(SOURCE)
    assert train.inputs.dtype == np.uint8 and train.labels.dtype == np.int32
    np.testing.assert_array_equal(train.inputs, TRAIN)
    np.testing.assert_array_equal(train.labels, labels(9))
    np.testing.assert_array_equal(test.inputs, VALID)
    assert note == ""


def test_the_hubs_shards_and_its_other_column_name_are_read(folder: Path) -> None:
    (folder / "train.parquet").unlink()
    encoded = [encode(image) for image in TRAIN]
    for shard, part in enumerate((slice(0, 5), slice(5, 9))):
        shard_table = table(encoded[part], labels(9)[part], "img")
        shard_table.write_parquet(folder / f"train-0000{shard}-of-00002-0123abcd.parquet")
    np.testing.assert_array_equal(load_images(SOURCE).train.inputs, TRAIN)


def test_grey_images_get_the_channels_of_the_source(folder: Path) -> None:
    grey = pixels(9, (6, 4, 1))
    write_train(folder, [encode(image) for image in grey])
    np.testing.assert_array_equal(load_images(SOURCE).train.inputs, grey.repeat(3, axis=-1))
    source = replace(SOURCE, shape=(6, 4, 1))
    np.testing.assert_array_equal(load_images(source).train.inputs, grey)


def test_recompressed_images_are_noted(folder: Path) -> None:
    write_train(folder, [encode(image, "JPEG") for image in TRAIN])
    assert load_images(SOURCE).note == "JPEG"


# The digest


def test_digest_is_of_pixels_and_then_labels() -> None:
    images = Images(np.zeros((2, 1, 1, 1), np.uint8), np.array([1, 2], np.int32))
    written = bytes([0, 0, 1, 0, 0, 0, 2, 0, 0, 0])
    assert digest(images) == hashlib.sha256(written).hexdigest()
    assert digest(images) != digest(images._replace(labels=np.array([2, 1], np.int32)))


def test_a_single_changed_pixel_or_label_is_refused(folder: Path) -> None:
    exact = digest(Images(TRAIN, np.array(labels(9), np.int32)))
    source = replace(SOURCE, train=replace(SOURCE.train, sha256=exact))
    assert len(load_images(source).train.labels) == 9
    changed = TRAIN.copy()
    changed[3, 1, 2, 0] ^= 1
    write_train(folder, [encode(image) for image in changed])
    reason = rf"train\.parquet doesn't hold the train split of tiny.*not {exact}$"
    with pytest.raises(ValueError, match=reason):
        load_images(source)
    write_train(folder, [encode(image) for image in TRAIN], [1, 0, 2, 0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match=r"train\.parquet doesn't hold the train split of tiny"):
        load_images(source)


# What is refused


GOOD = [encode(image) for image in TRAIN]
WRONG = "must hold the train split of tiny, 9 images with labels 0 to 2, got "
GREY = pixels(1, (6, 4, 1))[0]
UNREADABLE = "can't be read as images of tiny ("


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (table(GOOD[:6], labels(6)), f"{WRONG}[2 2 2] with labels [0 1 2]"),
        (table(GOOD, labels(9)).clear(), f"{WRONG}[] with labels []"),
        (table([*GOOD[:8], None], labels(9)), f"{WRONG}[3 3 2] with labels [0 1 2]"),
        (table(GOOD, [*labels(8), None]), f"{WRONG}[3 3 2] with labels [0 1 2]"),
        (table(GOOD, [0] * 9), f"{WRONG}[9] with labels [0]"),
        (table(GOOD, [0, 0, *labels(7)]), f"{WRONG}[5 2 2] with labels [0 1 2]"),
        (table(GOOD, [0, 1, 3] * 3), f"{WRONG}[3 3 3] with labels [0 1 3]"),
        (table(GOOD, [-1, 1, 2] * 3), f"{WRONG}[3 3 3] with labels [-1  1  2]"),
        (table(GOOD, [0.0, 1.5, 2.0] * 3), f"{UNREADABLE}labels must be integers, got Float64)"),
        (
            table([*GOOD[:4], encode(257 * GREY.astype(np.uint16)), *GOOD[5:]], labels(9)),
            f"{UNREADABLE}image 4 has 16 bits a pixel)",
        ),
        (table(GOOD, [2**32, 1, 2] * 3), UNREADABLE),
        (
            table([encode(image) for image in pixels(9, (4, 6, 3))], labels(9)),
            f"{UNREADABLE}image 0 has 6 x 4 pixels)",
        ),
        (table([*GOOD[:4], GOOD[4][:-30], *GOOD[5:]], labels(9)), UNREADABLE),
        (table([*GOOD[:4], b"no image", *GOOD[5:]], labels(9)), UNREADABLE),
        (table(GOOD, labels(9)).rename({"label": "fine_label"}), UNREADABLE),
        (table(GOOD, labels(9), "picture"), UNREADABLE),
        (table(GOOD, list("abcabcabc")), UNREADABLE),
        (pl.DataFrame({"image": GOOD, "label": labels(9)}), UNREADABLE),
    ],
)
def test_other_content_is_refused_by_name(folder: Path, bad: pl.DataFrame, message: str) -> None:
    bad.write_parquet(folder / "train.parquet")
    with pytest.raises(ValueError) as caught:
        load_images(SOURCE)
    assert str(caught.value).startswith(f"{folder / 'train.parquet'} {message}")


def test_a_hole_anywhere_in_a_parquet_file_never_passes(folder: Path) -> None:
    exact = digest(Images(TRAIN, np.array(labels(9), np.int32)))
    source = replace(SOURCE, train=replace(SOURCE.train, sha256=exact))
    file = folder / "train.parquet"
    whole = file.read_bytes()
    for start in range(0, len(whole), len(whole) // 40):
        file.write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
        try:
            train = load_images(source).train
        except ValueError as error:
            assert str(file) in str(error)
        else:  # the hole is in the statistics or in the paths, which aren't used
            np.testing.assert_array_equal(train.inputs, TRAIN)


def test_an_unreadable_file_is_refused(folder: Path) -> None:
    (folder / "train.parquet").unlink()
    (folder / "train-00000-of-00001.parquet").mkdir()
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet can't be read as images"):
        load_images(SOURCE)


def test_a_missing_split_is_named(folder: Path) -> None:
    (folder / "valid.parquet").unlink()
    with pytest.raises(ValueError, match=r"tiny holds train\.parquet but no valid\.parquet$"):
        load_images(SOURCE)


def test_a_local_folder_that_does_not_exist_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOSSGUARD_DATA", str(tmp_path / "nowhere"))
    reason = r"^LOSSGUARD_DATA must name an existing folder, got '.*nowhere'$"
    with pytest.raises(ValueError, match=reason):
        load_images(SOURCE)


# The hub


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that answers with a snapshot of both splits; the local folder is elsewhere."""
    snapshot = tmp_path / "snapshot"
    (snapshot / SOURCE.folder).mkdir(parents=True)
    for stem in ("train", "valid"):
        shard = snapshot / SOURCE.folder / f"{stem}-00000-of-00001-0123abcd.parquet"
        (folder / f"{stem}.parquet").rename(shard)
    asked: dict[str, Any] = {"snapshot": snapshot}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(repository=repository, **options)
        if "error" in asked:
            raise asked["error"]
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("variable", ["without the data set", "unset", "empty"])
def test_the_hub_is_asked_where_the_local_folder_lacks_the_data(hub, monkeypatch, variable) -> None:
    if variable == "unset":
        monkeypatch.delenv("LOSSGUARD_DATA")
    elif variable == "empty":
        monkeypatch.setenv("LOSSGUARD_DATA", "")
    np.testing.assert_array_equal(load_images(SOURCE).test.inputs, VALID)
    assert hub["repository"] == "someone/tiny"
    assert hub["repo_type"] == "dataset"
    assert hub["allow_patterns"] == ["data/train-*.parquet", "data/valid-*.parquet"]


def test_the_hub_is_not_asked_where_the_local_folder_has_the_data(folder, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert len(load_images(SOURCE).train.labels) == 9


BOTH_WAYS = (
    "connect to the internet, or set LOSSGUARD_DATA to a folder that holds tiny/train.parquet and "
    "tiny/valid.parquet"
)


def test_offline_the_error_names_both_ways(hub: dict[str, Any]) -> None:
    hub["error"] = OSError("Name not known.\nSecond line")
    with pytest.raises(ConnectionError) as caught:
        load_images(SOURCE)
    assert str(caught.value) == (
        f"tiny couldn't be fetched from the hub's someone/tiny (Name not known): {BOTH_WAYS}"
    )


def test_an_incomplete_cache_offline_is_an_error(hub: dict[str, Any]) -> None:
    for file in (hub["snapshot"] / SOURCE.folder).glob("valid*"):
        file.unlink()
    with pytest.raises(ConnectionError, match=r"\(the local copy is incomplete\)"):
        load_images(SOURCE)


def test_a_source_without_a_repository_is_local_only(hub: dict[str, Any]) -> None:
    reason = r"^tiny isn't on the hub and must be in the folder tiny/"
    with pytest.raises(ConnectionError, match=reason):
        load_images(replace(SOURCE, repository=None))


def test_progress_shows_on_a_terminal_only(folder: Path, monkeypatch, capsys) -> None:
    load_images(SOURCE)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    load_images(SOURCE)
    captured = capsys.readouterr()
    assert captured.out == "" and "Decoding tiny" in captured.err
