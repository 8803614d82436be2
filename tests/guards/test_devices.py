"""Guards over several devices, which a process must ask for before it begins."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_four_devices_it_is_as_on_one() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, Path(__file__).with_name("on_four_devices.py")]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
