"""Every command in the documents, run as a reader would: in a copy of the repository, in a virtual environment.

A command that takes long is run in a short form, one that another test runs is named with that test, and any other,
new ones too, is run as it stands.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging_support import LINE, ROOT, clean_environment, git, hatch_build
from test_projects import Environment

pytestmark = pytest.mark.slow

DOCUMENTS = ("README.md", "patches/README.md", "benchmarks/README.md", "examples/README.md")
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)

# what runs it instead
ELSEWHERE = {
    'pip install -c constraints.txt -e ".[test]" && pytest': ".ci/run",
    "pip install ./patches/1.27.x": "tests/test_backport.py",
    'pip install --no-deps --target "$tree" ./patches/1.27.x': "tests/test_backport.py",
    'pytest --package="$tree" tests/line_1_27': "tests/test_backport.py",
    "git switch -c xpos": "tests/test_for_upstream.py",
    'git am "$repo"/patches/2.x/*.patch "$repo"/patches/2.x/tests-for-upstream/*.patch': "tests/test_for_upstream.py",
    "pytest tests/test_for_upstream.py --upstream <clone of upstream's repository>": "tests/test_for_upstream.py",
    "python examples/length_extrapolation.py": "tests/test_example.py",
}

SPEED = "python benchmarks/speed.py decode prefill train rotation curve --contexts 16 --seconds 0 --figure decode.svg"
SHORTER = {
    "python patches/try_release.py latest": "python patches/try_release.py latest --no-properties",
    "python patches/try_release.py --newest 20 --write": "python patches/try_release.py --newest 2 --no-properties",
    "python benchmarks/speed.py --write": SPEED,
    "python benchmarks/speed.py decode --contexts 256 1024": "true",
    'python benchmarks/long_prefill.py && PYTHONPATH="$upstream" python benchmarks/long_prefill.py': (
        "python benchmarks/long_prefill.py --length 4096"
    ),
    'pip download --no-deps -d "$next" x-transformers==<version>': (
        'pip download --no-deps -d "$next" x-transformers==2.31.4'
    ),
}

INSTALL = "pip install -q -c constraints.txt ."
# who works on patches has installed the package as README.md says
FIRST = {"patches/README.md": 'pip install -q -c constraints.txt -e ".[test]"'}
BEFORE = {
    # upstream's release, and 1.27.5, are what the commands before it have installed
    "python -m x_transformers.xpos check --model train:build_model": INSTALL,
    "python -m x_transformers.xpos migrate old.pt --model train:build_model --length 2048 --output new.pt": (
        "python -c \"import torch, train; torch.save(train.build_model().state_dict(), 'old.pt')\""
    ),
    # not the export that is being made, but what it is compared with
    'rm "$line"/*.patch': 'cp -r "$line" "$work/before"',
}
AFTER = {
    "pip install --force-reinstall --no-deps x-transformers==2.31.10": (
        '(python -m x_transformers.xpos 2>&1 || true) | grep "No module named x_transformers.xpos"'
    ),
    '(cd "$line" && ls *.patch > series)': 'diff -r "$line" "$work/before" && echo EXPORTED',
    # the repository is left as it was
    'git am -3 "$line"/*.patch': 'cd "$repo"',
}

TRAIN = """
import torch
from x_transformers import Decoder, TransformerWrapper


def build_model():
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=32, rotary_xpos=True, attn_num_mem_kv=2)
    return TransformerWrapper(num_tokens=64, max_seq_len=2048, use_abs_pos_emb=False, attn_layers=layers)
"""


def commands(document: str) -> list[str]:
    """The lines of the bash blocks, without comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = [line for block in COMMANDS.findall(text) for line in block.splitlines()]
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in lines) if line]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    environment = Environment(tmp_path_factory.mktemp("reader") / "venv", sees_outer=False)
    yield environment
    # a gigabyte, which pytest would keep
    shutil.rmtree(environment.directory)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the repository would have, with changes that are not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("not in a clone of the repository")
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    clone = tmp_path_factory.mktemp("clone") / "x-transformers"
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        assert git(clone, *command).returncode == 0
    (clone / "train.py").write_text(TRAIN, encoding="utf-8")
    return clone


def bash(script: str, environment: Environment, clone: Path) -> str:
    # the environment's pip and python; uv and pytest, which a reader may have anywhere, are those of the tests
    path = os.pathsep.join([str(environment.python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    variables = clean_environment(PATH=path, VIRTUAL_ENV=str(environment.directory), **identity)
    variables.update({name: value for name, value in os.environ.items() if name.startswith("PIP_")})
    variables.pop("PYTHONPATH", None)
    variables["TMPDIR"] = str(clone.parent)
    result = subprocess.run(
        ["bash", "-e", "-u", "-o", "pipefail", "-c", script],
        cwd=clone,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10_000:]
    return result.stdout


def script_of(document: str) -> str:
    lines = ["set -v", FIRST.get(document, INSTALL)]
    for command in commands(document):
        if command in ELSEWHERE:
            continue
        lines += [BEFORE.get(command, ":"), SHORTER.get(command, command), AFTER.get(command, ":")]
    return "\n".join(line for line in lines if line != ":")


def test_what_is_said_of_commands_is_about_commands_that_are_there() -> None:
    known = {command for document in DOCUMENTS for command in commands(document)}
    assert {*ELSEWHERE, *SHORTER, *BEFORE, *AFTER} <= known
    for command, where in ELSEWHERE.items():
        assert (ROOT / where).is_file()
        assert where != ".ci/run" or command in (ROOT / where).read_text(encoding="utf-8")


def test_no_document_is_left_out() -> None:
    with_commands = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.md")
        if not any(part.startswith(".") or part == "x_transformers" for part in path.relative_to(ROOT).parts)
        and COMMANDS.search(path.read_text(encoding="utf-8"))
    }
    assert with_commands == {*DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document: str, environment: Environment, clone: Path) -> None:
    output = bash(script_of(document), environment, clone)

    if document == "README.md":
        assert output.count("all 19 properties hold") >= 2
        assert "equal to rounding" in output
        assert (clone / "new.pt").is_file()
        # the table that is shown is the one that is printed
        text = (ROOT / document).read_text(encoding="utf-8")
        (shown,) = re.findall(r"^```\n( +queries in one call.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert shown in output
    if document == "patches/README.md":
        # what is exported is what is here, to the last byte
        assert "EXPORTED" in output
        names = hatch_build.read_series(ROOT / LINE)
        assert output.count("Applying: ") == len(names)
        for name in (*names, "series"):
            assert (clone / LINE / name).read_bytes() == (ROOT / LINE / name).read_bytes()
