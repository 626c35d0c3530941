"""Cameras from the pictures alone: structure from motion with pycolmap, tuned for short clips of small frames.

Points are found in every frame (SIFT), matched between frames near in time, and cameras and points are solved for
together. The result is known up to a similarity: where the world's origin is, which way is up and how long a unit is
cannot be seen in pictures. All runs on the CPU in one thread with fixed seeds, so a clip gives the same path twice.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from camera.path import CameraPath
from camera.rotation_only import chain_rotations, fit_rotation, rotation_residual
from core.errors import InputError, listing

Mapper = Literal["incremental", "global"]
MAPPERS: tuple[Mapper, ...] = ("incremental", "global")

ESTIMATOR = "1"  # of the settings below and in `_mapper_options`; a change that moves paths raises it

# Frames are searched at this size at most: time grows with the pixels, and a path seldom needs finer points.
MAX_SIDE_PIXELS = 1024
# Matching costs the square of it. A textured frame of 320x192 gives 800 to 1,600 points, far below.
MAX_FEATURES = 4096
# Frames matched with each of the next 10, and with those 16, 32, ... later: long tracks are what holds positions.
OVERLAP = 10
MIN_FEATURES = 40  # in the median frame; below it neighbours share too few to be verified
# Verified matches of a pair. Of two frames of white noise 15 (the library's default) agree by chance now and then.
MIN_MATCHES = 20
# Median distance in pixels. SIFT finds a point again to 0.1 to 0.3 pixels, in compressed video to 0.5.
STILL_PIXELS = 0.3  # matches that move less: the camera stands still
ROTATION_ONLY_PIXELS = 0.4  # matches that a rotation predicts to this: there is no parallax
# The confidence is full from these on; see `EstimatedPath`.
GOOD_ERROR_PIXELS, GOOD_OBSERVATIONS, GOOD_ANGLE_DEGREES = 1.0, 100, 2.0
GUESSED_FOV_DEGREES = 60.0  # where the search for an unknown focal length starts


class EstimateFailed(InputError):
    """The camera of a clip cannot be found; the message says what was found instead and what helps."""


@dataclass(frozen=True, kw_only=True)
class EstimatedPath:
    """The camera of a clip and how far to trust it.

    Args:
        path: pose frame "first". The unit of positions is arbitrary and another one for every clip; `path.mean_depth`
            is known unless the camera only turns.
        registered: frames whose camera was found; always all of them, since a clip with fewer fails.
        reprojection_error_pixels: mean distance between points as found and as predicted, in pixels of the frames.
        num_points: points of the scene that the path rests on; for a camera that only turns, matches between
            neighbouring frames.
        rotation_only: the camera turns on the spot: positions are exactly zero because the pictures show no parallax.
        confidence: from 0 to 1, the product of min(1, 1 / error in working pixels), min(1, points seen in the poorest
            frame / 100) and, unless rotation_only, min(1, median angle between the outermost rays of a point / 2
            degrees). Working pixels are those of the frame reduced to 1024 on its longer side. It grades the evidence
            and is no probability.
    """

    path: CameraPath
    registered: int
    reprojection_error_pixels: float
    num_points: int
    rotation_only: bool
    confidence: float


@dataclass(frozen=True, kw_only=True)
class _Matches:
    """Verified matches of two frames, i < j: pixels [N, 2] in each."""

    i: int
    j: int
    first: np.ndarray
    second: np.ndarray


def estimate_path(
    frames: Iterable[np.ndarray] | np.ndarray | torch.Tensor,
    *,
    fov_degrees: float | None = None,
    focal: float | None = None,
    fps: float | None = None,
    mapper: Mapper = "incremental",
    seed: int = 0,
    work: Path | None = None,
) -> EstimatedPath:
    """Find the camera of every frame of a clip.

    Costs 15 to 30 s on one busy core for 25 frames of 320x192, about half of it for finding and matching points.

    Args:
        frames: RGB, uint8, each [H, W, 3], at least 3 of one size; an array [T, H, W, 3], or what yields frames.
        fov_degrees: horizontal field of view where it is known; it is then kept. 0 < fov < 180.
        focal: the same as a focal length in pixels of these frames; not both.
            With neither, one focal length is estimated for the whole clip, which needs sideways motion and depth.
        fps: written into the path.
        mapper: "incremental" adds frame after frame; "global" (GLOMAP) solves for all at once.
        seed: of the random samples of robust fits, >= 0.
        work: folder for the temporary database; the system's where None. It is removed in every case.

    Returns:
        The path and the figures to judge it by. Pixels are square and the principal point is the frame's centre.

    Raises:
        EstimateFailed: too little texture, a cut, a camera that stands still, no parallax while the focal length is
            unknown, frames without a camera, several pieces.
        InputError: pycolmap is not installed, or an argument is out of range.

    Source: J. L. Schoenberger, J.-M. Frahm, "Structure-from-Motion Revisited", CVPR 2016; L. Pan et al., "Global
        Structure-from-Motion Revisited" (GLOMAP), ECCV 2024.
    """
    _check(fov_degrees=fov_degrees, focal=focal, mapper=mapper, seed=seed)
    pycolmap = _pycolmap()
    with _quiet(pycolmap), tempfile.TemporaryDirectory(prefix="estimate-", dir=work) as folder:
        height, width, num_frames = _write_frames(frames, Path(folder) / "frames")
        known = focal is not None or fov_degrees is not None
        if focal is None:
            focal = _focal(fov_degrees or GUESSED_FOV_DEGREES, width)
        pycolmap.set_random_seed(seed)
        matches = _match(pycolmap, Path(folder), num_frames, focal, height, width, seed)
        shape = _Shape(num_frames=num_frames, height=height, width=width, fps=fps)
        still = _median_motion(matches)
        if still < STILL_PIXELS * shape.pixel:
            raise EstimateFailed(
                f"expected a camera that moves, found one that stands still: matched points move by {still:.2f} pixels "
                "at most; a clip without camera motion has no path to estimate, leave it out"
            )
        parallax, turning_focal = _parallax(matches, shape, focal, known=known)
        if parallax < ROTATION_ONLY_PIXELS * shape.pixel:
            if not known:
                raise EstimateFailed(
                    f"expected parallax, found a camera that only turns (a rotation explains all matches to "
                    f"{parallax:.2f} pixels), from which the focal length cannot be told well; give the field of view "
                    f"(this motion fits one near {_fov(turning_focal, width):.0f} degrees)"
                )
            return _turning(matches, shape, focal)
        reconstruction = _reconstruct(pycolmap, Path(folder), num_frames, mapper, seed, focal_known=known)
        return _result(reconstruction, shape, focal_known=known, parallax=parallax)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What all frames share."""

    num_frames: int
    height: int
    width: int
    fps: float | None

    @property
    def pixel(self) -> float:
        """A working pixel in pixels of the frames: more than 1 where frames are reduced before the search."""
        return max(1.0, max(self.height, self.width) / MAX_SIDE_PIXELS)

    def intrinsics(self, focal: float) -> np.ndarray:
        """K in pixels, [3, 3]."""
        return np.array([[focal, 0, self.width / 2], [0, focal, self.height / 2], [0, 0, 1]])


def _check(*, fov_degrees: float | None, focal: float | None, mapper: str, seed: int) -> None:
    if fov_degrees is not None and focal is not None:
        raise InputError("estimate: expected a field of view or a focal length, found both; give one")
    if fov_degrees is not None and not 0 < fov_degrees < 180:
        raise InputError(f"estimate: expected a field of view between 0 and 180 degrees, found {fov_degrees}")
    if focal is not None and not 0 < focal < math.inf:
        raise InputError(f"estimate: expected a focal length above 0 pixels, found {focal}")
    if mapper not in MAPPERS:
        raise InputError(f"estimate: expected the mapper {' or '.join(MAPPERS)}, found {mapper!r}")
    if seed < 0:
        raise InputError(f"estimate: expected a seed of at least 0, found {seed}")


def estimator_version() -> str:
    """What paths depend on besides frames and arguments: our settings and the library. Raises InputError without it."""
    return f"{ESTIMATOR} pycolmap {_pycolmap().__version__}"


def _pycolmap() -> ModuleType:
    try:
        import pycolmap
    except ImportError:
        raise InputError(
            "estimating cameras needs pycolmap, which is not installed; run pip install '.[sfm]' in this folder"
        ) from None
    return pycolmap


@contextmanager
def _quiet(pycolmap: ModuleType) -> Iterator[None]:
    """Without the library's log, which reports every step; what fails is said by our own errors."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = 3
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before


def _focal(fov_degrees: float, width: int) -> float:
    return width / 2 / math.tan(math.radians(fov_degrees) / 2)


def _fov(focal: float, width: int) -> float:
    return math.degrees(2 * math.atan(width / 2 / focal))


# ---- frames, points, matches -----------------------------------------------------------------------------------------


def _write_frames(frames: Iterable, folder: Path) -> tuple[int, int, int]:
    """Frames as images 000000.png, ... for the library to read; height, width and number of them."""
    folder.mkdir()
    size, count = None, 0
    for frame in frames:
        pixels = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"expected frames uint8 [H, W, 3], found {pixels.dtype} {[*pixels.shape]}")
        size = size or pixels.shape[:2]
        if pixels.shape[:2] != size:
            raise InputError(
                f"estimate: expected frames of {size[1]}x{size[0]} like the first, found {pixels.shape[1]}x"
                f"{pixels.shape[0]} in frame {count}"
            )
        Image.fromarray(pixels).save(folder / _name(count), compress_level=1)
        count += 1
    if size is None or count < 3:
        raise EstimateFailed(f"expected at least 3 frames, found {count}; longer clips give better paths")
    return size[0], size[1], count


def _name(frame: int) -> str:
    return f"{frame:06d}.png"


def _match(
    pycolmap: ModuleType, folder: Path, num_frames: int, focal: float, height: int, width: int, seed: int
) -> list[_Matches]:
    """Find and match points; the verified matches of all pairs. They also stay in the database for the mapper."""
    database = folder / "points.db"
    pycolmap.extract_features(
        database,
        folder / "frames",
        camera_mode=pycolmap.CameraMode.SINGLE,
        reader_options=pycolmap.ImageReaderOptions(
            camera_model="SIMPLE_PINHOLE", camera_params=f"{focal!r},{width / 2},{height / 2}"
        ),
        extraction_options=pycolmap.FeatureExtractionOptions(
            num_threads=1,
            use_gpu=False,
            max_image_size=MAX_SIDE_PIXELS,
            sift=pycolmap.SiftExtractionOptions(max_num_features=MAX_FEATURES),
        ),
        device=pycolmap.Device.cpu,
    )
    verification = pycolmap.TwoViewGeometryOptions(min_num_inliers=MIN_MATCHES)
    verification.ransac.random_seed = seed
    pycolmap.match_sequential(
        database,
        matching_options=pycolmap.FeatureMatchingOptions(num_threads=1, use_gpu=False),
        pairing_options=pycolmap.SequentialPairingOptions(overlap=OVERLAP, quadratic_overlap=True, num_threads=1),
        verification_options=verification,
        device=pycolmap.Device.cpu,
    )
    with _opened(pycolmap, database) as opened:
        number = {image.image_id: int(Path(image.name).stem) for image in opened.read_all_images()}
        points = {image: np.asarray(opened.read_keypoints(image), np.float64)[:, :2] for image in number}
        pair_ids, geometries = opened.read_two_view_geometries()
    counts = np.array([len(found) for found in points.values()])
    if len(counts) < num_frames or np.median(counts) < MIN_FEATURES:
        found = int(np.median(counts)) if len(counts) else 0
        raise EstimateFailed(
            f"expected at least {MIN_FEATURES} points to follow in a frame, found {found}; the pictures "
            "are too plain, too small or too blurred: take larger frames, or leave the clip out"
        )
    matches = []
    for pair_id, geometry in zip(pair_ids, geometries, strict=True):
        one, two = pycolmap.pair_id_to_image_pair(pair_id)
        if len(inliers := geometry.inlier_matches) < MIN_MATCHES:
            continue
        first, second = points[one][inliers[:, 0]], points[two][inliers[:, 1]]
        i, j = number[one], number[two]
        matches.append(
            _Matches(i=i, j=j, first=first, second=second) if i < j else _Matches(i=j, j=i, first=second, second=first)
        )
    _require_connected(matches, num_frames)
    return sorted(matches, key=lambda match: (match.i, match.j))


@contextmanager
def _opened(pycolmap: ModuleType, file: Path) -> Iterator[Any]:
    database = pycolmap.Database.open(str(file))
    try:
        yield database
    finally:
        database.close()


def _require_connected(matches: list[_Matches], num_frames: int) -> None:
    """Every frame hangs together with every other through matches, or the clip falls apart at a frame."""
    spanned = np.zeros(num_frames - 1, bool)  # between frames t and t + 1
    for match in matches:
        spanned[match.i : match.j] = True
    if not spanned.any():
        raise EstimateFailed(
            "expected frames that show the same things, found no two frames with enough points in common; the pictures "
            "are noise, too blurred or too far apart: take more frames a second, or leave the clip out"
        )
    gaps = np.flatnonzero(~spanned)
    if len(gaps):
        where = ", ".join(f"{gap} and {gap + 1}" for gap in gaps[:4])
        raise EstimateFailed(
            f"expected one shot, found {len(gaps)} break(s): nothing is seen on both sides of frames {where} (counted "
            "from 0); cut the video there, or leave the clip out"
        )


# ---- what the matches say before anything is reconstructed -----------------------------------------------------------


def _median_motion(matches: list[_Matches]) -> float:
    """How far points move, in pixels: the median of a pair, the largest of all pairs."""
    return max(float(np.median(np.linalg.norm(match.first - match.second, axis=1))) for match in matches)


def _parallax(matches: list[_Matches], shape: _Shape, focal: float, *, known: bool) -> tuple[float, float]:
    """What the best rotation leaves unexplained, pixels (median of a pair, largest of all pairs), and its focal length.

    An unknown focal length is searched for, so that a camera that turns is not taken for one that moves.
    """
    focals = [focal] if known else [_focal(fov, shape.width) for fov in range(30, 105, 5)]
    parallax = {candidate: _unexplained(matches, shape.intrinsics(candidate)) for candidate in focals}
    best = min(parallax, key=lambda candidate: parallax[candidate])
    return parallax[best], best


def _unexplained(matches: list[_Matches], K: np.ndarray) -> float:
    return max(
        float(np.median(rotation_residual(m.first, m.second, K, fit_rotation(m.first, m.second, K)))) for m in matches
    )


def _turning(matches: list[_Matches], shape: _Shape, focal: float) -> EstimatedPath:
    """The path of a camera that turns on the spot: rotations between neighbours, chained."""
    K = shape.intrinsics(focal)
    steps = {match.i: match for match in matches if match.j == match.i + 1}
    missing = [str(t) for t in range(shape.num_frames - 1) if t not in steps]
    if missing:
        raise EstimateFailed(
            f"expected matches from each frame to the next of a camera that only turns, found none after frame "
            f"{listing(missing)}; take more frames a second, or leave the clip out"
        )
    ordered = [steps[t] for t in range(shape.num_frames - 1)]
    rotations = np.stack([fit_rotation(step.first, step.second, K) for step in ordered])
    errors = [
        rotation_residual(step.first, step.second, K, rotation)
        for step, rotation in zip(ordered, rotations, strict=True)
    ]
    c2w = np.tile(np.eye(4), (shape.num_frames, 1, 1))
    c2w[:, :3, :3] = chain_rotations(rotations)
    error = float(np.mean([np.median(error) for error in errors]))
    fewest = min(len(step.first) for step in ordered)
    return EstimatedPath(
        path=_path(c2w, shape, focal, mean_depth=None),
        registered=shape.num_frames,
        reprojection_error_pixels=error,
        num_points=sum(len(step.first) for step in ordered),
        rotation_only=True,
        confidence=_confidence(error / shape.pixel, fewest, None),
    )


# ---- cameras and points ----------------------------------------------------------------------------------------------


def _reconstruct(
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


def _result(model: Any, shape: _Shape, *, focal_known: bool, parallax: float) -> EstimatedPath:
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
    if not focal_known and not 10 < _fov(focal, shape.width) < 150:
        raise EstimateFailed(
            f"expected a field of view between 10 and 150 degrees, found an estimate of "
            f"{_fov(focal, shape.width):.0f}; this motion does not tell it: give the field of view"
        )
    angle = _median_angle(points, model, positions)
    error = float(model.compute_mean_reprojection_error())
    poorest = min(image.num_points3D for image in observations.values())
    return EstimatedPath(
        path=_path(relative, shape, focal, mean_depth=float(depth[depth > 0].mean())),
        registered=shape.num_frames,
        reprojection_error_pixels=error,
        num_points=len(points),
        rotation_only=False,
        confidence=_confidence(error / shape.pixel, poorest, angle),
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


def _confidence(error_pixels: float, observations: int, angle_degrees: float | None) -> float:
    """See `EstimatedPath`."""
    confidence = min(1.0, GOOD_ERROR_PIXELS / max(error_pixels, 1e-9)) * min(1.0, observations / GOOD_OBSERVATIONS)
    return confidence if angle_degrees is None else confidence * min(1.0, angle_degrees / GOOD_ANGLE_DEGREES)


def _path(c2w: np.ndarray, shape: _Shape, focal: float, *, mean_depth: float | None) -> CameraPath:
    rotations = c2w[:, :3, :3]
    u, _, vt = np.linalg.svd(rotations)
    c2w[:, :3, :3] = u @ vt  # takes away the rounding of products
    K = torch.from_numpy(shape.intrinsics(focal)).expand(shape.num_frames, 3, 3).clone()
    return CameraPath(
        c2w=torch.from_numpy(c2w),
        K=K,
        height=shape.height,
        width=shape.width,
        fps=shape.fps,
        pose_frame="first",
        mean_depth=mean_depth,
    )
