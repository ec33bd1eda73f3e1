"""Try the 2.x series on other releases: how `git am -3` takes each patch, and whether the properties hold then.

    python patches/try_release.py 2.32.0            # or several; without one, the newest
    python patches/try_release.py --newest 10

The exit status is 0 if git puts the whole series on every release and the properties hold, 1 if not, 2 for an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hatch_build import BuildError, Release, fetch_release, load_release, read_series, write_files  # noqa: E402

LINE = ROOT / "patches" / "2.x"
# those about what models answer; the others are about this repository, or about every option of the pinned release
PROPERTIES = ("tests/xpos/every_line", "tests/xpos/test_features.py")

# nobody's settings of git, no colours, and no constraint, which may be about this very package; an index is the user's
ENVIRONMENT = {name: os.environ[name] for name in os.environ if not re.match("GIT_|PIP_CONSTRAINT|FORCE_COLOR", name)}
ENVIRONMENT.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", LC_ALL="C", HYPOTHESIS_PROFILE="quick")
ENVIRONMENT.update({f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")})


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True)


def commit(release: Release, repository: Path) -> None:
    """Make the release all that the repository has."""
    shutil.rmtree(repository / "x_transformers", ignore_errors=True)
    write_files(release.files, repository)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", str(release)]):
        run("git", *command, cwd=repository)


def try_patch(patch: Path, repository: Path) -> tuple[str, str]:
    """Commit the patch if git can: what became of it, and what conflicts; nothing is left of one that does."""
    checked = run("git", "apply", "--check", "--verbose", patch, cwd=repository)
    merged = run("git", "am", "-3", patch, cwd=repository)
    if merged.returncode != 0:
        run("git", "am", "--abort", cwd=repository)
        return "✗", ", ".join(re.findall(r"^error: (.*[^:\n])$", checked.stderr, re.MULTILINE))
    if "Patch already applied" in merged.stdout:
        return "upstream", ""
    return "✓ merged" if checked.returncode != 0 else "✓ moved" if " (offset " in checked.stderr else "✓", ""


def try_properties(tree: Path) -> list[str]:
    """What fails on the package in a tree, after the last line that pytest prints; nothing if all properties hold."""
    shutil.copytree(ROOT / "x_transformers" / "xpos", tree / "x_transformers" / "xpos")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--package={tree}"]
    result = run(*command, *PROPERTIES)
    lines = (result.stdout or result.stderr).splitlines()
    return [*lines[-1:], *(line for line in lines if line.startswith(("FAILED", "ERROR")))] if result.returncode else []


def pip(*arguments: str) -> str:
    result = run(sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments)
    if result.returncode != 0:
        raise BuildError(f"pip {arguments[0]}: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def download(version: str) -> Release:
    """A release by its version; no hash is known of it, and nothing of it is kept."""
    with tempfile.TemporaryDirectory() as directory:
        pip("download", "-q", "--no-deps", "--only-binary=:all:", "-d", directory, f"x-transformers=={version}")
        return load_release(next(Path(directory).glob("*.whl")))


def try_release(release: Release, patches: list[Path], repository: Path, properties: bool = True) -> list[str]:
    """The row of a release, and what fails on it."""
    commit(release, repository)
    tried = {patch.name: try_patch(patch, repository) for patch in patches}
    failures = [f"{name}: {why}" for name, (outcome, why) in tried.items() if outcome == "✗"]
    # without a patch that conflicts too: what fails then says what it was for
    failed = try_properties(repository) if properties else []
    said = f"**{len(failed) - 1} fail**" if failed else "hold" if properties else "not run"
    row = f"| {release.version} | {' | '.join(outcome for outcome, _ in tried.values())} | {said} |"
    return [row, *(f"{release.version} {failure}" for failure in failures + failed)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="✓ applies, moved or merged; ✗ conflicts; upstream has it already")
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help="a version, as 2.32.0")
    parser.add_argument("--newest", type=int, default=1, metavar="N", help="without any, the N newest (default: 1)")
    parser.add_argument("--no-properties", action="store_true", help="do not run the properties, only apply")
    options = parser.parse_args(argv)
    patches, failures = [LINE / name for name in read_series(LINE)], list[str]()
    with tempfile.TemporaryDirectory() as directory:
        try:
            # what a three-way merge starts from: the pinned release, and each patch on it
            commit(fetch_release(LINE / "upstream.txt"), Path(directory))
            run("git", "am", *patches, cwd=Path(directory))
            found = "" if options.releases else pip("index", "versions", "x-transformers").partition("versions: ")[2]
            names = " | ".join(patch.name[:4] for patch in patches)
            print(f"| release | {names} | properties |\n{'|---' * (len(patches) + 2)}|")
            for version in options.releases or found.splitlines()[0].split(", ")[: options.newest]:
                row, *failed = try_release(download(version), patches, Path(directory), not options.no_properties)
                print(row, flush=True)
                failures += failed
        except BuildError as error:
            parser.error(str(error))
    print("\n".join(["", *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
