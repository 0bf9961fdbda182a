"""Transformer Engine's sources, for the tests that construct models from them."""

import subprocess
import sys
from pathlib import Path

import pytest

TE_SITE = Path(sys.prefix) / "te-site"


@pytest.fixture(scope="session")
def te_site() -> Path:
    """Transformer Engine's sources, beside the packages of this interpreter's environment; installed when they are not
    there.
    """
    command = ["bash", str(Path(__file__).parent / "environment.sh"), str(TE_SITE), sys.executable]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"Transformer Engine's sources cannot be installed into {TE_SITE}: pip took more than 300 s")
    if result.returncode != 0:
        pytest.skip(f"Transformer Engine's sources cannot be installed into {TE_SITE}: {result.stderr.strip()[-300:]}")
    return TE_SITE
