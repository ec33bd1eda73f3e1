"""What the documents say is so: their links and Python blocks, and, in a fresh environment, every command.

A command that takes long is run in a short form, one that another test runs is left out, and any other, new ones too,
is run as it stands.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trees import IDENTITY, ROOT, clean_environment, git, hatch_build, make_repository

from x_transformers.x_transformers import RotaryEmbedding

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CHANGELOG.md", "patches/README.md", *PAGES]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def anchors(document: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", read(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", read(document)):
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(os.path.relpath(target, ROOT)), link


def test_every_page_is_linked_from_readme() -> None:
    assert {*PAGES} <= set(re.findall(r"\]\(([^)#]*)", read("README.md")))


# a block of Python, and what it prints if a block without a language follows
PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n^```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        pytest.param(*found, id=f"{name} {n}")
        for name in DOCUMENTS
        for n, found in enumerate(PYTHON.findall(read(name)))
    ],
)
def test_python_blocks_run_and_print_what_is_shown(code: str, printed: str) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {})
    assert not printed or output.getvalue() == printed


def test_limits_are_those_of_the_package() -> None:
    rotary = RotaryEmbedding(32, use_xpos=True)
    for name in ("float16", "bfloat16", "float32"):
        limit = f"{rotary.max_xpos_queries(getattr(torch, name)):,}"
        assert f"| {name} | {limit} |" in read("docs/limits.md")
        assert f"{limit} in {name}" in " ".join(read("CHANGELOG.md").split())


# commands

INSTALL = "pip install -q -c constraints.txt ."
WITH_TESTS = 'pip install -q -c constraints.txt ".[test]"'
TESTS = 'pip install -c constraints.txt ".[test]" && pytest'
# what is run for a command instead, where ITSELF stands for it
ITSELF = ""
INSTEAD: dict[str, tuple[str, ...]] = {
    # by .ci/run and test_example.py
    TESTS: (),
    "python examples/length_extrapolation.py": (),
    # needs a GPU, or is run by the fast tier
    "python -m x_transformers.xpos --device cuda --dtype bfloat16": (),
    "python benchmarks/speed.py --device cuda --dtype bfloat16": (),
    "python benchmarks/speed.py train --device cuda --dtype bfloat16 --autocast": (),
    "pytest tests/xpos/test_gpu.py": (),
    "pytest -m slow --ignore=tests/upstream/test_mutations.py": (),
    # in a short form
    "python patches/try_release.py": ("python patches/try_release.py --no-properties",),
    "python patches/try_release.py --newest 10": ("python patches/try_release.py --newest 2 --no-properties",),
    "python benchmarks/speed.py": (
        "python benchmarks/speed.py prefill train decode rotation --lengths 16 --seconds 0",
    ),
    'pip download --no-deps -d "$next" x-transformers==<version>': (
        'pip download --no-deps -d "$next" x-transformers==2.31.4',
    ),
    # with what it leaves
    "pip install --force-reinstall --no-deps x-transformers==2.31.10": (
        ITSELF,
        '(python -m x_transformers.xpos 2>&1 || true) | grep "No module named x_transformers.xpos"',
    ),
    'uv pip install "git+file://$PWD#subdirectory=patches/1.27.x"': (
        ITSELF,
        "python -m x_transformers.xpos --max-len 128",
    ),
    # not the export that is being made, but what it is compared with, to the last byte
    'rm "$line"/*.patch': ('cp -r "$line" "$work/before"', ITSELF),
    'diff <(grep -v "^#" "$line/series") <(cd "$line" && ls *.patch)': (ITSELF, 'diff -r "$line" "$work/before"'),
    # the repository is left as it was
    'git am -3 "$line"/*.patch': (ITSELF, 'cd "$repo"'),
}


def commands(document: str) -> list[str]:
    """The lines of the bash blocks, without comments and those in a clone of upstream's repository."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read(document), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks if "$clone" not in block for line in block.splitlines()]
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in lines) if line]


def test_what_is_said_of_commands_is_about_commands_that_are_there() -> None:
    assert {*INSTEAD} <= {command for document in DOCUMENTS for command in commands(document)}
    if (ROOT / ".ci").exists():  # not in an sdist
        assert TESTS in read(".ci/run")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a clone would have, with changes that are not committed yet, and beside it a new virtual environment."""
    if not (ROOT / ".git").exists():
        pytest.skip("not in a clone of the repository")
    clone = tmp_path_factory.mktemp("reader") / "clone"
    names = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    hatch_build.write_files({name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}, clone)
    make_repository(clone, "all")
    subprocess.run([sys.executable, "-m", "venv", str(clone.parent / "venv")], check=True)
    yield clone
    shutil.rmtree(clone.parent / "venv")  # a gigabyte, which pytest would keep


@pytest.mark.slow
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if commands(document)])
def test_commands(document: str, reader: Path) -> None:
    lines = ["exec 2>&1; set -v", WITH_TESTS if document == "docs/contributing.md" else INSTALL]
    for command in commands(document):
        lines += [line or command for line in INSTEAD.get(command, (ITSELF,))]
    # the environment's pip and python; uv, which a reader may have anywhere, is that of the tests
    scripts = [reader.parent / "venv" / "bin", Path(sys.executable).parent]
    variables = clean_environment(VIRTUAL_ENV=str(scripts[0].parent), TMPDIR=str(reader.parent), **IDENTITY)
    variables["PATH"] = os.pathsep.join([*map(str, scripts), os.environ["PATH"]])
    # pip as the user has set it up, in files and in variables
    del variables["PIP_CONFIG_FILE"]
    variables.update({name: value for name, value in os.environ.items() if name.startswith("PIP_")})
    script = ["bash", "-e", "-u", "-o", "pipefail", "-c", "\n".join(lines)]
    result = subprocess.run(script, cwd=reader, env=variables, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout[-10_000:]
