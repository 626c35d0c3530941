"""Laws of video files: what is written is what is read, frame by frame, and damage is named."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dataset import smooth_frames

import dataset.clip_frames
from core.errors import InputError
from dataset.buckets import Crop, cover_crop
from dataset.clip_frames import read_clip, read_clips
from dataset.video import decode, list_frames, probe, read_frames, read_image, resize_frame, write_frames, write_video


@pytest.mark.parametrize("num_frames", [1, 2, 17, 40])
def test_a_written_video_is_read_back(tmp_path, num_frames):
    frames = smooth_frames(num_frames)
    write_video(frames, tmp_path / "a.mp4", 16)
    info = probe(tmp_path / "a.mp4")
    assert (info.num_frames, info.fps, info.height, info.width) == (num_frames, 16, 64, 96)
    error = (read_frames(tmp_path / "a.mp4").float() - frames.float()).abs()
    assert error.mean() < 3 and error.max() < 24  # the codec's loss, colour at half resolution included
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_come_in_presentation_order(tmp_path):
    """The encoder stores frames out of order (B frames); brightness that rises with time shows the order read."""
    frames = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(-1, 64, 96, 3) * 4
    write_video(frames, tmp_path / "a.mp4", 16)
    chosen = [3, 4, 11, 12, 13, 40, 59]
    for index, frame in zip(chosen, decode(tmp_path / "a.mp4", chosen), strict=True):
        assert abs(float(frame.mean()) - 4 * index) < 1.5


def test_grey_levels_survive(tmp_path):
    ramp = torch.linspace(0, 255, 96).round().to(torch.uint8)[None, None, :, None].expand(3, 64, -1, 3)
    write_video(ramp, tmp_path / "a.mp4", 16)
    assert (read_frames(tmp_path / "a.mp4").float() - ramp.float()).abs().max() <= 4


@pytest.mark.parametrize("fps", [16, 23.976, 24, 29.97, 30, 7.5])
def test_the_frame_rate_is_kept(tmp_path, fps):
    write_video(smooth_frames(30), tmp_path / "a.mp4", fps)
    assert probe(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-4)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="even.*95x64"):
        write_video(smooth_frames(3, width=95), tmp_path / "a.mp4", 16)
    with pytest.raises(ValueError):
        write_video(smooth_frames(3).float(), tmp_path / "a.mp4", 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_frames_are_written_and_read_back(tmp_path, suffix):
    frames = smooth_frames(12)
    files = write_frames(frames, tmp_path / f"frame_%d{suffix}")
    assert [file.name for file in files][:2] == [f"frame_0{suffix}", f"frame_1{suffix}"]
    assert list_frames(tmp_path) == files  # 2 before 10
    info = probe(tmp_path)
    assert (info.num_frames, info.fps, info.height, info.width) == (12, None, 64, 96)
    assert (read_frames(tmp_path).float() - frames.float()).abs().max() <= (0 if suffix == ".png" else 24)


@pytest.mark.parametrize("pattern", ["a.png", "%d_%d.png", "%05d.gif", "%s.png", "%", "100%_%d.png"])
def test_patterns_need_one_number_and_an_image_suffix(tmp_path, pattern):
    with pytest.raises(InputError, match="%05d.png"):
        write_frames(smooth_frames(2), tmp_path / pattern)
    assert not list(tmp_path.iterdir())


def test_resizing_moves_no_edge():
    """A step edge stays where the plain factor resized / source puts it, without ringing far from it."""
    frame = np.zeros((90, 160, 3), np.uint8)
    frame[:, 80:] = 255
    crop = cover_crop(source_height=90, source_width=160, height=48, width=64)
    small = resize_frame(frame, crop).astype(float)[..., 0] / 255
    edge = crop.width - small.sum(1).mean()  # the dark share of the row, in pixels
    assert edge == pytest.approx(80 * crop.resized_width / 160 - crop.left, abs=0.05)


def test_resizing_is_antialiased():
    """A fine checkerboard becomes grey; without a filter it becomes moire."""
    board = (np.indices((240, 320)).sum(0) % 2 * 255).astype(np.uint8)
    frame = np.repeat(board[..., None], 3, axis=2)
    small = resize_frame(frame, cover_crop(source_height=240, source_width=320, height=64, width=80)).astype(float)
    assert abs(small - 127.5).max() < 12


def test_a_crop_takes_the_pixels_that_it_names():
    frame = smooth_frames(1, height=30, width=40)[0].numpy()
    crop = Crop(
        source_height=30, source_width=40, resized_height=30, resized_width=40, top=3, left=7, height=16, width=20
    )
    assert (resize_frame(frame, crop) == frame[3:19, 7:27]).all()


def test_an_image_is_covered_and_cropped_as_clips_are(tmp_path):
    frame = smooth_frames(1, height=90, width=160)[0]
    (file,) = write_frames(frame[None], tmp_path / "%d.png")
    image = read_image(file, height=48, width=64)
    crop = cover_crop(source_height=90, source_width=160, height=48, width=64)
    assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), resize_frame(frame.numpy(), crop))
    with pytest.raises(InputError, match=r"no\.png"):
        read_image(tmp_path / "no.png", height=48, width=64)


def turned(data: bytes) -> bytes:
    """The mp4 with a display matrix that turns the picture by 90 degrees clockwise, as a phone held upright writes."""
    start = data.index(b"tkhd") + 4 + 40
    one = 0x00010000
    matrix = [0, one, 0, -one, 0, 0, 96 * one, 0, 0x40000000]
    return data[:start] + b"".join((number % 2**32).to_bytes(4, "big") for number in matrix) + data[start + 36 :]


def test_a_video_filmed_upright_is_read_upright(tmp_path):
    frames = smooth_frames(5)
    write_video(frames, tmp_path / "a.mp4", 16)
    (tmp_path / "b.mp4").write_bytes(turned((tmp_path / "a.mp4").read_bytes()))
    info = probe(tmp_path / "b.mp4")
    assert (info.height, info.width) == (96, 64)
    expected = torch.rot90(frames, k=-1, dims=(1, 2))
    assert (read_frames(tmp_path / "b.mp4").float() - expected.float()).abs().mean() < 3


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.7, 0.97])
def test_a_truncated_video_is_named(tmp_path, keep):
    write_video(smooth_frames(40), tmp_path / "a.mp4", 16)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(InputError, match=r"cut\.mp4"):
        probe(tmp_path / "cut.mp4")


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_text("no video at all\n" * 100)
    with pytest.raises(InputError, match=r"a\.mp4.*cannot be decoded"):
        probe(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"b\.mp4.*nothing"):
        probe(tmp_path / "b.mp4")
    (tmp_path / "frames").mkdir()
    with pytest.raises(InputError, match="frames.*none"):
        probe(tmp_path / "frames")


def test_a_video_shorter_than_asked_is_named(tmp_path):
    write_video(smooth_frames(5), tmp_path / "a.mp4", 16)
    with pytest.raises(InputError, match=r"a\.mp4.*at least 8 frames, found 5"):
        list(decode(tmp_path / "a.mp4", [2, 7]))
    files = write_frames(smooth_frames(5), tmp_path / "f" / "%02d.png")
    with pytest.raises(InputError, match="at least 8 frames, found 5"):
        list(decode(tmp_path / "f", [2, 7]))
    files[2].write_bytes(files[2].read_bytes()[:100])
    with pytest.raises(InputError, match=r"02\.png"):
        list(decode(tmp_path / "f", [0, 1, 2]))


def test_sixteen_bit_images_are_refused(tmp_path):
    Image.fromarray(np.full((64, 96), 4000, np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(InputError, match=r"0\.png.*8-bit"):
        probe(tmp_path)


def write_at(times, file) -> None:
    """Frames shown at these times, each as bright as its number says."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "8", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 5 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


UNEVEN = [*np.arange(0, 1, 1 / 25), *np.arange(1, 2.01, 1 / 10)]  # a phone that slows down when it gets dark


def test_an_uneven_clock_is_read(tmp_path):
    write_at(UNEVEN, tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert info.times == pytest.approx(UNEVEN, abs=2e-3) and info.num_frames == len(UNEVEN)
    assert info.fps == pytest.approx((len(UNEVEN) - 1) / UNEVEN[-1], rel=1e-2)
    write_at(np.arange(0, 2, 1 / 25), tmp_path / "b.mp4")
    assert probe(tmp_path / "b.mp4").times is None


def test_frames_of_an_uneven_clock_are_taken_by_their_time(world):
    write_at(UNEVEN, world.videos / "a.mp4")
    (world.videos / "a.txt").write_text("grey")
    (clip,) = [
        clip
        for clip in world.clips(camera_directory=None, target_fps=10, target_frames=[17], resolution=[96, 64])
        if clip.source.name == "a.mp4"
    ]
    for tick, (index, time) in enumerate(zip(clip.frame_indices, clip.times, strict=True)):
        assert time == pytest.approx(UNEVEN[index], abs=2e-3)
        assert abs(time - tick / 10) <= 0.5 / 25 + 2e-3  # the nearest frame there is
    assert clip.fps == 10
    brightness = read_clip(clip)[0].float().mean((1, 2, 3))
    assert (brightness - 5 * torch.tensor(clip.frame_indices)).abs().max() < 4


def test_a_gap_in_an_uneven_clock_is_named(world):
    write_at([*UNEVEN, UNEVEN[-1] + 0.5], world.videos / "a.mp4")
    (world.videos / "a.txt").write_text("grey")
    with pytest.raises(InputError, match=r"a\.mp4 .*uneven rate, none for 0\.500 s after 2\.00 s"):
        world.clips(camera_directory=None, target_fps=10, target_frames=[17])


def test_clips_of_one_video_come_from_one_pass_as_from_many(world, monkeypatch):
    clips = world.clips(target_frames=[5, 9], frame_extraction="slide", frame_stride=3)
    assert len(clips) > 5
    alone = {clip.name: read_clip(clip)[0] for clip in clips}
    passes = []
    once = dataset.clip_frames.decode
    monkeypatch.setattr(dataset.clip_frames, "decode", lambda *given: passes.append(given) or once(*given))
    together = dict((clip.name, frames) for clip, frames in read_clips(clips))
    assert len(passes) == 1 and together.keys() == alone.keys()
    for name, frames in together.items():
        assert torch.equal(frames, alone[name])
