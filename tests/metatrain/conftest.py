"""What tests of meta-training share."""

from pathlib import Path

import pytest
from tiny_training import TINY

from lossguard.metatrain.loop import metatrain


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    return metatrain(TINY, tmp_path_factory.mktemp("whole") / "run").parent
