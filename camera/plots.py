"""Pictures of camera paths for people: the cameras in space, and their position, turn and speed over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camera.path import CameraPath
from camera.plausible import turn_between
from core.files import atomic_path

_NUM_FRUSTA = 9  # of a path
_FRUSTUM_SHARE = 0.15  # of the largest extent of all paths
_THINNEST_SHARE = 0.4  # of the longest side of the box in space, so that a level path has some height to stand in
_COLOURS = ("#0b6bcb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#5f6368")
_GREY = "#8a8f98"
_CHANGED_DEGREES = 0.01  # of the angle of view; below, nothing zooms and its panel is left out
_LONGEST_NAME = 60  # characters in the legend


def plot_path(paths: Mapping[str, CameraPath], file: Path | str) -> None:
    """Draw paths over one another into a PNG.

    On the left the cameras in space: the line is the way of the camera, grey is its shadow on the floor, each pyramid
    is what it sees, from its tip, with a small roof on its upper edge. On the right, over time: the position along
    three axes, the angle to the first frame, the angle of view where it changes, and both speeds. The first path is
    drawn broad, the others dashed on top of it, so that equal paths show as two.

    Args:
        paths: name in the legend -> path, all in one frame of coordinates.
        file: the PNG to be written.
    """
    from matplotlib.figure import Figure

    panels = time_panels(paths)
    figure = Figure(figsize=(15, 9), layout="constrained")
    grid = figure.add_gridspec(len(panels), 2, width_ratios=(1.35, 1), wspace=0.04, hspace=0.02)
    space: Any = figure.add_subplot(grid[:, 0], projection="3d", computed_zorder=False)
    _draw_space(space, paths)
    first: Any = None
    for row, panel in enumerate(panels):
        axes = figure.add_subplot(grid[row, 1], sharex=first)
        first = first or axes
        _draw_panel(axes, panel, is_last=row == len(panels) - 1)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def to_view(points: Tensor) -> Tensor:
    """World points x right, y down, z forward as (right, forward, up), which a plot draws upright: [..., 3]."""
    return torch.stack([points[..., 0], points[..., 2], -points[..., 1]], -1)


def frustum(path: CameraPath, frame: int, depth: float) -> Tensor:
    """A camera's pyramid in the world: tip, top left, top right, bottom right, bottom left, [5, 3]."""
    corners = torch.tensor([[0, 0], [path.width, 0], [path.width, path.height], [0, path.height]], dtype=torch.float64)
    K = path.K[frame]
    xy = (corners - K[:2, 2]) / K[[0, 1], [0, 1]] * depth  # [4, 2]
    in_camera = torch.cat([xy, torch.full((4, 1), depth, dtype=torch.float64)], 1)  # [4, 3]
    in_camera = torch.cat([torch.zeros(1, 3, dtype=torch.float64), in_camera])  # [5, 3]
    return in_camera @ path.rotations[frame].T + path.positions[frame]


def turn_degrees(path: CameraPath) -> Tensor:
    """Angle between the first camera's orientation and each other one, in degrees, [T]."""
    return turn_between(path.rotations[:1], path.rotations)


# ---- over time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TimePanel:
    """Curves over time with one y axis: times and values of each path, the smallest height that is shown."""

    label: str
    time_unit: str
    curves: list[tuple[list[float], list[float]]]
    smallest: float
    from_zero: bool = False


def time_panels(paths: Mapping[str, CameraPath]) -> list[TimePanel]:
    """What is drawn over time: seconds where every path has a frame rate, else frames; speeds stand between frames."""
    in_seconds = all(path.fps for path in paths.values())
    unit, per = ("seconds", "s") if in_seconds else ("frame", "frame")
    rates = [path.fps if in_seconds and path.fps else 1.0 for path in paths.values()]
    steps = [[index / rate for index in range(len(path))] for path, rate in zip(paths.values(), rates, strict=True)]
    betweens = [[(time + 0.5 / rate) for time in times[:-1]] for times, rate in zip(steps, rates, strict=True)]
    positions = [to_view(path.positions)[:, [0, 2, 1]] for path in paths.values()]  # right, up, forward
    widest = max((float((p.amax(0) - p.amin(0)).max()) for p in positions), default=0.0)
    found = [
        TimePanel(
            label=f"{name}\n(units)",
            time_unit=unit,
            curves=[(time, p[:, column].tolist()) for time, p in zip(steps, positions, strict=True)],
            smallest=widest or 1.0,
        )
        for column, name in enumerate(("right", "up", "forward"))
    ]
    values: list[tuple[str, list[list[float]], list[Tensor], float, bool]] = [
        ("turned\n(degrees)", steps, [turn_degrees(path) for path in paths.values()], 5.0, True),
        ("sees\n(degrees)", steps, [path.fov_degrees() for path in paths.values()], 5.0, False),
        (f"speed\n(units/{per})", betweens, _speeds(paths, rates), 1e-3 * widest or 0.1, True),
        (f"turning\n(degrees/{per})", betweens, _turning(paths, rates), 1.0 if in_seconds else 0.1, True),
    ]
    for label, times, curves, smallest, from_zero in values:
        if label.startswith("sees") and max(float(c.max() - c.min()) for c in curves) < _CHANGED_DEGREES:
            continue
        pairs = [(time, curve.tolist()) for time, curve in zip(times, curves, strict=True)]
        found.append(TimePanel(label=label, time_unit=unit, curves=pairs, smallest=smallest, from_zero=from_zero))
    return found


def _speeds(paths: Mapping[str, CameraPath], rates: list[float]) -> list[Tensor]:
    return [path.positions.diff(dim=0).norm(dim=-1) * rate for path, rate in zip(paths.values(), rates, strict=True)]


def _turning(paths: Mapping[str, CameraPath], rates: list[float]) -> list[Tensor]:
    return [
        turn_between(path.rotations[:-1], path.rotations[1:]) * rate
        for path, rate in zip(paths.values(), rates, strict=True)
    ]


def _draw_panel(axes: Any, panel: TimePanel, *, is_last: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (time, values) in enumerate(panel.curves):
        axes.plot(time, values, color=_COLOURS[index % len(_COLOURS)], **_line(index))
    everything = [value for _, values in panel.curves for value in values] or [0.0]
    low, high = (0.0 if panel.from_zero else min(everything)), max(everything)
    size = max(high - low, panel.smallest) * 1.1
    if panel.from_zero:
        axes.set_ylim(-0.05 * size, size)
    else:
        axes.set_ylim((low + high - size) / 2, (low + high + size) / 2)
    axes.set_ylabel(panel.label, rotation=0, ha="right", va="center", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(alpha=0.3)
    axes.tick_params(labelbottom=is_last, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if is_last:
        axes.set_xlabel(panel.time_unit)


def _line(index: int) -> dict[str, Any]:
    return {"linewidth": 3.5, "alpha": 0.6} if index == 0 else {"linewidth": 1.8, "linestyle": (0, (4, 1))}


# ---- in space --------------------------------------------------------------------------------------------------------


def _draw_space(axes: Any, paths: Mapping[str, CameraPath]) -> None:
    positions = torch.cat([path.positions for path in paths.values()])  # [sum T, 3]
    extent = float((positions.amax(0) - positions.amin(0)).max())
    depth = _FRUSTUM_SHARE * extent if extent > 0 else 1.0
    chosen = {
        name: sorted({round(frame) for frame in torch.linspace(0, len(path) - 1, _NUM_FRUSTA).tolist()})
        for name, path in paths.items()
    }
    drawn = [to_view(frustum(path, frame, depth)) for name, path in paths.items() for frame in chosen[name]]
    everything = torch.cat([to_view(positions), *drawn])
    low, high = everything.amin(0), everything.amax(0)
    room = 1.05 * (high - low).clamp_min(_THINNEST_SHARE * float((high - low).max()))
    centre = (low + high) / 2
    floor = float(centre[2] - room[2] / 2)
    for index, (name, path) in enumerate(paths.items()):
        _draw_way(axes, path, name, index, floor)
        for frame in chosen[name]:
            share = frame / max(len(path) - 1, 1)
            _draw_frustum(axes, to_view(frustum(path, frame, depth)), _COLOURS[index % len(_COLOURS)], share)
    for letter, middle, size in zip("xyz", centre.tolist(), room.tolist(), strict=True):
        getattr(axes, f"set_{letter}lim")(middle - size / 2, middle + size / 2)
    _style_space(axes, room.tolist())


def _draw_way(axes: Any, path: CameraPath, name: str, index: int, floor: float) -> None:
    colour = _COLOURS[index % len(_COLOURS)]
    x, y, z = to_view(path.positions).T.tolist()
    on_floor = [floor] * len(path)
    axes.plot(x, y, on_floor, color=_GREY, linewidth=1.5, alpha=0.5, zorder=1)
    for end in (0, -1):
        axes.plot([x[end]] * 2, [y[end]] * 2, [floor, z[end]], color=_GREY, linewidth=0.8, linestyle=":", zorder=1)
    label = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
    axes.plot(x, y, z, color=colour, label=label, zorder=3 + index, **_line(index))
    axes.scatter(x[0], y[0], z[0], color=colour, marker="o", s=55, zorder=20)
    axes.scatter(x[-1], y[-1], z[-1], color=colour, marker="s", s=55, zorder=20)


def _draw_frustum(axes: Any, points: Tensor, colour: str, share: float) -> None:
    """A pyramid with a roof on its upper edge, fainter the earlier it is; points as of `frustum`, in the view."""
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    strength = 0.3 + 0.6 * share
    outline = points[[0, 1, 2, 0, 3, 4, 0, 4, 1, 2, 3]]
    axes.plot(*outline.T.tolist(), color=colour, linewidth=0.9, alpha=strength, zorder=10)
    axes.add_collection3d(
        Poly3DCollection([points[1:].tolist()], facecolor=colour, alpha=0.10 + 0.15 * share, linewidth=0, zorder=9)
    )
    up = points[1] - points[4]
    roof = torch.stack([0.7 * points[1] + 0.3 * points[2], 0.3 * points[1] + 0.7 * points[2]])
    top = (points[1] + points[2]) / 2 + 0.25 * up
    triangle = [roof[0].tolist(), roof[1].tolist(), top.tolist()]
    axes.add_collection3d(Poly3DCollection([triangle], facecolor=colour, alpha=strength, linewidth=0, zorder=10))


def _style_space(axes: Any, room: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_box_aspect(room, zoom=1.02)
    axes.set(xlabel="right (x)", ylabel="forward (z)", zlabel="up (-y)")
    for axis, size in zip((axes.xaxis, axes.yaxis, axes.zaxis), room, strict=True):
        axis.set_major_locator(MaxNLocator(max(2, round(6 * size / max(room)))))
        axis.set_pane_color((0.97, 0.97, 0.98, 1.0))
        axis._axinfo["grid"].update(color=(0.85, 0.86, 0.88, 1.0), linewidth=0.7)
    axes.tick_params(labelsize=9)
    axes.view_init(elev=26, azim=-62)
    axes.set_title("dot: first frame, square: last, grey: shadow on the floor", fontsize=10, color=_GREY)
    axes.legend(loc="upper left", frameon=False)
