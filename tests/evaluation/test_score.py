"""Scores: what an estimator finds is compared in the asked frame, failures are counted, files hold it all."""

import json

import pytest
import torch

from camera.path import CameraPath
from evaluation.estimators import Recovered, RenderEstimator, SfmEstimator
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
