"""Bad steps are counted and named; ten in a row are too many, nine and a good one are not."""

from training.guard import IN_A_ROW, BadSteps


def bad(steps, number, clip):
    return steps.bad(number, expert="low", loss=0.5, grad_norm=float("nan"), clips=[clip])


def test_ten_in_a_row_are_too_many_and_name_their_clips():
    steps = BadSteps()
    for number in range(IN_A_ROW):
        assert steps.too_many is None
        bad(steps, 100 + number, f"clip{number % 3}")
    assert steps.too_many is not None
    assert "steps 100 to 109" in steps.too_many and "clip0, clip1, clip2" in steps.too_many


def test_a_good_step_begins_a_new_row_and_the_count_goes_on():
    steps = BadSteps()
    for number in range(3 * IN_A_ROW):
        if number % IN_A_ROW == IN_A_ROW - 1:
            steps.good()
        else:
            said = bad(steps, number, "room")
        assert steps.too_many is None
    assert steps.count == 3 * (IN_A_ROW - 1)
    assert said.startswith("step 28: skipped, the low-noise gradient is nan at loss 0.5 (clips: room); 9 in a row, 27")
