"""The camera path of a clip: its camera file, taken through the same sampling, resize and crop as its frames."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

from camera.files.formats import read_camera_file
from camera.path import CameraPath
from camera.scale import in_scale
from core.errors import InputError
from dataset.clips import Clip
from dataset.video import list_frames

STRETCHED = 0.03  # how far fx / fy may be from 1 before a person should know

log = logging.getLogger(__name__)


def read_clip_camera(clip: Clip) -> CameraPath:
    """Poses and intrinsics of the frames that `read_clip` returns, in the pose frame and scale of the clip's data set.

    Args:
        clip: from `list_clips`.

    Returns:
        T poses, with intrinsics in pixels of the clip's height x width.

    Raises:
        InputError: the clip has no camera, its file cannot be read, holds another number of poses than the source has
            frames, or says that it holds a motion (pose frame "first") where coordinates of a place are asked for.
    """
    if clip.camera is None:
        raise InputError(
            f"{clip.source}: no camera; name the folder of camera files in the TOML as camera_directory, or, for a "
            f"scene of frames, the file as camera_params"
        )
    crop, settings = clip.crop, clip.camera.settings
    path = read_camera_file(
        clip.camera.path,
        settings,
        height=crop.source_height,
        width=crop.source_width,
        fps=settings.fps or clip.source_fps,
        num_frames=None if settings.fps else clip.num_source_frames,
        frame_names=[file.name for file in list_frames(clip.source)] if clip.source.is_dir() else None,
    )
    stretch = float(path.K[0, 0, 0] / path.K[0, 1, 1])
    if abs(stretch - 1) > STRETCHED:
        _warn_of_stretch(clip.camera.path, f"{stretch:.3f}", f"{crop.source_width}x{crop.source_height}")
    if path.pose_frame == "first" and settings.pose_frame == "scene":
        raise InputError(
            f'{clip.camera.path}: expected coordinates of one place, which pose_frame = "scene" says, found a file of '
            'pose frame "first", a motion that does not say where it starts and cannot be converted; set pose_frame = '
            '"first", or give the poses from which the file was made'
        )
    try:
        path = _at_frames(path, clip).cropped(
            resized_height=crop.resized_height,
            resized_width=crop.resized_width,
            top=crop.top,
            left=crop.left,
            height=crop.height,
            width=crop.width,
        )
        return in_scale(path.relative_to_first() if settings.pose_frame == "first" else path, settings.scale)
    except InputError as error:
        raise InputError(f"{clip.camera.path}: {error}") from None


def _at_frames(path: CameraPath, clip: Clip) -> CameraPath:
    """The poses of the frames with these numbers, or, where poses have a rate of their own, at the frames' times."""
    assert clip.camera is not None
    camera_fps = clip.camera.settings.fps
    if camera_fps is None:
        if len(path) != clip.num_source_frames:
            raise InputError(
                f"expected one pose for each of the {clip.num_source_frames} frames of {clip.source}, found "
                f"{len(path)}; poses of another rate need camera_fps in the TOML"
            )
        return path.frames(clip.frame_indices, fps=clip.fps)
    assert clip.source_fps is not None  # the TOML refuses camera_fps for frames without source_fps
    shown = clip.times or [index / clip.source_fps for index in clip.frame_indices]
    times = torch.tensor(shown, dtype=torch.float64) * camera_fps
    end = (len(path) - 1) / camera_fps
    if float(times[-1]) > len(path) - 1 + 1e-6:
        raise InputError(
            f"expected poses up to frame {clip.frame_indices[-1]} of {clip.source}, at "
            f"{shown[-1]:.3f} s, found {len(path)} that end at {end:.3f} s with "
            f"camera_fps {camera_fps:g}"
        )
    return path.resampled(times, fps=clip.fps)


@functools.cache  # once for a file, not for each of its clips
def _warn_of_stretch(file: Path, stretch: str, size: str) -> None:
    log.warning(
        f"{file}: fx / fy is {stretch} in frames of {size}, where lenses have 1; the file was probably made for frames "
        "of another aspect, and its field of view is wrong along one side"
    )
