"""The table of sizes in the docs is what the command prints, and its figures are those of modules that exist."""

from pathlib import Path

import pytest

from benchmarks.mechanism_sizes import CHOICES, measure, num_parameters, table
from networks.mechanisms.registry import INJECTIONS, build_camera
from networks.mechanisms.settings import read_camera_settings
from wan_ext.configs import get_variant

DOCS = Path(__file__).parents[2] / "docs" / "mechanisms.md"


def test_the_docs_show_what_the_command_prints() -> None:
    assert table("ti2v-5B", measure("ti2v-5B")) in DOCS.read_text()


@pytest.mark.parametrize("injection", ["film", "ray_attention"])
def test_sizes_are_those_of_modules_that_exist(injection: str) -> None:
    variant = get_variant("tiny")
    settings = read_camera_settings(
        {}, injection=injection, defaults=INJECTIONS[injection].defaults, variant=variant, pose_frame="scene",
        scale_rule="none",
    )  # fmt: skip
    encoder, branches = build_camera(settings, variant, generator=None, device="cpu")
    (row,) = (row for row in measure("tiny") if row.name == injection)
    assert row.encoder == num_parameters(encoder)
    assert row.branches == sum(map(num_parameters, branches.values()))
    assert 0 < row.of_computation < 1


def test_every_mechanism_has_a_row() -> None:
    assert {arguments["injection"] for arguments in CHOICES.values()} == INJECTIONS.keys()
