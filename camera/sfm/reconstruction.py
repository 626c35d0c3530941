"""Cameras and points solved for together, with pycolmap, by settings for short clips."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from camera.sfm.estimated import EstimatedPath, EstimateFailed, Shape, camera_path, confidence_of, fov_of_focal
from camera.sfm.matching import MIN_MATCHES

Mapper = Literal["incremental", "global"]
MAPPERS: tuple[Mapper, ...] = ("incremental", "global")


def reconstruct(
    pycolmap: ModuleType, folder: Path, num_frames: int, mapper: Mapper, seed: int, *, focal_known: bool
) -> Any:
    """The one model that holds all frames."""
    output = folder / "models"
    output.mkdir()
    options = _mapper_options(pycolmap, mapper, seed, focal_known=focal_known)
    solve = pycolmap.incremental_mapping if mapper == "incremental" else pycolmap.global_mapping
    models = list(solve(folder / "points.db", folder / "frames", output, options).values())
    advice = "; more frames a second, larger frames or the other mapper may help, or leave the clip out"
    if not models:
        raise EstimateFailed(
            f"expected a model of {num_frames} frames, found no two frames to start from: too little parallax, or "
            f"things that move on their own{advice}"
        )
    sizes = sorted((model.num_reg_images() for model in models), reverse=True)
    if sizes[0] < num_frames:
        if len(sizes) > 1:
            raise EstimateFailed(
                f"expected one model of {num_frames} frames, found {len(sizes)} apart from each other, of "
                f"{', '.join(map(str, sizes))} frames{advice}"
            )
        found = {int(Path(models[0].image(i).name).stem) for i in models[0].reg_image_ids()}
        lost = [f"{t}" for t in range(num_frames) if t not in found]
        shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise EstimateFailed(
            f"expected the cameras of {num_frames} frames, found {sizes[0]}; none for frames {shown}{advice}"
        )
    return max(models, key=lambda model: model.num_reg_images())


def _mapper_options(pycolmap: ModuleType, mapper: Mapper, seed: int, *, focal_known: bool) -> Any:
    """Settings for clips: small baselines, few points. The library's defaults are made for photo collections."""
    if mapper == "global":
        options = pycolmap.GlobalPipelineOptions(num_threads=1, random_seed=seed, min_num_matches=MIN_MATCHES)
        options.mapper.num_threads = 1
        options.mapper.random_seed = seed
        options.mapper.rotation_averaging.random_seed = seed
        options.mapper.global_positioning.random_seed = seed
        options.mapper.global_positioning.use_gpu = False
        options.mapper.bundle_adjustment.ceres.use_gpu = False
        options.mapper.bundle_adjustment.ceres.solver_options.num_threads = 1
        options.mapper.bundle_adjustment.refine_focal_length = not focal_known
        return options
    options = pycolmap.IncrementalPipelineOptions(
        num_threads=1,
        random_seed=seed,
        min_num_matches=MIN_MATCHES,
        min_model_size=3,  # so that pieces are seen and counted; the default of 10 hides them
        ba_refine_focal_length=not focal_known,
        ba_refine_extra_params=False,
        extract_colors=False,
    )
    options.mapper.num_threads = 1
    options.mapper.random_seed = seed
    options.triangulation.random_seed = seed
    # 16 degrees and 100 matches by default: a clip of one second seldom turns its points by more than 5.
    options.mapper.init_min_tri_angle = 2.0
    options.mapper.init_min_num_inliers = 40
    options.mapper.abs_pose_min_num_inliers = 15  # 30 by default; small frames have few points
    options.mapper.abs_pose_refine_focal_length = not focal_known
    return options


def moving_path(model: Any, shape: Shape, *, focal_known: bool, parallax: float) -> EstimatedPath:
    """The path of a model that holds all frames, and the figures to judge it by."""
    c2w = np.tile(np.eye(4), (shape.num_frames, 1, 1))
    observations = {}
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        frame = int(Path(image.name).stem)
        w2c = image.cam_from_world().matrix()  # [3, 4]
        c2w[frame, :3, :3] = w2c[:, :3].T
        c2w[frame, :3, 3] = -w2c[:, :3].T @ w2c[:, 3]
        observations[frame] = image
    positions = c2w[:, :3, 3].copy()
    points = np.stack([point.xyz for point in model.points3D.values()]) if model.points3D else np.zeros((0, 3))
    first = observations[0]
    seen = [model.points3D[p.point3D_id].xyz for p in first.get_observation_points2D()]
    if not seen:
        raise EstimateFailed("expected points in front of the first camera, found none; leave the clip out")
    depth = (np.stack(seen) - positions[0]) @ c2w[0, :3, 2]
    relative = np.linalg.inv(c2w[0]) @ c2w
    relative[0] = np.eye(4)
    focal = float(next(iter(model.cameras.values())).focal_length)
    if not focal_known and not 10 < fov_of_focal(focal, shape.width) < 150:
        raise EstimateFailed(
            f"expected a field of view between 10 and 150 degrees, found an estimate of "
            f"{fov_of_focal(focal, shape.width):.0f}; this motion does not tell it: give the field of view"
        )
    angle = _median_angle(points, model, positions)
    error = float(model.compute_mean_reprojection_error())
    poorest = min(image.num_points3D for image in observations.values())
    return EstimatedPath(
        path=camera_path(relative, shape, focal, mean_depth=float(depth[depth > 0].mean())),
        registered=shape.num_frames,
        reprojection_error_pixels=error,
        num_points=len(points),
        rotation_only=False,
        confidence=confidence_of(error / shape.pixel, poorest, angle),
    )


def _median_angle(points: np.ndarray, model: Any, positions: np.ndarray) -> float:
    """Median over the points of the angle in degrees between the rays from the first and last camera that see it."""
    angles = []
    number = {image_id: int(Path(model.image(image_id).name).stem) for image_id in model.reg_image_ids()}
    for point, where in zip(model.points3D.values(), points, strict=True):
        frames = sorted(number[element.image_id] for element in point.track.elements)
        a, b = where - positions[frames[0]], where - positions[frames[-1]]
        cosine = float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)
        angles.append(math.degrees(math.acos(min(1.0, max(-1.0, cosine)))))
    return float(np.median(angles)) if angles else 0.0
