"""Images in Parquet files: find them, decode them, and refuse what isn't the data set.

A source is looked up in the folder that ``LOSSGUARD_DATA`` names, then on the Hugging Face hub, in
the hub's layout: a column ``image`` or ``img`` of structs ``{bytes, path}`` with the encoded image,
and a column ``label`` of integers.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import polars as pl
from jaxtyping import Int32, Int64, UInt8
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
    """Both splits, and what is to be said about their encoding ("" where it is the original's)."""

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
    tables = [_read(file) for file in files]
    encoded = [image for images, _ in tables for image in images]
    labels = np.concatenate([labels for _, labels in tables])
    _check_labels(labels, source, split, where)
    images = Images(_decode(encoded, source, where), labels.astype(np.int32))
    if split.sha256 is not None and digest(images) != split.sha256:
        raise ValueError(
            f"{where} doesn't hold the {split.stem} split of {source.name}: its images and labels "
            f"have the SHA-256 {digest(images)}, not {split.sha256}"
        )
    return images, _encoding_note(encoded[0], source)


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


def _read(file: Path) -> tuple[list[bytes], Int64[np.ndarray, " n"]]:
    """The encoded images and the labels of one Parquet file."""
    try:
        table = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise ValueError(f"{file} can't be read as Parquet ({_first_line(error)})") from error
    image = "image" if "image" in table.columns else "img"
    images, labels = table.schema.get(image), table.schema.get("label")
    encoded = isinstance(images, pl.Struct) and images.to_schema().get("bytes") == pl.Binary
    if not (encoded and labels is not None and labels.is_integer()):
        raise ValueError(
            f"{file} must have a column 'image' or 'img' of structs with binary 'bytes', and a "
            f"column 'label' of integers, got {dict(table.schema)}"
        )
    encoded, labels = table[image].struct.field("bytes"), table["label"]
    if encoded.null_count() or labels.null_count():
        raise ValueError(f"{file} has rows without an image or without a label")
    return encoded.to_list(), labels.to_numpy().astype(np.int64)


def _check_labels(
    labels: Int64[np.ndarray, " n"], source: ImageSource, split: SplitSource, where: str
) -> None:
    if len(labels) != split.examples:
        raise ValueError(
            f"{where} has {len(labels)} images, but the {split.stem} split of {source.name} has "
            f"{split.examples}"
        )
    if labels.min() < 0 or labels.max() >= source.classes:
        raise ValueError(
            f"{where} has labels from {labels.min()} to {labels.max()}, but those of {source.name} "
            f"go from 0 to {source.classes - 1}"
        )
    counts = np.bincount(labels, minlength=source.classes)
    each = split.examples // source.classes
    if split.sha256 is None and (counts != each).any():
        raise ValueError(
            f"{where} has {counts.min()} to {counts.max()} images of a class, but the "
            f"{split.stem} split of {source.name} has {each} of every class"
        )


def _decode(encoded: list[bytes], source: ImageSource, where: str) -> UInt8[np.ndarray, "n h w c"]:
    """The pixels. One thread: for images this small, Python's lock makes several slower."""
    height, width, channels = source.shape
    mode = "L" if channels == 1 else "RGB"
    pixels = np.empty((len(encoded), *source.shape), np.uint8)
    console = Console(stderr=True)
    progress = track(
        enumerate(encoded),
        description=f"Decoding {source.name}",
        total=len(encoded),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for index, image_bytes in progress:
        try:
            image = Image.open(io.BytesIO(image_bytes), formats=("PNG", "JPEG"))
            if image.mode.startswith("I"):  # converting would clip
                raise ValueError("16 bits a pixel, not 8")
            image = image if image.mode == mode else image.convert(mode)
            decoded = np.asarray(image)
        # What a damaged file raises depends on its format and on where the damage is.
        except Exception as error:
            raise ValueError(
                f"{where} has an unreadable image in row {index} of those read "
                f"({_first_line(error)})"
            ) from error
        if decoded.shape[:2] != (height, width):
            raise ValueError(
                f"{where} has an image of {decoded.shape[1]} x {decoded.shape[0]} pixels, but "
                f"those of {source.name} have {width} x {height}"
            )
        pixels[index] = decoded.reshape(source.shape)
    return pixels


def _encoding_note(encoded: bytes, source: ImageSource) -> str:
    """Says so, with its quality, where a lossless original arrived as JPEG."""
    image = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG"))
    if source.encoding == "JPEG" or image.format != "JPEG":
        return ""
    for quality in range(100, 0, -1):
        sample = io.BytesIO()
        Image.new(image.mode, (8, 8)).save(sample, "JPEG", quality=quality)
        if getattr(Image.open(sample), "quantization", None) == getattr(image, "quantization", {}):
            return f"JPEG q{quality}"
    return "JPEG"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
