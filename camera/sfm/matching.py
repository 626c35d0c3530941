"""Points found in every frame (SIFT) and matched between frames near in time, with pycolmap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from camera.sfm.estimated import MAX_SIDE_PIXELS, EstimateFailed
from core.errors import InputError

# Matching costs the square of it. A textured frame of 320x192 gives 800 to 1,600 points, far below.
MAX_FEATURES = 4096
# Frames matched with each of the next 10, and with those 16, 32, ... later: long tracks are what holds positions.
OVERLAP = 10
MIN_FEATURES = 40  # in the median frame; below it neighbours share too few to be verified
# Verified matches of a pair. Of two frames of white noise 15 (the library's default) agree by chance now and then.
MIN_MATCHES = 20


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Verified matches of two frames, i < j: pixels [N, 2] in each."""

    i: int
    j: int
    first: np.ndarray
    second: np.ndarray


def write_frames(frames: Iterable, folder: Path) -> tuple[int, int, int]:
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


def find_matches(
    pycolmap: ModuleType, folder: Path, num_frames: int, focal: float, height: int, width: int, seed: int
) -> list[Matches]:
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
            Matches(i=i, j=j, first=first, second=second) if i < j else Matches(i=j, j=i, first=second, second=first)
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


def _require_connected(matches: list[Matches], num_frames: int) -> None:
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
