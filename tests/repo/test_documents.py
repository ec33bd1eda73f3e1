"""What the documents say is so: links, Python blocks, the example, and, in a fresh environment, every command.

A command that takes long is run in a short form, one that another test runs is left out, and any other, new ones too,
is run as it stands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from pristine import pristine_imports
from trees import IDENTITY, ROOT, git, hatch_build, make_repository, output, pristine_tree

from examples import length_extrapolation as example
from x_transformers.x_transformers import RotaryEmbedding

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CHANGELOG.md", "patches/README.md", *PAGES)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}


@pytest.mark.parametrize("document", TEXTS)
def test_links_resolve(document: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", TEXTS[document]):
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        # as GitHub makes them
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, link


def test_every_page_is_linked_from_readme() -> None:
    assert {*PAGES} <= set(re.findall(r"\]\(([^)#]*)", TEXTS["README.md"]))


# a block of Python, and what it prints if a block without a language follows
PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n^```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
BLOCKS = [pytest.param(name, *found, id=name) for name in TEXTS for found in PYTHON.findall(TEXTS[name])]


@pytest.mark.parametrize(("document", "code", "shown"), BLOCKS)
def test_python_blocks_run_and_print_what_is_shown(
    document: str, code: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of_upstream = document == "docs/upstream-bugs.md"
    with pristine_imports() if of_upstream else nullcontext():
        exec(code, {})
    printed = capsys.readouterr().out
    assert not shown or printed == shown
    if of_upstream:  # what it does wrong, until it is mended, in two digits
        said = re.findall("# prints (.*), should print", code)
        numbers = [float(number) for each in said for number in each.split(" and ")]
        assert [float(number) for number in printed.split()] == pytest.approx(numbers, rel=0.05)
        assert numbers


def test_limits_are_those_of_the_package() -> None:
    rotary = RotaryEmbedding(32, use_xpos=True)
    for name in ("float16", "bfloat16", "float32"):
        limit = f"{rotary.max_xpos_queries(getattr(torch, name)):,}"
        assert f"| {name} | {limit} |" in TEXTS["docs/limits.md"]
        assert f"{limit} in {name}" in " ".join(TEXTS["CHANGELOG.md"].split())


# commands

INSTALL = "pip install -q -c constraints.txt ."
WITH_TESTS = 'pip install -q -c constraints.txt ".[test]"'
TESTS = 'pip install -c constraints.txt ".[test]" && pytest'
SLOW_TESTS = "pytest -m slow --ignore=tests/upstream/test_mutations.py"
# by .ci/run, and by the test of the example
RUN_ELSEWHERE = {TESTS, SLOW_TESTS, "python examples/length_extrapolation.py"}
# what is put behind a command: arguments for a short form, or lines that look at what it leaves
BEHIND = {
    "python patches/try_release.py": " --no-properties",
    "python patches/try_release.py --newest 10": " --newest 2 --no-properties",
    "python benchmarks/speed.py": " prefill train decode rotation --lengths 16 --seconds 0",
    "pip install --force-reinstall --no-deps x-transformers==2.31.10": (
        '\n(python -m x_transformers.xpos 2>&1 || true) | grep "No module named x_transformers.xpos"'
    ),
    'uv pip install "git+file://$PWD#subdirectory=patches/1.27.x"': "\npython -m x_transformers.xpos --max-len 128",
    # an export is that of the patches that it was made from, to the last byte
    'git am -q "$line"/*.patch': '\ncp -r "$line" "$work/before"',
    'diff <(grep -v "^#" "$line/series") <(cd "$line" && ls *.patch)': '\ndiff -r "$line" "$work/before"',
    # the repository is left as it was
    'git am -3 "$line"/*.patch': '\ncd "$repo"',
}


def commands(document: str) -> list[str]:
    """The lines of the bash blocks, without comments and those in a clone of upstream's repository or for a GPU."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXTS[document], re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks if "$clone" not in block for line in block.splitlines()]
    found = (re.sub(r"\s+# .*", "", line).strip() for line in lines if not re.search(r"cuda|test_gpu\.py", line))
    return [line for line in found if line]


def test_what_is_said_of_commands_is_about_commands_that_are_there() -> None:
    assert {*RUN_ELSEWHERE, *BEHIND} <= {command for document in TEXTS for command in commands(document)}
    if (ROOT / ".ci").exists():  # not in an sdist
        assert {TESTS, SLOW_TESTS} <= {*(ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a clone would have, with changes that are not committed yet, and beside it a new virtual environment."""
    if not (ROOT / ".git").exists():
        pytest.skip("not in a clone of the repository")
    clone = tmp_path_factory.mktemp("reader") / "clone"
    names = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    hatch_build.write_files({name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}, clone)
    make_repository(clone, "all")
    output(sys.executable, "-m", "venv", clone.parent / "venv")
    yield clone
    shutil.rmtree(clone.parent / "venv")  # a gigabyte, which pytest would keep


@pytest.mark.slow
@pytest.mark.parametrize("document", [document for document in TEXTS if commands(document)])
def test_commands(document: str, reader: Path) -> None:
    lines = ["exec 2>&1; set -v", WITH_TESTS if document == "docs/contributing.md" else INSTALL]
    lines += [command + BEHIND.get(command, "") for command in commands(document) if command not in RUN_ELSEWHERE]
    # the environment's pip and python; uv, which a reader may have anywhere, is that of the tests
    venv, tests_scripts = reader.parent / "venv", Path(sys.executable).parent
    path = os.pathsep.join([f"{venv}/bin", str(tests_scripts), os.environ["PATH"]])
    # pip as the user has set it up, in files and in variables
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(("GIT_", "PYTHONPATH"))}
    variables = {**kept, "VIRTUAL_ENV": str(venv), "TMPDIR": str(reader.parent), "PATH": path, **IDENTITY}
    script = ["bash", "-e", "-u", "-o", "pipefail", "-c", "\n".join(lines).replace("<version>", "2.31.4")]
    output(*script, cwd=reader, env=variables)


# the example: it shows what it says, and trains no model twice


@pytest.mark.slow
def test_table_and_figure_show_every_line_upstream_agrees_and_a_second_run_does_not_train(tmp_path: Path) -> None:
    command = [sys.executable, "examples/length_extrapolation.py", "--quick", "--out", tmp_path]
    run = partial(output, *command, "--upstream", pristine_tree(), cwd=ROOT)
    table = run()
    labels = [line.label for line in example.lines(("none", "rotary"))]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("|")]
    assert {len(row) for row in rows} == {1 + len(example.FACTORS)}
    assert len(rows) == len(example.MODES) * (2 + len(labels))
    picture = (tmp_path / "length_extrapolation.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {label}" in picture for label in labels)

    # logits of both agree to some 1e-6, float32 rounding over two layers; the loss is an average of thousands
    bits = json.loads((tmp_path / "length_extrapolation.json").read_text(encoding="utf-8"))
    for mode in ("call", "window"):
        assert bits["xPos: fork"][mode] == pytest.approx(bits["xPos: upstream"][mode], abs=1e-5)
    # so do folded weights at the length trained at; upstream's memory keys count for more, the longer the window is
    folded = bits["xPos, mem_kv: upstream's weights, folded, in the fork"]["call"]
    unfolded = bits["xPos, mem_kv: upstream"]["call"]
    assert folded[0] == pytest.approx(unfolded[0], abs=1e-5)
    assert abs(unfolded[-1] - folded[-1]) > 1e-4

    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert run() == table
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")} == trained != {}
