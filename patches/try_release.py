"""Try the series on another upstream release: whether each patch applies, and whether the properties hold then.

    python patches/try_release.py 2.32.0            # or several, or latest
    python patches/try_release.py --newest 12 --write    # the table in patches/README.md

Nothing in the checkout changes but that table. Exit status: 0 the series applies to every release and the properties
hold, 1 they do not, 2 usage error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hatch_build  # noqa: E402
from hatch_build import BuildError, Patch, PatchError, Release  # noqa: E402

# those about what models answer; the others are about this repository, or about every option of the pinned release
PROPERTIES = ("tests/test_properties.py", "tests/test_rotary.py", "tests/test_features.py")
NAME = "x-transformers"
TABLE = ROOT / "patches" / "README.md"
BEGIN, END = "<!-- made by try_release.py -->\n", "<!-- end -->\n"

CLEAN, MOVED, CONFLICT, UPSTREAM = "applies", "applies, lines moved", "CONFLICTS", "is upstream already"
# as in the table
SHORT = {CLEAN: "✓", MOVED: "✓ moved", CONFLICT: "✗", UPSTREAM: "upstream"}


class Attempt(NamedTuple):
    """What became of one patch on one release; `hunks` names those that conflict."""

    patch: str
    outcome: str
    hunks: tuple[str, ...] = ()


class Trial(NamedTuple):
    """What became of the series on one release; `properties` is what pytest said, empty where it was not run."""

    version: str
    attempts: tuple[Attempt, ...]
    properties: tuple[str, ...] = ()
    held: bool = False

    @property
    def applied(self) -> bool:
        return all(attempt.outcome != CONFLICT for attempt in self.attempts)


def attempt_series(release: Release, patches: Sequence[Patch]) -> tuple[tuple[Attempt, ...], dict[str, bytes]]:
    """Each patch in turn, on the result of those before it that apply; and the files with all that do."""
    files, attempts = dict(release.files), []
    hunks: tuple[str, ...]
    for patch in patches:
        outcome, hunks = CONFLICT, ()
        for allow_offsets in (False, True):
            try:
                files = hatch_build.apply_series(files, [patch], release=release, allow_offsets=allow_offsets)
            except PatchError as error:
                hunks = error.hunks or (str(error),)
            else:
                outcome, hunks = MOVED if allow_offsets else CLEAN, ()
                break
        if outcome == CONFLICT and is_in(files, patch):
            outcome, hunks = UPSTREAM, ()
        attempts.append(Attempt(patch.name, outcome, hunks))
    return tuple(attempts), files


def is_in(files: Mapping[str, bytes], patch: Patch) -> bool:
    """Whether the files have the patch already: it can be taken back from them."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory, "tree")
        hatch_build.write_files(files, tree)
        return hatch_build.git_apply(patch.content, tree, "--check", "--reverse")[0] == 0


def run_properties(files: Mapping[str, bytes], examples: str) -> tuple[bool, tuple[str, ...]]:
    """Whether the properties hold for a package of these files; the last line that pytest printed, and what failed."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        hatch_build.write_files(files, tree)
        own = Path("x_transformers", "xpos")
        shutil.copytree(ROOT / own, tree / own, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--package={tree}"]
        environment = {**os.environ, "HYPOTHESIS_PROFILE": examples}
        result = subprocess.run(
            [*command, *PROPERTIES], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
        )
    lines = [line for line in result.stdout.splitlines() if line.strip()] or ["nothing"]
    # without how long it took, which says nothing about the release
    said = re.sub(r" in [0-9.]+s.*", "", lines[-1])
    return result.returncode == 0, (said, *(line for line in lines if line.startswith(("FAILED", "ERROR"))))


def try_release(version: str, patches: Sequence[Patch], *, examples: str, properties: bool = True) -> Trial:
    release = download(version)
    attempts, files = attempt_series(release, patches)
    # without a patch that conflicts too, as long as there are others: what fails then says what it was for
    if not properties or all(attempt.outcome == CONFLICT for attempt in attempts):
        return Trial(release.version, attempts)
    held, said = run_properties(files, examples)
    return Trial(release.version, attempts, said, held)


# releases


def download(version: str) -> Release:
    """A release by its version, `latest` for the newest; no hash is known of it, and nothing of it is kept."""
    requirement = NAME if version == "latest" else f"{NAME}=={version}"
    with tempfile.TemporaryDirectory() as directory:
        pip("download", "-q", "--no-deps", "--only-binary=:all:", "-d", directory, requirement)
        (wheel,) = Path(directory).glob("*.whl")
        return hatch_build.load_release(wheel)


def newest(count: int) -> list[str]:
    """The newest releases that pip finds, newest first."""
    match = re.search(r"^Available versions: (.*)$", pip("index", "versions", NAME), flags=re.MULTILINE)
    if match is None:
        raise BuildError(f"pip names no versions of {NAME}")
    return match[1].split(", ")[:count]


def pip(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise BuildError(f"pip {arguments[0]}: {(lines or ['failed'])[-1]}")
    return result.stdout


# output


def report(trial: Trial) -> str:
    lines = [f"x-transformers {trial.version}"]
    for attempt in trial.attempts:
        lines += [f"  {attempt.patch}: {attempt.outcome}", *(f"    {hunk}" for hunk in attempt.hunks)]
    said, *failed = trial.properties or ("not run",)
    return "\n".join([*lines, f"  properties: {said}", *(f"    {line}" for line in failed)])


def table(trials: Sequence[Trial]) -> str:
    """A Markdown table, a row per release."""
    numbers = [attempt.patch[:4] for attempt in trials[0].attempts]
    lines = [f"| release | {' | '.join(numbers)} | properties |", f"|---{'|---' * len(numbers)}|---|"]
    for trial in trials:
        cells = [SHORT[attempt.outcome] for attempt in trial.attempts]
        failed = f"**{len(trial.properties) - 1} fail**"
        said = "hold" if trial.held else failed if trial.properties else "not run"
        lines.append(f"| {trial.version} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines) + "\n"


def write_table(text: str) -> None:
    before, begin, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BuildError(f"{TABLE.name} lacks {BEGIN.strip()} and {END.strip()}, between which the table goes")
    TABLE.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Try the 2.x series on other releases: whether each patch applies, and whether the properties hold."
    )
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help="a version, as 2.32.0, or latest")
    parser.add_argument("--newest", type=int, default=0, metavar="N", help="the N newest releases")
    parser.add_argument("--write", action="store_true", help="put the table into patches/README.md")
    parser.add_argument("--no-properties", action="store_true", help="do not run the properties, only apply")
    parser.add_argument("--examples", choices=("quick", "default", "thorough"), default="quick", help="how many")
    options = parser.parse_args(argv)
    if not options.releases and options.newest < 1:
        parser.error("name a release, as 2.32.0 or latest, or give --newest N")

    patches = hatch_build.read_patches(ROOT / "patches" / "2.x")
    trials = []
    try:
        for version in [*options.releases, *(newest(options.newest) if options.newest else [])]:
            trial = try_release(version, patches, examples=options.examples, properties=not options.no_properties)
            print(report(trial), flush=True)
            trials.append(trial)
        print(f"\n{table(trials)}")
        if options.write:
            write_table(table(trials))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(trial.applied and (trial.held or options.no_properties) for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
