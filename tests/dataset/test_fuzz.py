"""Whatever a file holds, a reader takes it for what it says or names it in one line: by the hundred, always the same.

Valid files are damaged (bytes exchanged, cut out, put in), or made of the right words in the wrong places. Nothing but
InputError comes out; a TOML that is taken means what it says; a cache with a flipped bit is never taken.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_dataset import T5, VAE, World, latents

from camera.files.formats import FORMATS, camera_files, declared_pose_frame, read_camera_file, write_camera, write_ten
from camera.files.settings import CameraFileSettings
from camera.moves.trajectories import orbit
from camera.path import CameraPath
from core.errors import InputError
from core.files import read_safetensors
from dataset import cache
from dataset.cameras import read_clip_camera
from dataset.checksum import KEY, checksum_of
from dataset.clips import Clip, read_excluded
from dataset.config import DatasetConfig, VideoDataset, read_dataset_config
from dataset.keys import KEYS
from dataset.sources import list_sources

EXAMPLES = sorted((Path(__file__).parents[2] / "dataset-toml").glob("*.toml"))
SCRATCH = HealthCheck.function_scoped_fixture  # a folder whose files every example writes anew


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(
        derandomize=True, max_examples=examples, deadline=None, database=None, suppress_health_check=[SCRATCH]
    )


def says_why(error: InputError, *names: Path) -> None:
    """One line, for a person, that names the file."""
    message = str(error)
    assert len(message.splitlines()) == 1, repr(message)
    assert any(str(name) in message for name in names), message


@st.composite
def damages(draw: st.DrawFn, words: tuple[str, ...] = ()) -> Callable[[bytes], bytes]:
    """One to three places of a file where some bytes are something else."""
    piece = st.binary(max_size=8)
    if words:
        piece |= st.sampled_from([word.encode() for word in words])
    cuts = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), piece), min_size=1, max_size=3))

    def damage(content: bytes) -> bytes:
        for place, length, new in cuts:
            start = round(place * len(content))
            content = content[:start] + new + content[start + length :]
        return content

    return damage


# ---- the TOML --------------------------------------------------------------------------------------------------------

MARKS = ('"', "'", '"""', "[", "]", "[[", "]]", "=", "\n", "#", ",", ".", "\\", "{", "}", "\r", "1e999", "-", "nan")
PLACES = ("~no.such.user/x", "a" * 300, "a\0b", "v", "../v", "x/" * 3000)
NUMBERS = st.sampled_from([0, 1, -1, 17, 10**400, 5e-324, 1e308, math.nan, math.inf, True]) | st.integers(1, 96)
VALUES = (
    NUMBERS
    | st.sampled_from([*PLACES, "", ".txt", "head", "full", "uniform", "first", "scene", "metric:2", "tagged", "\x85"])
    | st.lists(NUMBERS, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b"]), NUMBERS, max_size=1)
)


def in_toml(value: Any) -> str:
    if isinstance(value, (bool, str)):
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {in_toml(inner)}" for key, inner in value.items()) + "}"
    return "[" + ", ".join(map(in_toml, value)) + "]" if isinstance(value, list) else repr(value)


def reads_or_says_why(file: Path) -> DatasetConfig | None:
    try:
        return read_dataset_config(file)
    except InputError as error:
        says_why(error, file)
        return None


@fuzzed(150)
@given(st.sampled_from(EXAMPLES), damages(MARKS))
def test_a_damaged_toml(tmp_path: Path, example: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "data.toml"
    file.write_bytes(damage(example.read_bytes()))
    reads_or_says_why(file)


@pytest.mark.parametrize(
    "value", ["1" * 5000, "1" + "0" * 400, "[" * 100_000, '"\\ud800"', "'''\n", "{a = 1, a = 2}", "1\nweight = 1"]
)
def test_tomls_that_parsers_choke_on(tmp_path: Path, value: str) -> None:
    """A number that is too long, brackets too deep, half a character, no end, a key twice."""
    file = tmp_path / "data.toml"
    file.write_text(f"[[datasets]]\nvideo_directory = 'v'\ntarget_frames = [17]\nweight = {value}\n")
    assert reads_or_says_why(file) is None


@pytest.mark.parametrize(
    "line",
    ["target_fps = 5e-324", "source_fps = 1e308", "resolution = [10000000000, 64]\nenable_bucket = true"]
    + ['cache_directory = "~no.such.user/x"', f'cache_directory = "{"a" * 300}"', 'camera_directory = "a\\u0000b"'],
)
def test_values_that_no_machine_can_take(tmp_path: Path, line: str) -> None:
    file = tmp_path / "data.toml"
    file.write_text(f"[[datasets]]\nvideo_directory = 'v'\ntarget_frames = [17]\n{line}\n")
    assert reads_or_says_why(file) is None


@fuzzed(250)
@given(st.data())
def test_a_toml_of_any_values_means_what_it_says_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    keys: dict[str, Any] = {"video_directory": "v", "target_frames": [17]}
    keys |= data.draw(st.dictionaries(st.sampled_from(sorted(KEYS)), VALUES, max_size=2))
    general = data.draw(st.dictionaries(st.sampled_from(sorted(KEYS)), VALUES, max_size=1))
    file = tmp_path / "data.toml"
    tables = {"[general]": general, "[[datasets]]": keys}
    file.write_text(
        "".join(
            f"{table}\n" + "".join(f"{k} = {in_toml(v)}\n" for k, v in found.items()) for table, found in tables.items()
        )
    )
    config = reads_or_says_why(file)
    if config is None:
        return
    (dataset,) = config.datasets
    assert isinstance(dataset, VideoDataset)
    for name in ("num_repeats", "batch_size", "target_frames", "frame_extraction", "enable_bucket", "weight"):
        said = {**general, **keys}.get(name)
        assert getattr(dataset, name) == (KEYS[name].default if said is None else KEYS[name].read(said))
    try:
        list_sources(f"{file}, {dataset.table}", dataset)
        raise AssertionError("a folder that is not there was listed")
    except InputError as error:
        says_why(error, file)


# ---- lists and captions ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("media"))
    world.videos.mkdir()
    for name in ("a", "b"):
        (world.videos / f"{name}.mp4").write_bytes(b"")  # a list looks whether it is there, not what it holds
        (world.videos / f"{name}.txt").write_text("a hall")
    return world


def listing(world: World) -> VideoDataset:
    keys = {"video_directory": None, "camera_directory": None, "video_jsonl_file": str(world.root / "list.jsonl")}
    (dataset,) = read_dataset_config(world.toml(**keys)).datasets
    assert isinstance(dataset, VideoDataset)
    return dataset


def sources_or_why(world: World, content: bytes) -> None:
    """Every line of a list is a source as it stands there, or an error."""
    file = world.root / "list.jsonl"
    file.write_bytes(content)
    try:
        sources = list_sources("data.toml, [[datasets]] 1", listing(world))
    except InputError as error:
        says_why(error, file)
        return
    lines = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    assert [str(source.path) for source in sources] == [str(Path(line["video_path"])) for line in lines]
    for source in sources:
        source.caption.encode()


@fuzzed(150)
@given(damages((*MARKS, "camera", "caption", "\\ud800", "\\u0000", "1" * 5000, "{" * 3000, "/" + "a" * 300, "~b/")))
def test_a_damaged_list(media: World, damage: Callable[[bytes], bytes]) -> None:
    lines = [{"video_path": str(media.videos / f"{name}.mp4"), "caption": "a hall"} for name in "ab"]
    sources_or_why(media, damage("".join(json.dumps(line) + "\n" for line in lines).encode()))


@fuzzed(150)
@given(st.data())
def test_a_list_of_any_values(media: World, data: st.DataObject) -> None:
    value = VALUES | st.sampled_from([str(media.videos / "a.mp4"), "\ud800", "x\r", str(media.videos), None])
    line = st.dictionaries(st.sampled_from(["video_path", "caption", "camera", "x\r"]), value, max_size=3)
    good = {"video_path": str(media.videos / "a.mp4"), "caption": "a hall"}
    lines = [{**good, **data.draw(line)}, *data.draw(st.lists(line | VALUES, max_size=1))]
    sources_or_why(media, "\n".join(map(json.dumps, lines)).encode())


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000, '"\\ud800"', "1e999", "NaN", '"a"} {', '"x\\r"', "[]"])
@pytest.mark.parametrize("key", ["video_path", "caption", "camera"])
def test_lines_that_parsers_choke_on(media: World, key: str, value: str) -> None:
    """A number that is too long, brackets too deep, half a character, no JSON, no text, a path with a line break."""
    good = {"video_path": json.dumps(str(media.videos / "a.mp4")), "caption": '"x"'}
    line = "{" + ", ".join(f'"{name}": {text}' for name, text in {**good, key: value}.items()) + "}"
    sources_or_why(media, line.encode())
    if (key, value) != ("caption", '"x\\r"'):
        with pytest.raises(InputError):
            list_sources("data.toml", listing(media))


def test_a_key_that_stands_twice_in_a_line(media: World) -> None:
    path = json.dumps(str(media.videos / "a.mp4"))
    with pytest.raises(InputError, match=r"line 1: expected every key once, found 'caption' twice"):
        (media.root / "list.jsonl").write_text(f'{{"video_path": {path}, "caption": "a", "caption": "b"}}')
        list_sources("data.toml", listing(media))


TAGS = ("Camera:", "Object:", "<starttime>", "</starttime>", "<sep>", "#trajectory:{", "}", "<", ">", "1e999", "stay")
TAGGED = (
    "Object: a red car ; Camera: <starttime>0</starttime> <endtime>0.25</endtime> <speed>high</speed> "
    "<direction>left</direction> <rotate>stay</rotate> <sep>"
)


@fuzzed(100)
@given(damages(TAGS))
def test_damaged_captions_and_lists_of_exclusions(media: World, damage: Callable[[bytes], bytes]) -> None:
    """Text is text, whatever it says; what is not is named."""
    file = media.videos / "a.txt"
    content = damage(TAGGED.encode())
    file.write_bytes(content)
    (dataset,) = read_dataset_config(media.toml(camera_directory=None)).datasets
    try:
        caption = list_sources("data.toml", dataset)[0].caption
        assert caption in content.decode("utf-8-sig")
    except InputError as error:
        says_why(error, file)
    try:
        assert all(name and "\n" not in name for name in read_excluded(file))
    except InputError as error:
        says_why(error, file)


# ---- camera files ----------------------------------------------------------------------------------------------------

PATH = orbit(30, radius=2.0, num_frames=5, height=60, width=100, fov_degrees=60, fps=16)
SUFFIXES = {"recammaster": ".json", "nerf": ".json", "arrays": ".npz", "safetensors": ".safetensors", "colmap": ""}
OPEN = {"tum": {"fov_degrees": 60.0}, "recammaster": {"fov_degrees": 60.0}}


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good file, or folder, of every format."""
    folder = tmp_path_factory.mktemp("cameras")
    found = {}
    for format in FORMATS:
        found[format] = folder / format / f"a{SUFFIXES.get(format, '.txt')}"
        found[format].parent.mkdir()
        if format == "tagged":
            found[format].write_text(TAGGED)
        else:
            write_camera(PATH, found[format], format=format)
    return found


@pytest.mark.parametrize("format", FORMATS)
@fuzzed(60)
@given(data=st.data())
def test_damaged_camera_files(cameras: dict[str, Path], tmp_path: Path, format: str, data: st.DataObject) -> None:
    """Read by its name and by its content: a path of a camera, or one line that names the file."""
    camera = tmp_path / "damaged" / cameras[format].name
    shutil.rmtree(camera.parent, ignore_errors=True)
    shutil.copytree(cameras[format].parent, camera.parent)
    member = data.draw(st.sampled_from(sorted(camera.iterdir()))) if camera.is_dir() else camera
    member.write_bytes(data.draw(damages((*MARKS, *TAGS, "inf", "0 0 0 0", "\ud7ff")))(member.read_bytes()))
    for name in (format, "auto"):
        asked = CameraFileSettings(format=name, **OPEN.get(format, {}))  # type: ignore[arg-type]
        for count in (5, None):
            try:
                path = read_camera_file(camera, asked, height=60, width=100, fps=16.0, num_frames=count)
                assert isinstance(path, CameraPath) and (path.height, path.width) == (60, 100)
            except InputError as error:
                says_why(error, camera, camera.parent)
    try:
        declared_pose_frame(camera)
    except InputError as error:
        says_why(error, camera, camera.parent)
    assert camera_files(camera)


# ---- caches ----------------------------------------------------------------------------------------------------------

READ = {"latents": cache.read_latents, "text": cache.read_text, "camera": cache.read_camera}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Four clips, two of each of two videos, with all their caches."""
    world = World(tmp_path_factory.mktemp("caches"))
    for name in ("a.mp4", "b.mp4"):
        world.add_video(name)
    other = world.videos / "b.mp4"
    other.write_bytes(other.read_bytes() + b"\0\0\0\x08free")  # another file, of the same frames and size
    write_ten(PATH.resampled(torch.linspace(0, 4, 21, dtype=torch.float64)), world.cameras / "b.txt")
    found = world.clips(target_frames=[5], frame_extraction="uniform", frame_sample=2)
    for number, clip in enumerate(found):
        cache.write_latents(clip, latents(clip, seed=number, channels=4), encoder=VAE, crop=clip.crop)
        cache.write_text(clip, torch.randn(6, 16, generator=torch.Generator().manual_seed(number)), encoder=T5)
        cache.write_camera(clip, read_clip_camera(clip))
    return found


@pytest.fixture(params=READ)
def kind(request: pytest.FixtureRequest) -> cache.Kind:
    return request.param


@pytest.fixture
def good(clips: list[Clip], kind: cache.Kind) -> Iterator[bytes]:
    """The first clip's cache, which stands again after the test."""
    file = cache.cache_path(clips[0], kind)
    content = file.read_bytes()
    yield content
    file.write_bytes(content)


def refused(clip: Clip, kind: cache.Kind) -> bool:
    """Whether reading refuses a cache, in one line that names it; --verify refuses what reading does."""
    file = cache.cache_path(clip, kind)
    flaw = cache.problem(clip, kind) or cache.damage(clip, kind)
    try:
        READ[kind](clip)  # type: ignore[operator]
    except InputError as error:
        says_why(error, file)
        assert clip.key in str(error) and flaw is not None and len(flaw.splitlines()) == 1
        return True
    assert flaw is None
    return False


def test_every_flipped_bit_of_a_cache_is_found(clips: list[Clip], kind: cache.Kind, good: bytes) -> None:
    """One bit of every byte of the header and of every 13th of the data, another one each time."""
    file = cache.cache_path(clips[0], kind)
    data_starts = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(data_starts), *range(data_starts, len(good), 13)]:
        flipped = bytearray(good)
        flipped[place] ^= 1 << (place % 8)
        file.write_bytes(flipped)
        assert refused(clips[0], kind), f"bit {place % 8} of byte {place} of {len(good)}"


@fuzzed(60)
@given(damage=damages(('"', ",", "0", "1", "F32", "F64", "BF16", "[", "]", "checksum")))
def test_damaged_caches(clips: list[Clip], kind: cache.Kind, good: bytes, damage: Callable[[bytes], bytes]) -> None:
    """Taken only where every tensor and every entry is what was written."""
    file = cache.cache_path(clips[0], kind)
    file.write_bytes(good)
    before, said = read_safetensors(file)
    file.write_bytes(damage(good))
    if not refused(clips[0], kind):
        after, says = read_safetensors(file)
        assert says == said and all(torch.equal(before[name], after[name]) for name in before | after)


def test_truncated_caches(clips: list[Clip], kind: cache.Kind, good: bytes) -> None:
    file = cache.cache_path(clips[0], kind)
    for length in range(0, len(good), 61):
        file.write_bytes(good[:length])
        assert refused(clips[0], kind)


def test_exchanged_caches(clips: list[Clip], kind: cache.Kind, good: bytes) -> None:
    """Another clip's cache, of the same shape, and another kind's."""
    file = cache.cache_path(clips[0], kind)
    for clip in clips:
        for other in READ:
            content = cache.cache_path(clip, other).read_bytes()  # type: ignore[arg-type]
            file.write_bytes(good if clip is clips[0] and other == kind else content)
            same = file.read_bytes() == good
            assert refused(clips[0], kind) != same


def test_a_checksum_counts_everything_and_no_order() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(1)}
    entries = {"x": "1", "y": "2"}
    found = checksum_of(tensors, entries)
    assert checksum_of(dict(reversed(tensors.items())), {"y": "2", KEY: found, "x": "1"}) == found
    others = [
        ({**tensors, "a": tensors["a"].view(3, 2)}, entries),
        ({**tensors, "a": tensors["a"].view(torch.int32)}, entries),
        ({"a": tensors["a"], "c": tensors["b"]}, entries),
        ({**tensors, "b": -tensors["b"]}, entries),  # -0.0
        (tensors, {"x": "2", "y": "1"}),
        (tensors, {"x": "1"}),
    ]
    assert len({found, *(checksum_of(*other) for other in others)}) == 1 + len(others)
