"""Fixtures of the data set's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_dataset import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A folder with one video of 21 frames, 96x64 pixels, at 16 frames per second."""
    world = World(tmp_path)
    world.add_video()
    return world


@pytest.fixture
def empty_world(tmp_path: Path) -> World:
    (tmp_path / "videos").mkdir()
    (tmp_path / "cameras").mkdir()
    return World(tmp_path)
