"""Scenes: a function of the seed, objects that fit into the room, captions that name what is there."""

import pytest

from scenes.scene import COLORS, Ball, caption, make_scene

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_scene_is_a_function_of_its_seed(seed):
    assert make_scene(seed) == make_scene(seed)
    assert make_scene(seed) != make_scene(seed + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_objects_stand_on_the_floor_inside_the_room_and_apart(seed):
    scene = make_scene(seed)
    for item in scene.objects:
        height = item.radius if isinstance(item, Ball) else item.half_size[1]
        assert item.center[1] == -height
        assert abs(item.center[0]) + item.radius < scene.size[0] / 2
        assert abs(item.center[2]) + item.radius < scene.size[2] / 2
    for index, one in enumerate(scene.objects):
        for other in scene.objects[:index]:
            gap = ((one.center[0] - other.center[0]) ** 2 + (one.center[2] - other.center[2]) ** 2) ** 0.5
            assert gap > one.radius + other.radius


@pytest.mark.parametrize("seed", SEEDS)
def test_the_caption_names_every_colour_and_pattern(seed):
    scene = make_scene(seed)
    text = caption(scene)
    for item in scene.objects:
        pattern = "" if item.paint.pattern == "plain" else f"{item.paint.pattern} "
        assert f"{item.paint.color} {pattern}{'ball' if isinstance(item, Ball) else 'box'}" in text
    for paint in (*scene.walls, scene.floor, scene.ceiling):
        assert paint.color in text
    assert not any(f"a {color}" in text for color in COLORS if color[0] in "aeiou")


def test_neighbouring_walls_differ_and_opposite_walls_have_their_own_grain():
    scene = make_scene(3)
    far, right, near, left = scene.walls
    assert far.color != right.color
    assert (far.color, far.pattern) == (near.color, near.pattern) and far.seed != near.seed
    assert (right.color, right.pattern) == (left.color, left.pattern) and right.seed != left.seed
