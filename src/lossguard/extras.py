"""The packages that parts of this one need, by what installs them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

INSTALLS: Mapping[str, tuple[str, ...]] = {
    "'lossguard[jax]'": ("jax", "jaxlib", "optax", "equinox", "jaxtyping"),
    "'lossguard[torch]'": ("torch",),
    "'lossguard[experiments]'": (
        "huggingface_hub",
        "jinja2",
        "markupsafe",
        "PIL",
        "polars",
        "rich",
        "sklearn",
        "tyro",
    ),
    "'lossguard[ray]'": ("ray",),
    "matplotlib": ("matplotlib",),  # alone: whoever draws decisions of PyTorch needs no JAX
}
"""What ``pip install`` is given, and the names under which these packages are imported."""


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Around imports: if a package is missing, the error says how to install it.

    Raises:
        ModuleNotFoundError: naming ``what`` needs the package, and what installs it.

    >>> with needed("a test"):
    ...     raise ModuleNotFoundError("No module named 'torch'", name="torch")
    Traceback (most recent call last):
    ModuleNotFoundError: a test needs torch: pip install 'lossguard[torch]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        for install, packages in INSTALLS.items():
            if package in packages:
                message = f"{what} needs {package}: pip install {install}"
                raise ModuleNotFoundError(message, name=error.name) from error
        raise
