"""What tests of compiled programs share.

May be changed here: checkpoints that runs begin from.
"""

from pathlib import Path

import pytest

from gsa_jax.convert import convert
from gsa_jax.splat_config import SPLAT_PRESETS


@pytest.fixture(scope="package")
def hybrid(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with splats that a run can train."""
    folder = tmp_path_factory.mktemp("hybrid") / "checkpoint"
    convert(story_neo, folder, splats=SPLAT_PRESETS["hybrid"])
    return folder
