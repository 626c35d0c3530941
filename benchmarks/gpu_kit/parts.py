"""What is run in which order, by the clock: three parts, each in a process of its own.

    checks    kernels against references; streamed against resident
    exact     weights in fp8, products in bf16: training, the eager step, generation
    int8      weights and products in rotated int8: training, generation

How: within a part the rows that a bar asks for come first. Before each row its seconds are estimated from its plan and
from how the rows before it kept to theirs; what would not end in time is skipped and noted. A row that fails is noted
with its traceback, and the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_kit.bench import Bench
from benchmarks.gpu_kit.checks import run_checks
from benchmarks.gpu_kit.eager import agreement, eager_row
from benchmarks.gpu_kit.generation import generation_row
from benchmarks.gpu_kit.records import Records
from benchmarks.gpu_kit.settings import GB, Clip, Setting
from benchmarks.gpu_kit.streaming import identity_row
from benchmarks.gpu_kit.training import resident_row, training_row
from core.errors import InputError
from memory.plan import MemoryPlan

PARTS = {"checks": None, "exact": "fp8", "int8": "int8_w8a8"}
"""Names, and the recipe of each."""
PINNING = 2.5e9
"""Bytes of host memory that the driver registers in a second."""
EAGER = 2.5
"""Times as long as ours, for the clock."""


def run_part(name: str, setting: Setting, records: Records, *, quick: bool) -> None:
    """Run one of `PARTS`."""
    recipe = PARTS[name]
    if recipe is None:
        _checks(setting, records, quick=quick)
    else:
        _Rows(setting, recipe, records).run(quick=quick)


def _checks(setting: Setting, records: Records, *, quick: bool) -> None:
    cases = [("fp8", True, True), ("int8_w8a8", False, True), ("fp8", False, False)]
    for recipe, keep, deterministic in cases[:1] if quick else cases:
        with records.section("streaming"):
            records.add("streaming", identity_row(setting, recipe, keep_attention=keep, deterministic=deterministic))
    with records.section("checks"):
        run_checks(setting, records, quick=quick)


class _Rows:
    """The rows of one recipe."""

    def __init__(self, setting: Setting, recipe: str, records: Records) -> None:
        self.setting, self.recipe, self.records = setting, recipe, records
        self.bench: Bench

    def run(self, *, quick: bool) -> None:
        with self.records.section("machine"):
            self.bench = Bench(self.setting, self.recipe)
            self.records.add(
                "machine",
                {
                    "recipe": self.recipe,
                    "h2d_bytes_per_second": self.bench.rates.h2d if self.setting.real else None,
                    "d2h_bytes_per_second": self.bench.rates.d2h if self.setting.real else None,
                },
            )
        with self.records.section("build"):
            self.bench.build()
            masters = sum(expert.masters.num_bytes for expert in self.bench.experts if expert.masters is not None)
            self.records.add("build", {"recipe": self.recipe, "host_bytes": masters})
        if self.records.sections["build"]["status"] == "failed":
            return
        (self.quick_rows if quick else self.all_rows)()

    def quick_rows(self) -> None:
        s, exact = self.setting, self.recipe == "fp8"
        names = list(self.bench.caps(s.short))
        for name in dict.fromkeys((names[0], names[-1])):
            self.train(s.short, name, steps=2)
        if exact:
            self.agree()
            self.eager(s.short, steps=1)
        self.train(s.image, names[-1], steps=2)
        self.generate(s.short, names[-1])
        self.train(s.long, names[0], steps=1)
        if exact:
            self.eager(s.long, steps=1)

    def all_rows(self) -> None:
        s, exact = self.setting, self.recipe == "fp8"
        names = list(self.bench.caps(s.long))
        ends, between = dict.fromkeys((names[0], names[-1])), names[1:-1]
        large = "12 GB" if "12 GB" in names else names[-1]
        self.train(s.long, names[0], steps=2)
        if exact:
            self.agree()
            self.eager(s.long, steps=1)
        else:
            self.train(s.large, large, steps=1)
        for name in ends:
            self.train(s.short, name, steps=4)
        if exact:
            self.eager(s.short, steps=1)
        self.train(s.long, names[-1], steps=1)
        for name in ends:
            self.train(s.image, name, steps=4)
        self.generate(s.short, names[-1])
        self.generate(s.short, None)
        self.resident(s.short, names[0], steps=2)
        for clip in (s.short, s.image):
            for name in between:
                self.train(clip, name, steps=2)
        self.generate(s.long, names[-1])
        for name in between:
            self.train(s.long, name, steps=1)
        self.resident(s.long, names[0], steps=1)
        self.generate(s.long, None)
        if exact:
            self.train(s.large, large, steps=1)
            self.eager(s.long, steps=1, attention="cudnn")

    # ---- one row each ----

    def train(self, clip: Clip, name: str, *, steps: int) -> None:
        def plan() -> MemoryPlan:
            return self.bench.best_training_plan(clip, self.bench.caps(clip)[name])[0]

        def row() -> dict[str, Any]:
            return training_row(self.bench, clip, self.bench.caps(clip)[name], name=name, steps=steps)

        self._row("training", f"{clip} on {name}", plan, steps + 0.3, row)

    def resident(self, clip: Clip, name: str, *, steps: int) -> None:
        def plan() -> MemoryPlan:
            return self.bench.best_training_plan(clip, self.bench.caps(clip)[name])[0]

        def row() -> dict[str, Any]:
            return resident_row(self.bench, clip, plan(), steps=steps)

        self._row("resident", f"{clip}", plan, steps + 0.3, row)

    def eager(self, clip: Clip, *, steps: int, attention: str = "default") -> None:
        def plan() -> MemoryPlan:
            return self.bench.training_plan(clip, 1000 * GB, num_experts=1)

        def row() -> dict[str, Any]:
            return eager_row(self.bench, clip, steps=steps, attention=attention)

        if attention == "cudnn" and not self.setting.real:
            return
        self._row("eager", f"{clip}, attention {attention}", plan, EAGER * (steps + 0.1), row)

    def agree(self) -> None:
        clip = self.setting.image
        self._row(
            "agreement",
            str(clip),
            lambda: self.bench.training_plan(clip, 1000 * GB, num_experts=1),
            EAGER + 1,
            lambda: agreement(self.bench, clip),
        )

    def generate(self, clip: Clip, name: str | None) -> None:
        cap = None if name is None else self.bench.caps(clip)[name]

        def plan() -> MemoryPlan:
            return self.bench.generation_plan(clip, self.bench.card_bytes() if cap is None else cap)

        def row() -> dict[str, Any]:
            return generation_row(self.bench, clip, cap, name="whole, resident" if name is None else name)

        self._row("generation", f"{clip}, {name or 'resident'}", plan, 4.3, row)

    def _row(
        self,
        section: str,
        what: str,
        plan: Callable[[], MemoryPlan],
        steps: float,
        row: Callable[[], dict[str, Any]],
    ) -> None:
        """Run a row if the clock allows, and note it."""
        with self.records.section(section):
            try:
                planned = plan()
            except InputError as refusal:
                self.records.add(section, {"recipe": self.recipe, "what": what, "no_plan": str(refusal)})
                return
            pinned = self.bench.pool.missing_bytes(planned.costs.num_blocks, planned.stored_bytes)
            seconds = steps * self.bench.expected_seconds(planned) + pinned / PINNING + 4 * self.setting.real
            if not self.records.clock.fits(seconds):
                self.records.skip(section, f"{self.recipe}, {what}", seconds)
                return
            try:
                self.records.add(section, row())
            except torch.OutOfMemoryError as error:
                if section == "training":  # the plan said that it fits
                    raise
                self.records.skip(section, f"{self.recipe}, {what}: {str(error).splitlines()[0]}", seconds)
