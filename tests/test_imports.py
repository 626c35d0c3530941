"""House rules that a reader relies on: who may import whom, where the command line ends, what the README names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "core": set[str](),
    "camera": {"core"},
    "memory": {"core"},
    "scenes": {"core", "camera"},
    "dataset": {"core", "camera"},
    "wan_ext": {"core", "memory"},
    "networks": {"core", "camera", "memory", "wan_ext"},
    "evaluation": {"core", "camera", "scenes", "memory", "wan_ext", "networks"},
    "training": {"core", "camera", "scenes", "memory", "dataset", "wan_ext", "networks", "evaluation"},
}
"""Package -> packages of ours that it may import, besides itself. Scripts, tools and benchmarks may import them all."""

SCRIPT_FOLDERS = ("tools", "benchmarks")
COMMAND_LINE = {"argparse", "tyro", "click", "core.options"}
KNOWS_THE_COMMAND_LINE = {"core/options.py"}
KEYWORDS_ALLOWED: set[tuple[str, str]] = set()
"""(file, function) of functions that take **keywords because a library's protocol calls them so."""

WITHOUT_TORCH = ("core.errors", "core.files", "core.options", "core.model_files", "wan_ext.configs", "dataset.config")


def sources() -> list[Path]:
    """Every Python file of the project but the tests, relative to the root."""
    folders = [*MAY_IMPORT, *SCRIPT_FOLDERS]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    return sorted(file.relative_to(ROOT) for file in files)


def scripts() -> set[str]:
    return {file.stem for file in ROOT.glob("*.py")}


def tree(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=str(file))


def imported(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported in a file, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield node.lineno, "." * node.level + f"{node.module or ''}.{name.name}"


def functions(module: ast.Module) -> Iterator[tuple[str, ast.arguments]]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield getattr(node, "name", "lambda"), node.args


def is_ours(name: str) -> bool:
    return name.split(".")[0] in {*MAY_IMPORT, *SCRIPT_FOLDERS, *scripts()}


def wrong_imports(file: Path, module: ast.Module) -> list[str]:
    """What a file imports of ours against the rule, as "file:line imports name"."""
    owner = file.parts[0] if len(file.parts) > 1 else ""
    allowed = {owner, *MAY_IMPORT[owner]} if owner in MAY_IMPORT else {owner, *MAY_IMPORT}
    return [
        f"{file}:{line} imports {name}"
        for line, name in imported(module)
        if name.startswith(".") or (is_ours(name) and name.split(".")[0] not in allowed)
    ]


def wrong_command_lines(file: Path, module: ast.Module) -> list[str]:
    """Where a package imports what belongs to scripts."""
    if file.parts[0] not in MAY_IMPORT or file.as_posix() in KNOWS_THE_COMMAND_LINE:
        return []
    return [
        f"{file}:{line} imports {name}"
        for line, name in imported(module)
        if any(name == known or name.startswith(f"{known}.") for known in COMMAND_LINE)
    ]


def wrong_parameters(file: Path, module: ast.Module) -> list[str]:
    """Functions with a parameter named `args` or with **keywords."""
    found = []
    for name, arguments in functions(module):
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg]
        if any(argument is not None and argument.arg == "args" for argument in every):
            found.append(f"{file}: {name} takes `args`; name what it needs")
        if arguments.kwarg is not None and (file.as_posix(), name) not in KEYWORDS_ALLOWED:
            found.append(f"{file}: {name} takes **{arguments.kwarg.arg}; name what it needs")
    return found


@pytest.mark.parametrize("rule", [wrong_imports, wrong_command_lines, wrong_parameters])
def test_the_project_keeps(rule) -> None:
    wrong = [finding for file in sources() for finding in rule(file, tree(file))]
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_floor() -> None:
    packages = {folder.parent.name for folder in ROOT.glob("[!.]*/__init__.py")}
    assert packages - {*SCRIPT_FOLDERS, "tests"} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (wrong_imports, "camera/path.py", "from wan_ext.flow import add_noise"),
        (wrong_imports, "memory/stream.py", "import camera.path"),
        (wrong_imports, "dataset/cache.py", "def f():\n    from wan_ext import configs"),
        (wrong_imports, "wan_ext/dit.py", "from dataset import batches"),
        (wrong_imports, "core/files.py", "import camera"),
        (wrong_imports, "networks/lora.py", "from dataset.batches import Batch"),
        (wrong_imports, "networks/lora.py", "from tools.demo import run"),
        (wrong_imports, "networks/lora.py", "from .lora_linear import LoRALinear"),
        (wrong_imports, "tools/demo.py", "import benchmarks.step"),
        (wrong_command_lines, "dataset/config.py", "import argparse"),
        (wrong_command_lines, "networks/lora.py", "from core.options import parse_options"),
        (wrong_command_lines, "networks/lora.py", "from core import options"),
        (wrong_command_lines, "core/files.py", "def f():\n    from tyro import cli"),
        (wrong_parameters, "camera/path.py", "def f(args): pass"),
        (wrong_parameters, "camera/path.py", "def f(*args): pass"),
        (wrong_parameters, "camera/path.py", "def f(*, args=None): pass"),
        (wrong_parameters, "train_network.py", "class A:\n    async def f(self, **more): pass"),
        (wrong_parameters, "train_network.py", "f = lambda **more: None"),
    ],
)
def test_a_breach_is_found(rule, file: str, source: str) -> None:
    assert rule(Path(file), ast.parse(source))


def test_no_script_imports_another() -> None:
    names = scripts()
    files = [Path(f"{name}.py") for name in names]
    wrong = [
        f"{file} imports {name}" for file in files for _, name in imported(tree(file)) if name.split(".")[0] in names
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("networks/lora.py", "from wan_ext.configs import WanVariant\nimport torch, argparse_like"),
        ("tools/demo.py", "from tools.tiny_wan import clips\nfrom core.options import run\nimport dataset.video"),
        ("train_network.py", "import tyro\nfrom memory.stream import StreamedBlocks\ndef f(*names, option=1): pass"),
    ],
)
def test_what_is_allowed_is_not_a_breach(file: str, source: str) -> None:
    for rule in (wrong_imports, wrong_command_lines, wrong_parameters):
        assert rule(Path(file), ast.parse(source)) == []


def test_what_help_needs_comes_without_torch() -> None:
    check = f"import sys, {', '.join(WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=120).returncode == 0


# ---- the README's file map -------------------------------------------------------------------------------------------


def file_map(readme: str) -> list[str]:
    """The paths that the file map names: the fenced block of the README that has both train_network.py and camera/.

    A line's paths stand before its description, two spaces apart: words with a "/" or a suffix, and Makefile and
    LICENSE. A path inside a folder is indented further than its folder.
    """
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE):
        if "train_network.py" in block and "camera/" in block:
            return _paths(block)
    return []


def _paths(block: str) -> list[str]:
    found: list[str] = []
    folders: list[tuple[int, str]] = []  # (column, path) of the folders that the line is inside of
    for raw in block.splitlines():
        line = re.sub("[│├└─]", " ", raw)
        column = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= column:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        for word in re.split(r"\s{2,}", line.strip())[0].split():
            if not re.fullmatch(r"[\w./-]*(/[\w.-]*|\.\w+)|Makefile|LICENSE", word):
                break
            found.append(parent + word)
            if word.endswith("/"):
                folders.append((column, parent + word))
    return found


@pytest.mark.parametrize(
    "block",
    [
        """
train_network.py generate.py    two commands of the five.
camera/        geometry: path.py and so on
    rays.py    rays
docs/
  cameras.md   formats
.ci/run        what CI runs
Makefile
""",
        """
├── train_network.py
├── generate.py
├── camera/      geometry
│   └── rays.py  rays
├── docs/
│   └── cameras.md
├── .ci/run
└── Makefile     words to remember
""",
    ],
)
def test_file_map_is_read_as_people_read_it(block: str) -> None:
    expected = "train_network.py generate.py camera/ camera/rays.py docs/ docs/cameras.md .ci/run Makefile"
    assert file_map(f"```bash\nmake demo\n```\n```{block}```\n") == expected.split()


def test_readme_maps_what_exists_and_nothing_else() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    named = file_map(readme.read_text(encoding="utf-8"))
    assert named, "README.md has no fenced file map with train_network.py and camera/"
    absent = [path for path in named if not (ROOT / path).exists()]
    assert not absent, f"the map names what does not exist: {absent}"
    existing = {f"{file.parent.name}/" for file in ROOT.glob("[!.]*/*.py")} | {f"{name}.py" for name in scripts()}
    missing = existing - set(named)
    assert not missing, f"the map lacks {sorted(missing)}"
