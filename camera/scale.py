"""Scale rules: what one unit of a path's positions means, so that a step of 1 is as long in one clip as in the next.

    none            positions as given
    max_norm        the largest distance from the first camera becomes 1
    first_step      the first step from one frame to the next that is not zero becomes 1
    metric:FACTOR   positions times FACTOR, such as metric:0.01 for centimetres to metres
    mean_depth      positions divided by the mean depth that the first camera sees: 1 is as far away as the scene

A network learns translations under one rule and understands no other, so the rule is written into caches and weights.
Only relative poses (pose frame "first") take max_norm and first_step: the clips of one captured place share its
coordinates, and such a rule would give each clip coordinates of its own.

Imports no torch, so that a TOML's rule can be read before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from core.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from camera.path import CameraPath

SCALE_RULES = ("none", "max_norm", "first_step", "metric:FACTOR", "mean_depth")
PER_CLIP = ("max_norm", "first_step")
"""Rules whose factor follows from the positions, so that it is another one for every part of a path."""

_STANDS_STILL = 1e-8  # units; a shorter way is rounding and not motion


def parse_scale_rule(text: str) -> str:
    """A scale rule in the one spelling that caches and weights hold.

    Args:
        text: "none", "max_norm", "first_step", "mean_depth" or "metric:FACTOR".

    Returns:
        The rule; a factor is written with at most 15 digits, without padding ("metric:0.010" becomes "metric:0.01").

    Raises:
        InputError: another word, or a factor that is not a number above 0.
    """
    name, colon, factor = text.strip().partition(":")
    if name == "metric":
        try:
            number = float(factor)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise InputError(f"scale rule: expected metric:FACTOR with a factor above 0, found {text!r}")
        return f"metric:{number:.15g}"
    if colon or name not in SCALE_RULES:
        raise InputError(
            f"scale rule: expected one of {', '.join(SCALE_RULES)}, found {text!r}{nearest(text, SCALE_RULES)}"
        )
    return name


def apply_scale(path: CameraPath, rule: str) -> CameraPath:
    """The path with its positions in the unit of a rule. Rotations and intrinsics do not change.

    Args:
        path: not scaled yet. In pose frame "first" the first camera stays where it is, at the origin.
        rule: as `parse_scale_rule` reads it.

    Returns:
        The scaled path; its mean depth, where known, is scaled with it. A camera that never moves has no length to
        scale by, and keeps its place under max_norm and first_step.

    Raises:
        InputError: an unknown rule, one that does not go with the pose frame, a path that is scaled already, or
            mean_depth without a known depth.
    """
    rule = parse_scale_rule(rule)
    if path.scale_rule != "none":
        raise InputError(
            f"camera path: expected positions as they were given, found them scaled by {path.scale_rule} already; give "
            "the path before it was scaled"
        )
    if rule == "none":
        return path
    if rule in PER_CLIP and path.pose_frame != "first":
        raise InputError(
            f'scale rule {rule}: expected poses relative to the first frame, found pose frame "scene", in which every '
            "clip would get coordinates of its own; use none, metric:FACTOR or mean_depth"
        )
    factor = _factor(path, rule)
    c2w = path.c2w.clone()
    c2w[:, :3, 3] *= factor
    depth = None if path.mean_depth is None else path.mean_depth * factor
    return replace(path, c2w=c2w, mean_depth=depth, scale_rule=rule)


def in_scale(path: CameraPath, rule: str) -> CameraPath:
    """The path in the unit of a rule, whether or not it comes in it.

    Args:
        path: as its file gives it, or a part of that; its scale_rule is what the file says.
        rule: as `parse_scale_rule` reads it.

    Returns:
        A path that says it is scaled by this rule already, as it is (a part of one gets its own factor where the rule
        has one for every clip); one that is not scaled, scaled.

    Raises:
        InputError: as `apply_scale`; also a path that was scaled by another rule.
    """
    rule = parse_scale_rule(rule)
    if path.scale_rule != rule:
        return apply_scale(path, rule)
    return apply_scale(replace(path, scale_rule="none"), rule) if rule in PER_CLIP else path


def _factor(path: CameraPath, rule: str) -> float:
    if rule.startswith("metric:"):
        return float(rule.partition(":")[2])
    if rule == "mean_depth":
        if path.mean_depth is None:
            raise InputError(
                "scale rule mean_depth: expected a path whose mean depth is known, found none; give a file that "
                "records it, name the depth, or use another rule"
            )
        return 1 / path.mean_depth
    if rule == "max_norm":
        lengths = (path.positions - path.positions[0]).norm(dim=-1)  # [T]
        return _one_over(lengths.max())
    steps = path.positions.diff(dim=0).norm(dim=-1)  # [T - 1]
    moving = steps[steps > _STANDS_STILL]
    return _one_over(moving[0]) if len(moving) else 1.0


def _one_over(length: Tensor) -> float:
    return 1 / float(length) if length > _STANDS_STILL else 1.0
