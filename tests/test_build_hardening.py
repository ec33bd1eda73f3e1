"""The build where things go wrong around it: a local index, no room, no right to write, killed, beside another one."""

from __future__ import annotations

import ctypes
import functools
import http.server
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from packaging_support import (
    LINE,
    ROOT,
    build,
    clean_environment,
    hatch_build,
    offline,
    provenance,
    snapshot,
)

BACKEND = "import sys, hatchling.build; print(getattr(hatchling.build, sys.argv[1])(sys.argv[2]))"


def start(
    hook: str,
    project: Path,
    out: Path,
    environment: Mapping[str, str],
    before: Callable[[], None] | None = None,
) -> subprocess.Popen[str]:
    """A build in a process of its own, which calls `before` first."""
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", BACKEND, hook, str(out)],
        cwd=project,
        env=dict(environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=before,
        start_new_session=True,
    )


# where the release comes from


@pytest.fixture
def index(wheelhouse: Path, tmp_path: Path) -> Iterator[str]:
    """An index of packages on this machine that has the release."""
    folder = tmp_path / "index" / "simple" / "x-transformers"
    folder.mkdir(parents=True)
    (release,) = wheelhouse.glob("*.whl")
    shutil.copyfile(release, folder / release.name)
    (folder / "index.html").write_text(f'<a href="{release.name}">{release.name}</a>', encoding="utf-8")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple"
        server.shutdown()


def test_a_local_index(index: str, wheel: Path, project: Path, tmp_path: Path) -> None:
    environment = clean_environment(PIP_INDEX_URL=index, PIP_NO_CACHE_DIR="1")
    assert build("build_wheel", project, tmp_path / "out", environment).read_bytes() == wheel.read_bytes()


# no right to write


def obey_the_mode_of_files() -> None:
    """To root nothing is read-only, unless it gives up CAP_DAC_OVERRIDE, which is 1, by PR_CAPBSET_DROP."""
    if os.getuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) != 0:
        raise OSError("root cannot give up the right to write everywhere")


@pytest.mark.skipif(sys.platform != "linux", reason="rights are others elsewhere")
def test_a_tree_that_cannot_be_written_to(wheel: Path, wheelhouse: Path, project: Path, tmp_path: Path) -> None:
    for path in [*project.rglob("*"), project]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(project)

    process = start("build_wheel", project, tmp_path / "out", offline(wheelhouse), obey_the_mode_of_files)
    stdout, stderr = process.communicate()
    denied = start("build_editable", project, tmp_path / "editable", offline(wheelhouse), obey_the_mode_of_files)
    _, message = denied.communicate()

    assert process.returncode == 0, stderr
    assert (tmp_path / "out" / stdout.splitlines()[-1]).read_bytes() == wheel.read_bytes()
    # where it has to write it says what it cannot
    assert denied.returncode != 0
    assert "error: " in message
    assert "Permission denied" in message
    assert not list((tmp_path / "editable").iterdir())
    assert snapshot(project) == before


# no room


@pytest.mark.parametrize("hook", ["build_wheel", "build_sdist", "build_editable"])
@pytest.mark.parametrize("room", [20_000, 150_000])
def test_a_disk_that_is_full(hook: str, room: int, wheelhouse: Path, project: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for it: it fails in the middle of one, too."""
    before = snapshot(project)
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def no_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    environment = offline(wheelhouse, TMPDIR=str(temporary), PYTHONDONTWRITEBYTECODE="1")
    process = start(hook, project, tmp_path / "out", environment, no_room)
    _, stderr = process.communicate()

    assert process.returncode != 0
    assert "error: " in stderr
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".whl", ".gz")]
    assert not list(temporary.iterdir())
    if hook != "build_editable":
        assert snapshot(project) == before
        return
    # what an editable install has begun is known as such, and the next one ends it
    assert not (project / provenance.RECORD_PATH).exists()
    assert build(hook, project, tmp_path / "again", offline(wheelhouse)).exists()
    assert provenance.modified_files(project / "x_transformers") == ()


# killed


@pytest.mark.parametrize("hook", ["build_wheel", "build_sdist"])
def test_killed_at_any_time(hook: str, wheelhouse: Path, project: Path, tmp_path: Path) -> None:
    before = snapshot(project)
    environment = offline(wheelhouse, TMPDIR=str(tmp_path / "temporary"), PYTHONDONTWRITEBYTECODE="1")
    (tmp_path / "temporary").mkdir()
    started = time.monotonic()
    whole = build(hook, project, tmp_path / "whole", environment)
    duration = time.monotonic() - started

    for part in (0.2, 0.5, 0.7, 0.8, 0.9, 0.95):
        out = tmp_path / f"killed at {part}"
        process = start(hook, project, out, environment)
        try:
            process.communicate(timeout=part * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        # all of it or nothing, under the name that an installer looks for
        for path in out.iterdir():
            if path.name == whole.name:
                assert path.read_bytes() == whole.read_bytes()
        assert snapshot(project) == before

    assert build(hook, project, tmp_path / "after", environment).read_bytes() == whole.read_bytes()


# at the same time


@pytest.mark.parametrize("hook", ["build_wheel", "build_sdist", "build_editable"])
def test_two_builds_at_once(hook: str, wheelhouse: Path, project: Path, tmp_path: Path) -> None:
    environment = offline(wheelhouse)
    processes = [start(hook, project, tmp_path / name, environment) for name in ("one", "two")]
    outcomes = [process.communicate() for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outcomes
    one, two = (tmp_path / name / stdout.splitlines()[-1] for name, (stdout, _) in zip(("one", "two"), outcomes))
    assert one.read_bytes() == two.read_bytes()
    if hook == "build_editable":
        assert provenance.modified_files(project / "x_transformers") == ()
        assert not list(project.rglob(".*.new"))


# tampered with


@pytest.mark.parametrize("number", range(len(provenance.read_series(ROOT / LINE))))
def test_a_patch_with_another_line_of_context_is_refused(number: int, wheelhouse: Path, project: Path) -> None:
    name = provenance.read_series(project / LINE)[number]
    path = project / LINE / name
    content = path.read_bytes().split(b"\n")
    first_hunk = next(i for i, line in enumerate(content) if line.startswith(b"@@ "))
    context = next(i for i, line in enumerate(content) if i > first_hunk and line.startswith(b" ") and line.strip())
    content[context] += b" # tampered with"
    path.write_bytes(b"\n".join(content))
    (release,) = wheelhouse.glob("*.whl")

    with pytest.raises(hatch_build.PatchError, match=name) as error:
        hatch_build.apply_series(hatch_build.load_release(release).files, hatch_build.read_patches(project / LINE))

    assert "hunk 1" in str(error.value)
