"""Use an optimizer that you don't trust, and never do worse than one that you do.

The public names are those of ``__init__.pyi``, where type checkers read them too; each is imported
on first use, so that ``lossguard.torch`` works without importing JAX.
"""

from importlib import metadata

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = metadata.version(__name__)
