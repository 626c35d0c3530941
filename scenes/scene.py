"""What a scene is: a room with painted walls and a few painted objects in it, drawn from a seed.

World axes are those of a level OpenCV camera: x right, y down, z forward, metres. The floor is y = 0 and the ceiling
y = -height, so a camera with the identity rotation stands upright and looks at the far wall.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.78, 0.25, 0.22),
    "orange": (0.88, 0.54, 0.24),
    "yellow": (0.86, 0.77, 0.34),
    "green": (0.33, 0.62, 0.33),
    "teal": (0.25, 0.60, 0.60),
    "blue": (0.27, 0.42, 0.76),
    "purple": (0.54, 0.35, 0.68),
    "pink": (0.87, 0.58, 0.66),
    "brown": (0.54, 0.39, 0.27),
    "gray": (0.55, 0.56, 0.58),
    "white": (0.88, 0.88, 0.86),
}
WALL_PATTERNS = ("plain", "striped", "checkered", "brick")
FLOOR_PATTERNS = ("wooden", "tiled", "carpeted")
OBJECT_PATTERNS = ("plain", "striped", "spotted", "checkered")
WALL_COLORS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "gray", "white")
FLOOR_COLORS = ("brown", "gray", "green", "blue", "red", "yellow")
CEILING_COLORS = ("white", "gray", "yellow")
OBJECT_COLORS = tuple(COLORS)


@dataclass(frozen=True, kw_only=True)
class Paint:
    """A surface's look: a colour of `COLORS`, a pattern, and the seed of its grain."""

    color: str
    pattern: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Ball:
    """A sphere: centre (x, y, z) and radius in metres."""

    center: tuple[float, float, float]
    radius: float
    paint: Paint


@dataclass(frozen=True, kw_only=True)
class Box:
    """A cuboid standing upright: centre and half sizes (x, y, z) in metres, turned by `yaw` radians about y."""

    center: tuple[float, float, float]
    half_size: tuple[float, float, float]
    yaw: float
    paint: Paint

    @property
    def radius(self) -> float:
        """Radius in metres of the upright cylinder around the box."""
        return (self.half_size[0] ** 2 + self.half_size[2] ** 2) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A room [-x/2, x/2] x [-y, 0] x [-z/2, z/2] with its paints, objects and one lamp.

    `walls` are far (+z), right (+x), near (-z), left (-x): opposite walls share colour and pattern, not the grain, so
    that neighbours always differ and every direction of view is unique.
    """

    seed: int
    size: tuple[float, float, float]
    walls: tuple[Paint, Paint, Paint, Paint]
    floor: Paint
    ceiling: Paint
    objects: tuple[Ball | Box, ...]
    lamp: tuple[float, float, float]
    fov: float  # horizontal field of view of the cameras that film this scene, degrees


def make_scene(seed: int) -> Scene:
    """The scene of a seed: the same seed is the same scene on every machine.

    Args:
        seed: any integer.

    Returns:
        A room of 4.4 to 5.6 metres a side with two to four balls and boxes that do not touch each other.
    """
    rng = random.Random(f"scene {seed}")

    def paint(color: str, pattern: str) -> Paint:
        return Paint(color=color, pattern=pattern, seed=rng.randrange(2**31))

    size = (rng.uniform(4.4, 5.6), rng.uniform(2.5, 2.9), rng.uniform(4.4, 5.6))
    colors = rng.sample(WALL_COLORS, 2)
    patterns = [rng.choice(WALL_PATTERNS) for _ in range(2)]
    walls = tuple(paint(colors[i % 2], patterns[i % 2]) for i in range(4))
    floor_color = rng.choice([color for color in FLOOR_COLORS if color not in colors])
    floor = paint(floor_color, rng.choice(FLOOR_PATTERNS))
    ceiling = paint(rng.choice(CEILING_COLORS), "plain")
    object_colors = rng.sample([color for color in OBJECT_COLORS if color != floor_color], 4)

    objects: list[Ball | Box] = []
    for index in range(rng.choice((2, 3, 3, 4))):
        for _ in range(100):
            item = _object(rng, paint(object_colors[index], rng.choice(OBJECT_PATTERNS)))
            if all(_distance(item, other) > item.radius + other.radius + 0.15 for other in objects):
                objects.append(item)
                break
    lamp = (rng.uniform(-0.8, 0.8), -size[1] + 0.35, rng.uniform(-0.8, 0.8))
    return Scene(
        seed=seed,
        size=size,
        walls=walls,  # type: ignore[arg-type]  # four by construction
        floor=floor,
        ceiling=ceiling,
        objects=tuple(objects),
        lamp=lamp,
        fov=rng.choice((65.0, 70.0, 75.0)),
    )


def caption(scene: Scene) -> str:
    """What a scene looks like in one sentence, from the fixed grammar that the tiny text encoder's tokenizer knows."""
    walls = " and ".join(f"{_words(paint)} walls" for paint in scene.walls[:2])
    objects = [_with_article(f"{_words(item.paint)} {_kind(item)}") for item in scene.objects]
    return (
        f"a room with {walls}, a {_words(scene.floor)} floor, a {_words(scene.ceiling)} ceiling, "
        f"{', '.join(objects[:-1])} and {objects[-1]}."
    )


def _words(paint: Paint) -> str:
    return paint.color if paint.pattern == "plain" else f"{paint.color} {paint.pattern}"


def _kind(item: Ball | Box) -> str:
    return "ball" if isinstance(item, Ball) else "box"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _object(rng: random.Random, paint: Paint) -> Ball | Box:
    x, z = rng.uniform(-1.25, 1.25), rng.uniform(-1.25, 1.25)
    if rng.random() < 0.5:
        radius = rng.uniform(0.28, 0.5)
        return Ball(center=(x, -radius, z), radius=radius, paint=paint)
    half = (rng.uniform(0.22, 0.38), rng.uniform(0.25, 0.55), rng.uniform(0.22, 0.38))
    return Box(center=(x, -half[1], z), half_size=half, yaw=rng.uniform(0.0, 3.14159), paint=paint)


def _distance(a: Ball | Box, b: Ball | Box) -> float:
    return ((a.center[0] - b.center[0]) ** 2 + (a.center[2] - b.center[2]) ** 2) ** 0.5
