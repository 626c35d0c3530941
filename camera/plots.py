"""Pictures of camera paths for people: the cameras in space, and their position and turn over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camera.path import CameraPath
from core.files import atomic_path

_NUM_FRUSTA = 8  # of a path
_FRUSTUM_SHARE = 0.16  # of the largest extent of all paths
_COLOURS = ("#0b6bcb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#5f6368")
_PANELS = ("right (x)", "up (-y)", "forward (z)")


def plot_path(paths: Mapping[str, CameraPath], file: Path | str) -> None:
    """Draw paths over one another into a PNG.

    On the left the cameras in space: the line is the way of the camera, each pyramid is what it sees, from its tip. On
    the right, over time: the position along the three axes, and the angle to the first frame. The first path is drawn
    broad, the others dashed on top of it, so that equal paths show as two.

    Args:
        paths: name in the legend -> path, all in one frame of coordinates.
        file: the PNG to be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    grid = figure.add_gridspec(4, 2, width_ratios=(1.3, 1), wspace=0.12)
    space: Any = figure.add_subplot(grid[:, 0], projection="3d")
    first_panel = figure.add_subplot(grid[0, 1])
    panels = [first_panel, *(figure.add_subplot(grid[row, 1], sharex=first_panel) for row in (1, 2, 3))]
    _draw_space(space, paths)
    _draw_time(panels, paths)
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
    relative = path.rotations[0].T @ path.rotations  # [T, 3, 3]
    axis = torch.stack(
        [
            relative[:, 2, 1] - relative[:, 1, 2],
            relative[:, 0, 2] - relative[:, 2, 0],
            relative[:, 1, 0] - relative[:, 0, 1],
        ],
        -1,
    )  # [T, 3]
    trace = relative.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.atan2(axis.norm(dim=-1), trace - 1))


def _line(index: int) -> dict[str, Any]:
    return {"linewidth": 4, "alpha": 0.6} if index == 0 else {"linewidth": 2, "linestyle": (0, (4, 1))}


def _draw_space(axes: Any, paths: Mapping[str, CameraPath]) -> None:
    from matplotlib.ticker import MaxNLocator
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    positions = torch.cat([path.positions for path in paths.values()])  # [sum T, 3]
    extent = float((positions.amax(0) - positions.amin(0)).max())
    depth = _FRUSTUM_SHARE * extent if extent > 0 else 1.0
    drawn = [to_view(positions)]
    for index, (name, path) in enumerate(paths.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        way = to_view(path.positions)
        axes.plot(*way.T.tolist(), color=colour, label=name, **_line(index))
        chosen = sorted({round(frame) for frame in torch.linspace(0, len(path) - 1, _NUM_FRUSTA).tolist()})
        for frame in chosen:
            points = to_view(frustum(path, frame, depth))  # [5, 3]
            drawn.append(points)
            is_end = frame in (0, len(path) - 1)
            outline = points[[0, 1, 2, 0, 3, 4, 0, 4, 1, 2, 3]]
            axes.plot(*outline.T.tolist(), color=colour, linewidth=0.9, alpha=0.9 if is_end else 0.4)
            if is_end:
                axes.add_collection3d(Poly3DCollection([points[1:].tolist()], facecolor=colour, alpha=0.15))
        axes.scatter(*way[0].tolist(), color=colour, marker="o", s=45)
        axes.scatter(*way[-1].tolist(), color=colour, marker="s", s=45)
    everything = torch.cat(drawn)
    low, high = everything.amin(0), everything.amax(0)
    room = (high - low).clamp_min(0.35 * float((high - low).max()))
    centre = (low + high) / 2
    for letter, middle, size in zip("xyz", centre.tolist(), room.tolist(), strict=True):
        getattr(axes, f"set_{letter}lim")(middle - size / 2, middle + size / 2)
    axes.set_box_aspect(room.tolist())
    axes.set(xlabel=_PANELS[0], ylabel=_PANELS[2], zlabel=_PANELS[1])
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.view_init(elev=28, azim=-65)
    axes.set_title("Cameras in space: dot = first frame, square = last")
    axes.legend(loc="upper left")


def _draw_time(panels: list[Any], paths: Mapping[str, CameraPath]) -> None:
    in_seconds = all(path.fps for path in paths.values())
    for index, path in enumerate(paths.values()):
        colour = _COLOURS[index % len(_COLOURS)]
        time = torch.arange(len(path), dtype=torch.float64) / (path.fps if in_seconds and path.fps else 1)
        curves = [*to_view(path.positions)[:, [0, 2, 1]].T, turn_degrees(path)]
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(time.tolist(), curve.tolist(), color=colour, **_line(index))
    spans = [axes.get_ylim() for axes in panels[:3]]
    widest = max(high - low for low, high in spans)
    for axes, (low, high), label in zip(panels, spans, _PANELS, strict=False):
        axes.set_ylim((low + high - widest) / 2, (low + high + widest) / 2)
        axes.set_ylabel(label)
    panels[0].set_title("Position over time (all three on one scale)")
    panels[3].set_title("Turned away from the first frame")
    panels[3].set_ylabel("degrees")
    panels[3].set_ylim(bottom=0, top=max(5.0, panels[3].get_ylim()[1]))
    panels[3].set_xlabel("seconds" if in_seconds else "frame")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=axes is panels[3])
