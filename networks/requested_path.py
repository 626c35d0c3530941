"""The camera path that a user asks a network to follow: from a file or from words, in the conventions it learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from camera.conventions import in_conventions
from camera.files.formats import declared_pose_frame, read_camera_file
from camera.files.settings import CameraFileSettings
from camera.moves.text import make_path
from camera.path import CameraPath
from core.errors import InputError
from networks.video_settings import Settings


@dataclass(frozen=True, kw_only=True)
class CameraRequest:
    """Which path to film along. At most one of `file` and `moves` is given.

    Args:
        file: a camera file.
        file_settings: how it is read.
        moves: camera moves in words, "orbit 60deg; dolly in 0.5".
        num_frames: of the video, where the user named it; a file must then have as many poses.
        fov_degrees: horizontal field of view of `moves`; None: 60, or that of the presets in it.
        mean_depth: mean distance of what the first camera sees, in the path's units; None: what the file says.
    """

    file: Path | None = None
    file_settings: CameraFileSettings = CameraFileSettings()
    moves: str | None = None
    num_frames: int | None = None
    fov_degrees: float | None = None
    mean_depth: float | None = None


def requested_path(
    request: CameraRequest, settings: Settings, metadata: Mapping[str, str], *, network: str
) -> CameraPath | None:
    """The path in the pose frame and scale that the network learnt.

    Args:
        request: what the user gave.
        settings: size, rate and seed of the video, and the number of frames of a path in words.
        metadata: of the network that hears the path; empty without one.
        network: its file's name, "" without one.

    Returns:
        The path, of as many frames as the file has poses; None where none is asked for.

    Raises:
        InputError: two paths, a network that hears no camera, words for a network of one place, a file that cannot be
            read or that says it holds something else than the network learnt.
    """
    if request.file is None and request.moves is None:
        return None
    flag = "--camera_params" if request.moves is None else "--camera_path"
    if request.file is not None and request.moves is not None:
        raise InputError("--camera_params --camera_path: expected one camera path, found two; leave one out")
    if not network:
        raise InputError(f"{flag}: only a network with a camera follows a path; give --network_weights")
    if not metadata.get("injection"):
        raise InputError(f"{network}: has no camera encoder, so {flag} has nothing to act on")
    pose_frame, scale_rule = metadata["pose_frame"], metadata["scale_rule"]
    declared = None
    if request.moves is not None:
        if pose_frame != "first":
            raise InputError(
                f'--camera_path: expected a network of pose frame "first", because words describe a motion, found '
                f"{network}, which learnt where to stand in one place; give --camera_params with poses of that place"
            )
        name = flag
        path = make_path(
            request.moves,
            num_frames=settings.num_frames,
            height=settings.height,
            width=settings.width,
            fov_degrees=request.fov_degrees,
            fps=settings.fps,
            seed=settings.seed,
        )
    else:
        assert request.file is not None
        name, declared = str(request.file), declared_pose_frame(request.file)
        path = read_camera_file(
            request.file,
            request.file_settings,
            height=settings.height,
            width=settings.width,
            fps=settings.fps,
            num_frames=request.num_frames,
        )
        if request.num_frames not in (None, len(path)):
            raise InputError(
                f"{name}: expected a pose for each of the {request.num_frames} frames of --video_length, found "
                f"{len(path)} poses; leave the flag out to get one frame per pose"
            )
    return in_conventions(
        path,
        name=name,
        declared=declared,
        pose_frame=pose_frame,
        scale_rule=scale_rule,
        mean_depth=request.mean_depth,
    )


def unused(request: CameraRequest, settings: Settings, metadata: Mapping[str, str]) -> list[str]:
    """What is given and does nothing, or less than one may hope; one line each."""
    notes = []
    has_path = request.file is not None or request.moves is not None
    if metadata.get("injection") and not has_path:
        notes.append("without --camera_params or --camera_path the network's camera encoder is not used")
    if settings.camera_guidance != 1 and not has_path:
        notes.append("without a camera path --camera_guidance does nothing")
    elif settings.camera_guidance != 1 and not float(metadata.get("camera_dropout", 0)):
        notes.append(
            "the network was trained without camera_dropout and does not know what no camera looks like; "
            "--camera_guidance may do harm"
        )
    if request.fov_degrees is not None and request.moves is None:
        notes.append("--fov is for --camera_path; here it changes nothing (--camera_fov is for camera files)")
    if request.file_settings != CameraFileSettings() and request.file is None:
        notes.append("flags about the camera file change nothing without --camera_params")
    if request.mean_depth is not None and (not has_path or metadata.get("scale_rule") != "mean_depth"):
        notes.append("--camera_depth acts on a path for a network of scale rule mean_depth; here it changes nothing")
    return notes
