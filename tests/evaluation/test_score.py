"""Scores: what an estimator finds is compared in the asked frame, failures are counted, files hold it all."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from camera.path import CameraPath
from evaluation import score
from evaluation.estimators import Recovered, RenderEstimator, SfmEstimator, as_path
from evaluation.score import Comparison, plot_recovered, score_video, summarise, write_scores
from scenes.motion import film
from scenes.scene import make_scene

FRAMES = torch.zeros(5, 16, 24, 3, dtype=torch.uint8)
ABSOLUTE, RELATIVE = Comparison(pose_frame="scene", scale="none"), Comparison(pose_frame="first")


class Told:
    """An estimator that finds what it is told."""

    absolute = True

    def __init__(self, recovered: Recovered) -> None:
        self.recovered = recovered

    def recover(self, frames, K):
        return self.recovered


class Finder:
    """A stand-in for the alignment: one pose everywhere, with an error of its own."""

    def __init__(self, error: float) -> None:
        self.error = error

    def recover(self, frames, *, K, start):
        return torch.eye(4, dtype=torch.float64).repeat(len(frames), 1, 1), self.error


@pytest.fixture(scope="module")
def asked() -> CameraPath:
    return film(make_scene(0), 1, num_frames=5, height=16, width=24, move="truck")


def test_frames_of_comparison(asked):
    moved = asked.c2w.clone()
    moved[:, 0, 3] += 0.5
    right, shifted = Told(Recovered(c2w=asked.c2w)), Told(Recovered(c2w=moved))
    assert score_video("a", FRAMES, asked, right, ABSOLUTE)[0].errors.trans_err_mean == 0
    assert score_video("a", FRAMES, asked, shifted, ABSOLUTE)[0].errors.trans_err_mean == pytest.approx(0.5)
    assert score_video("a", FRAMES, asked, shifted, RELATIVE)[0].errors.trans_err_mean == pytest.approx(0, abs=1e-9)


def times(factor: float, c2w: torch.Tensor) -> torch.Tensor:
    """The path with its positions times a factor."""
    scaled = c2w.clone()
    scaled[:, :3, 3] *= factor
    return scaled


def test_a_scale_is_matched_only_where_it_is_asked_for(asked):
    """In the coordinates of the place metres are compared with metres, whatever the scale says."""
    twice, distance = Told(Recovered(c2w=times(2, asked.c2w))), asked.positions.norm(dim=-1).mean()
    in_place = score_video("a", FRAMES, asked, twice, Comparison(pose_frame="scene"))[0].errors
    assert in_place.trans_err_mean == pytest.approx(float(distance))
    unmatched = score_video("a", FRAMES, asked, twice, Comparison(pose_frame="first", scale="none"))[0].errors
    moved = (asked.positions - asked.positions[0]).norm(dim=-1).mean()
    assert unmatched.trans_err_mean == pytest.approx(float(moved))
    for scale in ("max", "lstsq"):
        errors = score_video("a", FRAMES, asked, twice, Comparison(pose_frame="first", scale=scale))[0].errors
        assert errors.trans_err_mean == pytest.approx(0, abs=1e-9)


def test_errors_are_in_the_unit_of_the_asked_path(asked):
    """Whatever the unit of the recovered one, which structure from motion does not know."""
    shaken = asked.c2w.clone()
    shaken[:, :3, 3] += 0.1 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    comparison = Comparison(pose_frame="first", scale="lstsq")
    one, other = (
        score_video("a", FRAMES, asked, Told(Recovered(c2w=times(factor, shaken))), comparison)[0].errors
        for factor in (1, 20)
    )
    assert one.trans_err_mean > 0.01 and other.trans_err_mean == pytest.approx(one.trans_err_mean)


def test_medians_and_means_are_those_of_the_videos(asked, tmp_path):
    def shifted(by: float):
        moved = asked.c2w.clone()
        moved[:, 0, 3] += by
        return score_video(f"{by}", FRAMES, asked, Told(Recovered(c2w=moved)), ABSOLUTE)[0]

    scores = [shifted(by) for by in (0.8, 0.0, 0.1)]
    summary = write_scores(scores, tmp_path / "camera.json", comparison=ABSOLUTE, estimator="render")
    assert (summary["videos"], summary["failed"]) == (3, 0)
    assert summary["trans_err_mean"] == pytest.approx({"median": 0.1, "mean": 0.3, "of": 3})
    content = json.loads((tmp_path / "camera.json").read_text())
    assert (content["estimator"], content["pose_frame"], content["scale"]) == ("render", "scene", "none")
    assert content["summary"] == summary
    assert summary.keys() - {"videos", "failed"} <= scores[0].errors.as_dict().keys()


def test_failures_are_counted_and_written(asked, tmp_path):
    found = score_video("a", FRAMES, asked, Told(Recovered(c2w=asked.c2w, figures={"confidence": 0.5})), RELATIVE)[0]
    lost = score_video("b", FRAMES, asked, Told(Recovered(failure="no texture")), RELATIVE)[0]
    summary = write_scores([found, lost], tmp_path / "camera.json", comparison=RELATIVE, estimator="sfm")
    assert (summary["videos"], summary["failed"]) == (2, 1)
    assert summary["rot_err_mean_degrees"]["of"] == 1
    content = json.loads((tmp_path / "camera.json").read_text())
    assert content["videos"][1]["failure"] == "no texture"
    assert content["videos"][0]["figures"] == {"confidence": 0.5}
    assert content["summary"]["failed"] == 1
    assert summarise([lost])["trans_err_mean"] is None


def test_the_plot_shows_both(asked, tmp_path):
    plot_recovered(asked, asked.c2w, tmp_path / "a.png", RELATIVE)
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("comparison", "factor"), [(ABSOLUTE, 1), (Comparison(pose_frame="first", scale="none"), 1), (RELATIVE, 2)]
)
def test_paths_are_drawn_as_they_are_compared(asked, tmp_path, monkeypatch, comparison, factor):
    """Where a scale is matched, a path of twice the size lies on the asked one; elsewhere both as they stand."""
    drawn = {}
    monkeypatch.setattr(score, "plot_path", lambda paths, file: drawn.update(paths))
    plot_recovered(asked, times(2, asked.c2w), tmp_path / "a.png", comparison)
    one, other = drawn["asked"], drawn["recovered from the video"]
    target = asked if comparison.pose_frame == "scene" else asked.relative_to_first()
    torch.testing.assert_close(one.c2w, target.c2w)
    torch.testing.assert_close(other.rotations, target.rotations)
    places = asked.positions - asked.positions[0] if comparison.pose_frame == "first" else asked.positions
    torch.testing.assert_close(other.positions.norm(dim=-1), places.norm(dim=-1) * (2 / factor))
    assert one.fps == other.fps == asked.fps


def test_render_says_its_error_and_asks_with_what_it_was_told(asked):
    class Asked(Finder):
        def recover(self, frames, *, K, start):
            self.K, self.start = K, start
            return super().recover(frames, K=K, start=start)

    finder, start = Asked(0.75), asked.c2w[0]
    found = RenderEstimator(0, height=16, start=start, finder=finder).recover(FRAMES, asked.K)
    assert found.figures == {"alignment_error": 0.75} and found.failure is None
    assert torch.equal(finder.start, start) and torch.equal(finder.K, asked.K[0])
    nearly = asked.K * (1 + 1e-6 * torch.arange(5)[:, None, None])
    assert RenderEstimator(0, height=16, finder=finder).recover(FRAMES, nearly).failure is None


def test_sfm_is_given_the_focal_length_and_its_own_seed(asked, monkeypatch):
    pytest.importorskip("pycolmap", reason="the extra sfm is not installed")
    from camera import estimate

    told = []

    def found(frames, **options):
        told.append(options)
        return SimpleNamespace(path=asked, confidence=0.5, reprojection_error_pixels=0.25, num_points=7)

    monkeypatch.setattr(estimate, "estimate_path", found)
    recovered = SfmEstimator(seed=3).recover(FRAMES, asked.K)
    assert told == [{"focal": float(asked.K[0, 0, 0]), "seed": 3}] and torch.equal(recovered.c2w, asked.c2w)
    assert recovered.figures == {"confidence": 0.5, "reprojection_error_pixels": 0.25, "num_points": 7.0}
    zoom = asked.K.clone()
    zoom[3:, 0, 0] *= 1.5
    assert "zooms" in SfmEstimator().recover(FRAMES, zoom).failure and len(told) == 1


def test_a_recovered_path_has_the_lens_and_clock_of_the_asked_one(asked):
    path = as_path(times(2, asked.c2w), replace(asked, fps=12.5))
    assert path.fps == 12.5 and torch.equal(path.K, asked.K) and torch.equal(path.positions, 2 * asked.positions)


def test_render_fails_where_the_scene_is_not_seen_or_the_lens_changes(asked):
    near, far = (RenderEstimator(0, height=16, finder=Finder(error)) for error in (0.3, 0.95))
    assert near.recover(FRAMES, asked.K).c2w is not None
    assert "0.95" in far.recover(FRAMES, asked.K).failure
    zoom = asked.K.clone()
    zoom[3:, 0, 0] *= 1.5
    assert "zooms" in near.recover(FRAMES, zoom).failure


def test_sfm_finds_no_camera_in_nothing():
    pytest.importorskip("pycolmap", reason="the extra sfm is not installed")
    path = film(make_scene(0), 1, num_frames=5, height=64, width=96)
    found = SfmEstimator().recover(torch.zeros(5, 64, 96, 3, dtype=torch.uint8), path.K)
    assert found.c2w is None
    assert found.failure
