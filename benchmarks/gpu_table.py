"""Write the README's figures of GPUs from the results that are committed.

    python benchmarks/gpu_table.py

Reads benchmarks/results/gpu_*.json, each the gpu.json of a run of benchmarks/gpu.py, and writes their tables between
two markers of README.md; without a result it writes that nothing is measured yet. A test holds the README to it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    readme: Path = ROOT / "README.md"
    """File with the two markers."""
    results: Path = ROOT / "benchmarks" / "results"
    """Folder with gpu_*.json."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from benchmarks.gpu_kit.report import readme_section, with_section
from core.files import atomic_path


def main(options: Options) -> None:
    section = readme_section(options.results.glob("gpu_*.json"))
    text = with_section(options.readme.read_text(encoding="utf-8"), section)
    with atomic_path(options.readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main, OPTIONS)
