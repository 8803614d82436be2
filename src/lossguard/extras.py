"""The packages that parts of this one need, by the extra that installs them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "jax": ("jax", "jaxlib", "optax", "equinox", "jaxtyping"),
    "torch": ("torch",),
    "experiments": (
        "huggingface_hub",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "PIL",
        "plotly",
        "polars",
        "rich",
        "sklearn",
        "tyro",
    ),
    "ray": ("ray",),
}
"""By the names under which they are imported."""


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Around imports: if a package of an extra is missing, the error says how to install it.

    Raises:
        ModuleNotFoundError: naming ``what`` needs the package, and the extra.

    >>> with needed("a test"):
    ...     raise ModuleNotFoundError("No module named 'torch'", name="torch")
    Traceback (most recent call last):
    ModuleNotFoundError: a test needs torch: pip install 'lossguard[torch]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                message = f"{what} needs {package}: pip install 'lossguard[{extra}]'"
                raise ModuleNotFoundError(message, name=error.name) from error
        raise
