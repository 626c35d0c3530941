"""Laws of frame numbers: every mode's windows lie inside the video, and resampling keeps time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.extraction import EXTRACTIONS, fit_length, resample, windows


def starts(found, length):
    return [window.start for window in found if len(window) == length]


def test_head_takes_the_first_frames():
    assert windows(50, lengths=[17, 33], extraction="head") == [range(17), range(33)]


def test_chunk_takes_windows_that_do_not_overlap_and_leaves_the_rest():
    assert windows(50, lengths=[17], extraction="chunk") == [range(0, 17), range(17, 34)]
    assert starts(windows(51, lengths=[17], extraction="chunk"), 17) == [0, 17, 34]


def test_slide_moves_by_its_stride():
    assert starts(windows(50, lengths=[17], extraction="slide", stride=10), 17) == [0, 10, 20, 30]


def test_uniform_spreads_from_the_first_to_the_last_frame():
    assert starts(windows(50, lengths=[17], extraction="uniform", samples=4), 17) == [0, 11, 22, 33]
    assert starts(windows(50, lengths=[17], extraction="uniform", samples=1), 17) == [0]


def test_uniform_cuts_coinciding_windows_once():
    assert starts(windows(18, lengths=[17], extraction="uniform", samples=5), 17) == [0, 1]


def test_full_is_one_window_as_long_as_allowed():
    assert windows(50, lengths=[129], extraction="full") == [range(50)]
    assert windows(50, lengths=[33], extraction="full") == [range(33)]


@given(
    num_frames=st.integers(1, 200),
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    extraction=st.sampled_from(EXTRACTIONS),
    stride=st.integers(1, 40),
    samples=st.integers(1, 6),
)
def test_windows_lie_inside_and_differ(num_frames, lengths, extraction, stride, samples):
    found = windows(num_frames, lengths=lengths, extraction=extraction, stride=stride, samples=samples)
    assert len(set(found)) == len(found)
    assert all(0 <= window.start and window.stop <= num_frames for window in found)
    if extraction != "full":
        assert {len(window) for window in found} == {length for length in lengths if length <= num_frames}


@given(num_frames=st.integers(1, 500), temporal_stride=st.sampled_from([1, 4, 8]))
def test_fitted_lengths_are_the_longest_that_the_vae_takes(num_frames, temporal_stride):
    fit = fit_length(num_frames, temporal_stride)
    assert fit % temporal_stride == 1 % temporal_stride and fit <= num_frames < fit + temporal_stride


@given(
    num_frames=st.integers(1, 400),
    source_fps=st.sampled_from([16.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0]),
    target_fps=st.sampled_from([8.0, 12.5, 16.0]),
)
def test_resampling_stays_within_half_a_frame_of_the_clock(num_frames, source_fps, target_fps):
    frames = resample(num_frames, source_fps=source_fps, target_fps=target_fps)
    assert frames == sorted(set(frames)) and frames[0] == 0 and frames[-1] < num_frames
    for tick, frame in enumerate(frames):
        assert abs(frame / source_fps - tick / target_fps) <= 0.5 / source_fps + 1e-9
    next_tick = len(frames) / target_fps  # the next frame would lie beyond the end
    assert next_tick * source_fps > num_frames - 1


@pytest.mark.parametrize(("source", "target"), [(16.0, 16.0), (29.97, 30.0), (30.0, 29.97), (23.976, 24.0)])
def test_the_same_rate_takes_every_frame(source, target):
    assert resample(300, source_fps=source, target_fps=target) == list(range(300))


def test_half_the_rate_takes_every_second_frame():
    assert resample(7, source_fps=32, target_fps=16) == [0, 2, 4, 6]


def test_no_frame_is_ever_repeated():
    with pytest.raises(ValueError, match="without repeating"):
        resample(10, source_fps=8, target_fps=16)


def test_more_samples_than_there_are_places_are_all_places():
    """At once, however many are asked for."""
    found = windows(25, lengths=[17], extraction="uniform", samples=10**12)
    assert found == windows(25, lengths=[17], extraction="slide", stride=1)
