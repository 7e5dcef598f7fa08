"""What several files about prompts ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_turns import RELEASE, texts_of

from dsv4_ascend.chat.release_texts import ReleaseTexts


@pytest.fixture
def texts(tmp_path: Path) -> ReleaseTexts:
    return texts_of(tmp_path, RELEASE)
