"""Videos and folders of frames as uint8 tensors, and tensors as H.264 videos and numbered images.

Frames are counted in presentation order, from 0. They are decoded one at a time and reduced to their final size before
the next one is decoded, so memory holds the clip as it will be encoded and one source frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from core.errors import InputError
from core.files import atomic_path
from dataset.buckets import Crop, cover_crop

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
IMAGE_SUFFIXES = (*FRAME_SUFFIXES, ".webp", ".bmp")
UNEVEN = 0.5  # of a frame: rounding to a container's ticks stays far below, a phone's changing rate far above
CONSTANT_RATE_FACTOR = 12  # H.264 quality: below about 17 a viewer sees no difference to the source


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a source holds. `fps` is None for an image and a folder of frames, which have no clock."""

    num_frames: int
    fps: float | None
    height: int
    width: int
    times: tuple[float, ...] | None = None
    """When each frame is shown, in seconds after the first one, where the frames come at an uneven rate; else None."""


def list_frames(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers in their names, so that 2.png comes before 10.png.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of frames, found {'a file' if folder.exists() else 'nothing'}")
    frames = [file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES and not file.name[0] == "."]
    if not frames:
        raise InputError(f"{folder}: expected frames ({', '.join(FRAME_SUFFIXES)}), found none")
    return sorted(frames, key=lambda file: ([int(part) for part in re.findall(r"\d+", file.stem)], file.name))


def probe(source: Path) -> VideoInfo:
    """Count the frames of a video or a folder of frames and measure the first one, without decoding the rest.

    Raises:
        InputError: nothing there, no video, a truncated or damaged file, or a first frame that cannot be decoded.
    """
    if source.is_dir():
        frames = list_frames(source)
        height, width, _ = _read_image(frames[0]).shape
        return VideoInfo(num_frames=len(frames), fps=None, height=height, width=width)
    if source.suffix.lower() in IMAGE_SUFFIXES:
        height, width, _ = _read_image(source).shape
        return VideoInfo(num_frames=1, fps=None, height=height, width=width)
    with _open_video(source) as container:
        stream = _picture_track(container)
        packets = [packet for packet in container.demux(stream) if packet.size]
        if any(packet.is_corrupt for packet in packets) or len(packets) < stream.frames:
            raise InputError(
                f"{source}: expected {max(stream.frames, len(packets))} frames as its header says, found the file cut "
                f"off after {len(packets)}; copy or download it again"
            )
        shown = [packet for packet in packets if not packet.is_discard]
        num_frames = len(shown)
        fps = stream.average_rate or stream.guessed_rate
        times = _uneven_times(shown, float(fps)) if fps else None
    if not num_frames or not fps:
        raise InputError(f"{source}: expected a video, found {num_frames} frames at {fps or 'no'} frames per second")
    height, width, _ = next(decode(source, [0])).shape
    if times is not None and len(times) > 1:
        fps = Fraction((len(times) - 1) / times[-1])  # what the container says of an uneven clock is a guess
    return VideoInfo(num_frames=num_frames, fps=float(fps), height=height, width=width, times=times)


def _uneven_times(packets: Sequence[av.Packet], fps: float) -> tuple[float, ...] | None:
    """Presentation times after the first, where one is further than `UNEVEN` frames from an even clock."""
    stamps = sorted(float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None)
    if len(stamps) != len(packets) or len(stamps) < 3:
        return None
    times = [stamp - stamps[0] for stamp in stamps]
    step = times[-1] / (len(times) - 1)
    if step <= 0 or max(abs(time - index * step) for index, time in enumerate(times)) <= UNEVEN * step:
        return None
    return tuple(times)


def decode(source: Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode chosen frames, one at a time.

    Args:
        source: a video or a folder of frames.
        indices: strictly increasing frame numbers in presentation order.

    Yields:
        RGB, uint8 [H, W, 3], upright where the video says that it was filmed turned.

    Raises:
        InputError: the source cannot be decoded or ends before the last frame asked for.
    """
    if source.is_dir() or source.suffix.lower() in IMAGE_SUFFIXES:
        frames = list_frames(source) if source.is_dir() else [source]
        if indices[-1] >= len(frames):
            raise InputError(f"{source}: expected at least {indices[-1] + 1} frames, found {len(frames)}")
        for index in indices:
            yield _read_image(frames[index])
        return
    wanted = iter(indices)
    index = next(wanted)
    number = -1
    with _open_video(source) as container:
        stream = _picture_track(container)
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise InputError(f"{source}: frame {number} is damaged; copy or download the video again")
            if number == index:
                upright = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
                yield np.ascontiguousarray(upright)
                index = next(wanted, -1)
                if index < 0:
                    return
    raise InputError(f"{source}: expected at least {indices[-1] + 1} frames, found {number + 1} that can be decoded")


def read_frames(source: Path) -> Tensor:
    """All frames of a video or a folder of frames as they are, uint8 [T, H, W, 3]. Raises InputError as `decode`."""
    return torch.stack([torch.from_numpy(frame) for frame in decode(source, range(probe(source).num_frames))])


def resize_frame(frame: np.ndarray, crop: Crop) -> np.ndarray:
    """Resize with an antialiasing Lanczos filter, then crop. uint8 [H, W, 3] -> [crop.height, crop.width, 3]."""
    if (crop.resized_height, crop.resized_width) != frame.shape[:2]:
        image = Image.fromarray(frame).resize((crop.resized_width, crop.resized_height), Image.Resampling.LANCZOS)
        frame = np.array(image)
    return frame[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].copy()


def read_image(file: Path, *, height: int, width: int) -> Tensor:
    """One image, scaled to cover the size and cropped to its centre.

    Args:
        file: PNG or JPEG.
        height: pixels of the result.
        width: pixels of the result.

    Returns:
        RGB, uint8 [H, W, 3].

    Raises:
        InputError: nothing there, or no image.
    """
    if not file.is_file():
        raise InputError(f"{file}: expected an image, found nothing")
    image = _read_image(file)
    crop = cover_crop(source_height=image.shape[0], source_width=image.shape[1], height=height, width=width)
    return torch.from_numpy(resize_frame(image, crop))


def write_video(frames: Tensor, path: Path | str, fps: float) -> None:
    """Write an H.264 mp4 (yuv420p, BT.709), atomically.

    Args:
        frames: RGB, uint8 [T, H, W, 3]; H and W even, because colour is stored for every second pixel.
        path: usually NAME.mp4; the container is mp4 whatever the suffix.
        fps: frames per second.

    Raises:
        InputError: odd height or width.
    """
    num_frames, height, width = _require_frames(frames)
    if height % 2 or width % 2:
        raise InputError(f"{path}: expected an even width and height for H.264 video, found {width}x{height}")
    rate = Fraction(fps).limit_denominator(1001)
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", container_options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(CONSTANT_RATE_FACTOR)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # 16..235
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frames[number].cpu().numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_frames(frames: Tensor, pattern: Path | str) -> list[Path]:
    """Write every frame as an image, each atomically.

    Args:
        frames: RGB, uint8 [T, H, W, 3].
        pattern: a path with one number field, such as "out/%05d.png"; frame 0 becomes out/00000.png.

    Returns:
        The files written.

    Raises:
        InputError: no number field, more than one, or a suffix that is not .png, .jpg or .jpeg.
    """
    num_frames, _, _ = _require_frames(frames)
    pattern = Path(pattern)
    fields = re.findall(r"%(?:0?[1-9])?d", pattern.name)
    if len(fields) != 1 or pattern.name.count("%") != 1 or pattern.suffix.lower() not in FRAME_SUFFIXES:
        raise InputError(
            f"{pattern}: expected a pattern with one number field and an image suffix, such as frames/%05d.png"
        )
    files = [pattern.with_name(pattern.name % number) for number in range(num_frames)]
    for frame, file in zip(frames, files, strict=True):
        with atomic_path(file) as temporary:
            Image.fromarray(frame.cpu().numpy()).save(temporary, quality=95)
    return files


def _require_frames(frames: Tensor) -> tuple[int, int, int]:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"expected frames uint8 [T, H, W, 3], found {frames.dtype} {[*frames.shape]}")
    return frames.shape[0], frames.shape[1], frames.shape[2]


@contextmanager
def _open_video(source: Path) -> Iterator[InputContainer]:
    """An opened container with a video stream; whatever ffmpeg says inside the block becomes an error with a name."""
    if not source.is_file():
        raise InputError(f"{source}: expected a video, found nothing")
    try:
        with av.open(str(source)) as container:
            if container.streams.best("video") is None:
                raise InputError(f"{source}: expected a video, found a file without a picture track")
            yield container
    except av.FFmpegError as error:
        raise InputError(f"{source}: cannot be decoded ({error.strerror}); copy or convert the video again") from None


def _picture_track(container: InputContainer) -> av.VideoStream:
    """The film itself, where a cover picture is stored as a second track."""
    stream = container.streams.best("video")
    assert isinstance(stream, av.VideoStream)
    return stream


def _read_image(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode not in ("L", "P", "RGB", "RGBA"):
                raise InputError(f"{file}: expected 8-bit colour or grey, found mode {image.mode}; convert the frames")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))  # upright, where a camera turned it
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: cannot be decoded as an image ({error}); write the frame again") from None
