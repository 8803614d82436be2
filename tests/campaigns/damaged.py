"""Bytes cut off, flipped, zeroed or added in a file that is read: records, weights, checkpoints.

Held: what is read, or ends after ``--resume``, is the same to the bit; or one sentence refuses it.
"""

import random
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from lossguard.learned.weights_file import pretrained_names, pretrained_path
from lossguard.runs.checkpoints import Checkpoints

from .killed import content, go

MANY = 40


@cache
def untouched() -> Path:
    """A run and a meta-training, finished and stopped in the middle, and weights."""
    folder, save, saved = Path(tempfile.mkdtemp()), Checkpoints.save, []

    def stop(*given: Any) -> None:
        save(*given)
        saved.append(given)
        if len(saved) == 4:
            raise KeyboardInterrupt

    for kind in ("run", "metatrain"):
        go(kind, folder / "finished" / kind)
        saved.clear()
        with mock.patch.object(Checkpoints, "save", stop):
            try:
                go(kind, folder / "stopped" / kind)
            except KeyboardInterrupt:
                continue
    (folder / "weights").mkdir()
    for name in pretrained_names():
        shutil.copy(pretrained_path(name), folder / "weights")
    return folder


def attempt(seed: int, folder: Path) -> Counter[str]:
    """Damage to ``MANY`` files, one at a time; of what was stopped fewer, as it then goes on."""
    rng = random.Random(seed)
    stage = rng.choice(("finished", "stopped", "weights"))
    kind = rng.choice(("run", "metatrain")) if stage != "weights" else "."
    place = folder / "copy"
    tried = Counter[str]()
    expected = content(untouched() / ("finished" if kind != "." else "weights") / kind)
    for _ in range(MANY if stage != "stopped" else 2):
        shutil.copytree(untouched() / stage / kind, place)
        files = sorted(f for f in place.rglob("*") if f.is_file() and f.stat().st_size)
        if stage == "finished":
            files = [file for file in files if file.parent == place]  # no other is read
        file = rng.choice(files)
        how = damage(file, rng)
        told = f"{file.relative_to(place)} of a {stage} {kind}, {how}"
        try:
            if stage == "stopped":
                go(kind, place)
            found = content(place)
        except (ValueError, OSError) as error:
            assert 20 < len(str(error)) < 1000 and "\n" not in str(error), f"{told}: {error}"
            tried["refused"] += 1
        except Exception as error:
            error.add_note(told)
            raise
        else:
            assert found.keys() == expected.keys(), f"{told}: {found.keys() ^ expected.keys()}"
            for name in expected:
                assert found[name] == expected[name], f"{told}: another {name}"
            tried["the same" if stage != "stopped" else "gone on to the same end"] += 1
        shutil.rmtree(place)
    return tried


def damage(file: Path, rng: random.Random) -> str:
    """Do it; what was done."""
    whole = bytearray(file.read_bytes())
    how = rng.choice(("cut", "flipped", "flipped", "flipped", "zeroed", "added"))
    at = rng.randrange(len(whole))
    if how == "cut":
        del whole[at:]
    elif how == "flipped":
        whole[at] ^= 1 << rng.randrange(8)
    elif how == "zeroed":
        whole[at : at + 64] = bytes(len(whole[at : at + 64]))
    else:
        whole += rng.randbytes(rng.randint(1, 64))
    file.write_bytes(whole)
    return f"{how} at {at}"
