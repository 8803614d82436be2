"""Where the images of a data set come from, and what they must be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitSource:
    """What one split must hold."""

    stem: str
    """Its file is ``<stem>.parquet``, or the hub's ``<stem>-00000-of-00001.parquet``."""
    examples: int
    """Number of images; the same number of every class unless a digest is given."""
    sha256: str | None = None
    """Of the bytes of the decoded images and of the labels (little-endian int32), for data sets
    that are distributed without loss."""


@dataclass(frozen=True)
class ImageSource:
    """Where an image data set comes from, and what must arrive."""

    name: str
    """The folder under ``LOSSGUARD_DATA``."""
    repository: str | None
    """On the hub; None where the hub doesn't have it."""
    folder: str
    """In the repository."""
    shape: tuple[int, int, int]
    """(height, width, channels) in pixels."""
    classes: int
    train: SplitSource
    test: SplitSource
    encoding: str = "PNG"
    """Of the original images, "PNG" or "JPEG"."""
