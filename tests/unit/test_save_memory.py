"""save_memory.py in a process of its own: it makes worlds, and this process may hold one."""

import subprocess
import sys
from pathlib import Path


def test_host_memory_of_a_save_and_a_load():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name("save_memory.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
