"""Images in Parquet files: find them, decode them, and refuse what isn't the data set.

A source is looked up in the folder that ``LOSSGUARD_DATA`` names, then on the Hugging Face hub, in
the hub's layout: a column ``image`` or ``img`` of structs ``{bytes, path}`` with the encoded image,
and a column ``label`` of integers.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import polars as pl
from jaxtyping import Int32, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import track

from .sources import ImageSource, SplitSource

VARIABLE = "LOSSGUARD_DATA"


class Images(NamedTuple):
    """The decoded images of one split: uint8, channels last, and the class of each."""

    inputs: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]


class LoadedImages(NamedTuple):
    """Both splits; "JPEG" where images arrived with loss, else ""."""

    train: Images
    test: Images
    note: str


def load_images(source: ImageSource) -> LoadedImages:
    """Both splits of a source, verified.

    Raises:
        ValueError: if the content isn't the data set's.
        ConnectionError: if the data set is neither in the local folder nor to be had from the hub.
    """
    folder = _find(source)
    train, note = _load_split(folder, source, source.train)
    test, _ = _load_split(folder, source, source.test)
    return LoadedImages(train, test, note)


def _load_split(folder: Path, source: ImageSource, split: SplitSource) -> tuple[Images, str]:
    files = _files(folder, split.stem)
    if not files:
        raise ValueError(f"{folder} holds {source.train.stem}.parquet but no {split.stem}.parquet")
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and its other shards"
    try:
        images, note = _read(files, source)
    # What damaged files raise depends on where the damage is; a panic is no Exception.
    except (Exception, pl.exceptions.PanicException) as error:
        raise ValueError(
            f"{where} can't be read as images of {source.name} ({_first_line(error)})"
        ) from error
    labels, counts = np.unique(images.labels, return_counts=True)
    whole = counts.sum() == split.examples and np.array_equal(labels, np.arange(source.classes))
    if not whole or (split.sha256 is None and len({*counts}) > 1):
        raise ValueError(
            f"{where} must hold the {split.stem} split of {source.name}, {split.examples} images "
            f"with labels 0 to {source.classes - 1}, got {counts} with labels {labels}"
        )
    if split.sha256 is not None and digest(images) != split.sha256:
        raise ValueError(
            f"{where} doesn't hold the {split.stem} split of {source.name}: its images and labels "
            f"have the SHA-256 {digest(images)}, not {split.sha256}"
        )
    return images, note


def digest(images: Images) -> str:
    """SHA-256 of the pixels and then of the labels (little-endian int32), in hexadecimal."""
    sha = hashlib.sha256(images.inputs.tobytes())
    sha.update(images.labels.astype("<i4").tobytes())
    return sha.hexdigest()


def _find(source: ImageSource) -> Path:
    """The folder that holds the Parquet files: the local one if it has them, else the hub's."""
    local = os.environ.get(VARIABLE)
    if local:
        if not Path(local).is_dir():
            raise ValueError(f"{VARIABLE} must name an existing folder, got {local!r}")
        folder = Path(local) / source.name
        if _files(folder, source.train.stem):
            return folder
    if source.repository is None:
        raise ConnectionError(
            f"{source.name} isn't on the hub and must be in the folder {source.name}/ of the one "
            f"that {VARIABLE} names, now {local!r}"
        )
    return _download(source, source.repository)


def _download(source: ImageSource, repository: str) -> Path:
    stems = (source.train.stem, source.test.stem)
    missing = "the local copy is incomplete"
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset",
            allow_patterns=[f"{source.folder}/{stem}-*.parquet" for stem in stems],
        )
        folder = Path(snapshot) / source.folder
        if all(_files(folder, stem) for stem in stems):
            return folder
    # The hub's client raises the errors of its HTTP library, which changes with its version.
    except Exception as error:
        missing = _first_line(error)
    raise ConnectionError(
        f"{source.name} couldn't be fetched from the hub's {repository} ({missing}): connect to "
        f"the internet, or set {VARIABLE} to a folder that holds {source.name}/{stems[0]}.parquet "
        f"and {source.name}/{stems[1]}.parquet"
    )


def _files(folder: Path, stem: str) -> list[Path]:
    whole = folder / f"{stem}.parquet"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*-of-*.parquet"))


def _read(files: Sequence[Path], source: ImageSource) -> tuple[Images, str]:
    """The rows that have an image and a label, and "JPEG" if any image is one."""
    table = pl.concat([pl.read_parquet(file) for file in files])
    column = "image" if "image" in table.columns else "img"
    rows = table.select(pl.col(column).struct.field("bytes"), pl.col("label")).drop_nulls()
    if not rows["label"].dtype.is_integer():
        raise ValueError(f"labels must be integers, got {rows['label'].dtype}")
    pixels, note = _decode(rows["bytes"].to_list(), source)
    return Images(pixels, rows["label"].cast(pl.Int32).to_numpy()), note


def _decode(encoded: list[bytes], source: ImageSource) -> tuple[UInt8[np.ndarray, "n h w c"], str]:
    """One thread: for images this small, Python's lock makes several slower."""
    height, width, channels = source.shape
    pixels, note = np.empty((len(encoded), *source.shape), np.uint8), ""
    for index, one in enumerate(_shown(encoded, source.name)):
        image = Image.open(io.BytesIO(one), formats=("PNG", "JPEG"))
        note = "JPEG" if image.format == "JPEG" else note
        if image.mode.startswith("I"):  # converting would clip
            raise ValueError(f"image {index} has 16 bits a pixel")
        if image.size != (width, height):
            raise ValueError(f"image {index} has {image.width} x {image.height} pixels")
        mode = "L" if channels == 1 else "RGB"
        pixels[index] = np.asarray(image.convert(mode)).reshape(source.shape)
    return pixels, note


def _shown(encoded: list[bytes], name: str) -> Iterable[bytes]:
    """With a bar on a terminal: decoding takes seconds."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(encoded, f"Decoding {name}", console=console, transient=True, disable=hidden)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
