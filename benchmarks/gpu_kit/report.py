"""From rows to what a person reads: which bars are met, tables in Markdown, and the README's.

What: `bars` judges the rows, `tables` writes them down, `readme_section` does so for all results that are committed.
A bar without its row is "not measured", and nothing of a dry run is a figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

GB = 1e9
DRIVER_BYTES = 600_000_000
"""Of a card that its driver takes beside the allocator, as the planner has it."""
LONG, SHORT, LARGE = 32_760, 7_800, 75_600
"""Tokens of 81x480x832, 17x480x832 and 81x720x1280."""
START, END = "<!-- figures of benchmarks/gpu.py -->", "<!-- end of figures -->"
NONE = "not yet measured"

Row = dict[str, Any]


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar with what was found and whether it is met; None where it was not measured."""
    training, eager = _rows(report, "training"), _rows(report, "eager")

    def bar(name: str, found: float | None, most: float) -> dict[str, Any]:
        met = None if found is None or report["dry_run"] else found <= most
        return {"bar": name, "found": None if report["dry_run"] else found, "most": most, "met": met}

    def peak(tokens: int, card: str, least_experts: int) -> float | None:
        return _largest(
            (r["reserved_bytes"] + DRIVER_BYTES) / GB
            for r in training
            if r["tokens"] == tokens and r["card"] == card and r["experts"] >= least_experts and r["reserved_bytes"]
        )

    def ratio(recipe: str) -> float | None:
        theirs = [r["seconds"] for r in eager if r["tokens"] == LONG and r["attention"] == "default"]
        ours = [r["seconds"] for r in training if r["tokens"] == LONG and r["recipe"] == recipe]
        return min(ours) / theirs[0] if ours and theirs else None

    required = [row["passed"] for row in _rows(report, "streaming") if row["required"]]
    return [
        bar("streamed differs from resident (comparisons)", float(required.count(False)) if required else None, 0),
        bar("GB at 32,760 tokens, both experts, on a card of 24 GB", peak(LONG, "24 GB", 2), 24),
        bar("GB at 32,760 tokens on a card of 8 GB", peak(LONG, "8 GB", 1), 8),
        bar("GB at 75,600 tokens on a card of 12 GB", peak(LARGE, "12 GB", 1), 12),
        bar("step at 32,760 tokens over the eager one, exact", ratio("fp8"), 0.6),
        bar("step at 32,760 tokens over the eager one, int8", ratio("int8_w8a8"), 0.5),
        bar(
            "largest share of a step that waits for transfers, from 7,800 tokens",
            _largest(r["stall_seconds"] / r["seconds"] for r in training if r["tokens"] >= SHORT and _known(r)),
            0.02,
        ),
        bar(
            "largest deviation of the measured peak from the planned one",
            _largest(abs(r["measured_bytes"] / r["planned_bytes"] - 1) for r in training if _known(r)),
            0.05,
        ),
    ]


def failures(report: dict[str, Any]) -> list[str]:
    """Checks that failed, and sections and parts that did not come to their end."""
    found = [f"part {name}: {how}" for name, how in report["parts"].items() if how != "done"]
    for name, section in report["sections"].items():
        found += [f"{name}: {row['check']}" for row in section["rows"] if row.get("passed") is False]
        found += [f"{name}: {error.splitlines()[-1]}" for error in section["errors"]]
    return found


def attention_failed(report: dict[str, Any]) -> bool:
    """Whether attention as PyTorch's defaults compute it failed a check."""
    return any(
        row["passed"] is False and row["check"].startswith("attention sdpa,") and "cuDNN off" not in row["check"]
        for row in _rows(report, "checks")
    )


def merge(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sections of several parts as one."""
    sections: dict[str, Any] = {}
    for part in parts:
        for name, found in part.items():
            into = sections.setdefault(
                name, {"status": "done", "seconds": 0.0, "rows": [], "skipped": [], "errors": []}
            )
            into["seconds"] += found["seconds"]
            for key in ("rows", "skipped", "errors"):
                into[key] += found[key]
            if found["status"] != "done":
                into["status"] = found["status"]
    return sections


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> str:
    """All of a report in Markdown."""
    machine = report["machine"]
    lines = [f"# {machine['device']}", ""]
    if report["dry_run"]:
        lines += ["A dry run of a toy on a CPU: it says that the program runs. Nothing here is a figure.", ""]
    lines += [
        f"torch {machine['torch']}, triton {machine['triton']}, Python {machine['python']}, "
        f"{report['seconds']:.0f} s in all, attention of cuDNN {'on' if report['cudnn_attention'] else 'off'}.",
        "",
        _bars_table(report),
        "",
        _training_table(report),
        "",
        _eager_table(report),
        "",
        _generation_table(report),
        "",
        _checks_table(report),
    ]
    skipped = [f"- {name}: {what}" for name, part in report["sections"].items() for what in part["skipped"]]
    failed = [f"- {what}" for what in failures(report)]
    for title, found in (("Skipped by the clock", skipped), ("Failed", failed)):
        lines += ["", f"{title}:", "", *found] if found else []
    return "\n".join(lines) + "\n"


def readme_section(results: Iterable[Path]) -> str:
    """What the README says between its markers: the figures of all results, or that there are none."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results)]
    real = [report for report in reports if not report["dry_run"]]
    if not real:
        return f"Peak memory and speed on a GPU: {NONE}."
    parts = []
    for report in real:
        parts += [f"On one {report['machine']['device']}, in one run of `python benchmarks/gpu.py`:", ""]
        parts += [_training_table(report), "", _bars_table(report), ""]
    return "\n".join(parts).rstrip()


def with_section(readme: str, section: str) -> str:
    """The README with this section between its markers.

    Raises:
        ValueError: a marker is not there.
    """
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"README.md: expected the lines {START} and {END}, found not both")
    return f"{before}{START}\n{section}\n{END}{after}"


def _bars_table(report: dict[str, Any]) -> str:
    words = {True: "met", False: "not met", None: "not measured"}
    return _table(
        "| bar | at most | found | |",
        [f"| {b['bar']} | {b['most']:g} | {_number(b['found'], 3)} | {words[b['met']]} |" for b in bars(report)],
    )


def _training_table(report: dict[str, Any]) -> str:
    rows = []
    eager = {row["tokens"]: row["seconds"] for row in _rows(report, "eager") if row["attention"] == "default"}
    for row in sorted(_rows(report, "training"), key=lambda r: (r["recipe"], r["tokens"], -_leading(r["card"]))):
        base = eager.get(row["tokens"])
        stall = None if row["stall_seconds"] is None else 100 * row["stall_seconds"] / row["seconds"]
        rows.append(
            f"| {row['recipe']} | {row['tokens']:,} | {row['card']} | {row['experts']} | {row['streamed']} | "
            f"{_number(row['planned_bytes'] / GB, 2)} | {_gigabytes(row['measured_bytes'])} | "
            f"{_number(row['seconds'], 2)} | {_number(None if base is None else row['seconds'] / base, 2)} | "
            f"{_number(stall, 1)} | {_number(100 * row['transfer_seconds'] / row['seconds'], 0)} |"
        )
    header = (
        "| weights | tokens | card | experts | streamed blocks | GB planned | GB measured | seconds a step | "
        "of the eager step | % waiting | % transferring |"
    )
    return _table(header, rows)


def _eager_table(report: dict[str, Any]) -> str:
    def line(name: str, row: Row) -> str:
        return (
            f"| {name} | {row['recipe']} | {row['tokens']:,} | {_gigabytes(row['measured_bytes'])} | "
            f"{_number(row['seconds'], 2)} |"
        )

    rows = [line(f"eager, attention {row['attention']}", row) for row in _rows(report, "eager")]
    rows += [line("ours, all weights on the device, no cap", row) for row in _rows(report, "resident")]
    return _table("| to compare | weights | tokens | GB | seconds a step |", rows)


def _generation_table(report: dict[str, Any]) -> str:
    rows = [
        f"| {row['recipe']} | {row['tokens']:,} | {row['card']} | {row['streamed']} | "
        f"{_gigabytes(row['measured_bytes'])} | {_number(row['seconds'], 2)} | {_number(row['switch_seconds'], 2)} |"
        for row in _rows(report, "generation")
    ]
    return _table(
        "| generation | tokens | card | streamed blocks | GB | seconds a pass | more for a change of expert |", rows
    )


def _checks_table(report: dict[str, Any]) -> str:
    rows = []
    for section in ("streaming", "agreement", "checks"):
        for row in _rows(report, section):
            words = {True: "passed", False: "FAILED", None: "not judged"}[row["passed"]]
            rows.append(f"| {row['check']} | {_number(row.get('error'), 6)} | {row.get('tolerance', '')} | {words} |")
    return _table("| check | error | tolerance | |", rows)


def _table(header: str, rows: list[str]) -> str:
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def _rows(report: dict[str, Any], section: str) -> list[Row]:
    found = report["sections"].get(section, {"rows": []})["rows"]
    return [row for row in found if "no_plan" not in row]


def _known(row: Row) -> bool:
    return row["measured_bytes"] is not None and row["stall_seconds"] is not None


def _largest(values: Iterable[float]) -> float | None:
    return max(values, default=None)


def _gigabytes(count: float | None) -> str:
    return _number(None if count is None else count / GB, 2)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _leading(card: str) -> int:
    word = card.split()[0]
    return int(word) if word.isdigit() else 0


WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu.json": lambda report: json.dumps(report, indent=1) + "\n",
    "gpu.md": tables,
}
"""The two files of a run."""
