"""The camera path of a clip: its camera file, taken through the same sampling, resize and crop as its frames."""

from __future__ import annotations

from camera.formats import read_camera
from camera.path import CameraPath
from core.errors import InputError
from dataset.clips import Clip


def read_clip_camera(clip: Clip) -> CameraPath:
    """Poses and intrinsics of the frames that `read_clip` returns, in the pose frame of the clip's data set.

    Args:
        clip: from `list_clips`.

    Returns:
        T poses, with intrinsics in pixels of the clip's height x width.

    Raises:
        InputError: the clip has no camera, its file cannot be read, or the file has another number of poses than the
            source has frames.
    """
    if clip.camera is None:
        raise InputError(
            f"{clip.source}: no camera; name the folder of camera files in the TOML as camera_directory, or, for a "
            f"scene of frames, the file as camera_params"
        )
    crop, settings = clip.crop, clip.camera.settings
    path = read_camera(
        clip.camera.path,
        height=crop.source_height,
        width=crop.source_width,
        fov_axis=settings.fov_axis,
        format=settings.format,
    )
    if len(path) != clip.num_source_frames:
        raise InputError(
            f"{clip.camera.path}: expected one pose for each of the {clip.num_source_frames} frames of {clip.source}, "
            f"found {len(path)}"
        )
    path = path.frames(clip.frame_indices, fps=clip.fps).cropped(
        resized_height=crop.resized_height,
        resized_width=crop.resized_width,
        top=crop.top,
        left=crop.left,
        height=crop.height,
        width=crop.width,
    )
    return path.relative_to_first() if settings.pose_frame == "first" else path
