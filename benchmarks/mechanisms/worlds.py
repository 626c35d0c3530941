"""What a mechanism is trained and tested on: rooms, camera moves, coordinates, and the paths it never saw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from camera.path import CameraPath
from scenes.motion import MOVES, film, is_clear
from scenes.scene import Scene, make_scene

HEIGHT, WIDTH, NUM_FRAMES, FPS = 64, 96, 17, 8.0
UNSEEN = 1_000_000  # seeds of training paths count from 0; those of test paths from here
CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class World:
    """A data set and its test."""

    name: str
    task: str
    pose_frame: str
    first_scene: int
    scenes: int
    clips_per_scene: int
    moves: tuple[str, ...]
    test_scenes: tuple[int, ...]
    test_moves: tuple[str, ...]
    videos: int = 40
    """Test videos, shared out among the test scenes in turn."""
    recovered: int = 2
    """The camera of every second video is recovered from it (of every one: 1); that takes longer than to film it."""


@dataclass(frozen=True, kw_only=True)
class TestCase:
    """A video to generate, and the paths among which it must be nearest to its own."""

    scene: int
    asked: CameraPath
    others: tuple[CameraPath, ...]


WORLDS = {
    world.name: world
    for world in (
        World(
            name="scene",
            task="tiny",
            pose_frame="scene",
            first_scene=100,
            scenes=2,
            clips_per_scene=80,
            moves=MOVES,
            test_scenes=(100, 101),
            test_moves=MOVES,
        ),
        World(
            name="place",
            task="tiny",
            pose_frame="scene",
            first_scene=100,
            scenes=1,
            clips_per_scene=80,
            moves=MOVES,
            test_scenes=(100,),
            test_moves=MOVES,
            recovered=1,
        ),
        World(
            name="first",
            task="tiny-i2v",
            pose_frame="first",
            first_scene=200,
            scenes=400,
            clips_per_scene=2,
            moves=MOVES,
            test_scenes=tuple(range(40)),
            test_moves=MOVES,
        ),
        World(
            name="orbits",
            task="tiny",
            pose_frame="scene",
            first_scene=100,
            scenes=2,
            clips_per_scene=80,
            moves=tuple(move for move in MOVES if move != "orbit"),
            test_scenes=(100, 101),
            test_moves=("orbit",),
        ),
    )
}
"""`scene`: the rooms of the training clips, in their coordinates. `place`: one of them, for a long training.
`first`: rooms never seen, their first frame given.
`orbits`: as `scene`, trained without orbits and tested on them."""


def test_cases(world: World) -> list[TestCase]:
    """The test of a world: the same for every mechanism and seed."""
    cases = []
    for number in range(world.videos):
        scene = make_scene(world.test_scenes[number % len(world.test_scenes)])
        asked = _path(scene.seed, UNSEEN + number, world.test_moves)
        others = _from_one_place(scene, asked, world) if world.pose_frame == "first" else _elsewhere(number, world)
        cases.append(TestCase(scene=scene.seed, asked=asked, others=others))
    return cases


def _elsewhere(number: int, world: World) -> tuple[CameraPath, ...]:
    """Seven other test paths of the same room."""
    rooms = len(world.test_scenes)
    paths = world.videos // rooms
    place, room = divmod(number, rooms)
    return tuple(
        _path(world.test_scenes[room], UNSEEN + (place + step) % paths * rooms + room, world.test_moves)
        for step in range(1, CANDIDATES)
    )


def _from_one_place(scene: Scene, asked: CameraPath, world: World) -> tuple[CameraPath, ...]:
    """Seven other motions from the asked path's first pose: the first frame alone must not tell them apart."""
    found: list[CameraPath] = []
    seed = 2 * UNSEEN
    while len(found) < CANDIDATES - 1:
        motion = _path(scene.seed, seed, world.test_moves).relative_to_first()
        c2w = asked.c2w[:1] @ motion.c2w
        if is_clear(scene, c2w[:, :3, 3]):
            found.append(
                CameraPath(
                    c2w=c2w, K=asked.K, height=asked.height, width=asked.width, fps=asked.fps, pose_frame="scene"
                )
            )
        seed += 1
    return tuple(found)


@cache
def _path(scene: int, seed: int, moves: tuple[str, ...]) -> CameraPath:
    return film(make_scene(scene), seed, num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH, fps=FPS, move=moves)


def stacked(paths: list[CameraPath]) -> tuple[torch.Tensor, torch.Tensor]:
    """Poses [B, T, 4, 4] and intrinsics [B, T, 3, 3] of several paths."""
    return torch.stack([path.c2w for path in paths]), torch.stack([path.K for path in paths])
