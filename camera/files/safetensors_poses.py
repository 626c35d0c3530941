"""Safetensors of poses: `extrinsics` [N, 4, 4] and `intrinsics` [4] or [N, 4], divided by the frame's width and height.

OmniCam and RealCam-Vid keep cameras so, world-to-camera, without saying it: direction and axes come from the metadata
or from the user.
"""

from __future__ import annotations

from pathlib import Path

from camera.files.matrices import normalised_intrinsics
from camera.files.path_notes import mapping_notes, notes_of
from camera.files.pose_arrays import path_from_arrays, with_conventions
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath, inverse_poses
from core.files import read_safetensors, save_safetensors


def read_pose_safetensors(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from a safetensors file.

    Args:
        file: with extrinsics, and intrinsics divided by the frame's size.
        settings: direction, axes and fov_degrees count where the file does not say them.
        frames: of the source.

    Raises:
        InputError: a damaged file, or as `path_from_arrays`.
    """
    tensors, metadata = read_safetensors(file)
    arrays = {name: tensor.double() for name, tensor in tensors.items() if not tensor.is_complex()}
    return path_from_arrays(file, arrays, mapping_notes(metadata, file), settings, frames, normalised=True)


def write_pose_safetensors(path: CameraPath, file: Path) -> None:
    """Write any path: extrinsics [T, 4, 4] world-to-camera, intrinsics [4], or [T, 4] where they change, float64."""
    intrinsics = normalised_intrinsics(path)  # [T, 4]
    constant = bool((intrinsics == intrinsics[0]).all())
    tensors = {"extrinsics": inverse_poses(path.c2w), "intrinsics": intrinsics[0] if constant else intrinsics}
    save_safetensors(tensors, file, with_conventions(notes_of(path), path, "w2c").texts())
