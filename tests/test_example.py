"""examples/length_extrapolation.py: it runs, goes on where it was stopped, and says in a line what it cannot do."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging_support import ROOT, clean_environment, download_pinned_release, offline, pristine_tree

SCRIPT = ROOT / "examples" / "length_extrapolation.py"

if TYPE_CHECKING:
    import examples.length_extrapolation as command
else:
    # by its path: the repository is not on sys.path where the package is installed from a wheel
    _spec = importlib.util.spec_from_file_location("length_extrapolation", SCRIPT)
    command = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = command
    _spec.loader.exec_module(command)

STEPS, LENGTH = 12, 8
BRIEF = ("--quick", "--no-upstream", f"--length={LENGTH}", f"--steps={STEPS}", "--threads=1")
NUM_MODELS = len(command.MODELS)
# a run in this process has but the first, see `brief`
MODES = command.MODES


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(SCRIPT.read_bytes()[:10_000])
    return path


def run(*arguments: str, environment: dict[str, str] | None = None, code: str = "") -> subprocess.CompletedProcess[str]:
    """The example in a process of its own, after `code`, in which its module is `command`."""
    given_environment = dict(os.environ if environment is None else environment)
    given_environment["OMP_NUM_THREADS"] = "1"
    prelude = f"import runpy, signal, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    start = f"{prelude}import length_extrapolation as command\n{code}\nsys.exit(command.main())"
    return subprocess.run(
        [sys.executable, *(["-c", start] if code else [str(SCRIPT)]), *arguments],
        env=given_environment,
        text=True,
        capture_output=True,
        check=False,
    )


def states(out: Path) -> dict[str, dict[str, Any]]:
    """What every checkpoint holds, but for how long it took."""
    found = {}
    for path in sorted((out / "checkpoints").glob("*.pt")):
        found[path.name] = torch.load(path, weights_only=True)
        del found[path.name]["seconds"]
    return found


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


# a run from end to end, in some 20 s


@pytest.fixture(scope="module")
def upstream() -> Path:
    return pristine_tree()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def finished(out: Path, upstream: Path) -> subprocess.CompletedProcess[str]:
    return run("--quick", f"--upstream={upstream}", f"--out={out}")


def bits(out: Path, line: str, mode: str) -> list[float]:
    fields = json.loads((out / "length_extrapolation.json").read_text(encoding="utf-8"))
    (found,) = (result for result in fields["results"] if result["line"] == line and result["mode"] == mode)
    return list(found["bits_per_byte"].values())


def test_table_is_all_of_stdout(finished: subprocess.CompletedProcess[str], out: Path) -> None:
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == (out / "length_extrapolation.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in finished.stdout.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {1 + len(command.FACTORS)}
    # a head, a rule, two lines for the models that differ, one for those that do not, and the folded one
    assert len(rows) == len(MODES) * (2 + 2 + 2 * 2 + 1)


def test_progress_is_on_stderr(finished: subprocess.CompletedProcess[str]) -> None:
    assert "it/s" not in finished.stdout
    for name in command.MODELS.values():
        assert f"train {name}, fork: 100%" in finished.stderr
    assert "evaluate: 100%" in finished.stderr


def test_figure_shows_every_line(finished: subprocess.CompletedProcess[str], out: Path) -> None:
    assert finished.returncode == 0
    picture = out / "length_extrapolation.svg"
    assert xml.etree.ElementTree.parse(picture).getroot().tag.endswith("svg")
    content = picture.read_text(encoding="utf-8")
    labels = [line.label for line in command.lines(upstream=True, same=("none", "rotary"))]
    assert all(f"<!-- {label}" in content for label in [*labels, *(mode.title for mode in MODES)])


def test_upstream_agrees_where_it_is_right(finished: subprocess.CompletedProcess[str], out: Path) -> None:
    assert finished.returncode == 0
    # logits of both agree to some 1e-6, float32 rounding over two layers; the loss is an average of thousands
    for mode in ("call", "window"):
        assert bits(out, "xPos: fork", mode) == pytest.approx(bits(out, "xPos: upstream", mode), abs=1e-5)


def test_folded_weights_are_upstreams_at_the_length_trained_at(
    finished: subprocess.CompletedProcess[str], out: Path
) -> None:
    assert finished.returncode == 0
    folded = bits(out, "xPos, mem_kv: upstream's weights, folded, in the fork", "call")
    unfolded = bits(out, "xPos, mem_kv: upstream", "call")
    assert folded[0] == pytest.approx(unfolded[0], abs=1e-5)
    # and upstream's memory keys count for more, the longer the window is
    assert unfolded[-1] - folded[-1] > 1e-2


def test_a_second_run_repeats_the_table_without_training(
    finished: subprocess.CompletedProcess[str], out: Path, upstream: Path
) -> None:
    before = {path: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    again = run("--quick", f"--upstream={upstream}", f"--out={out}", "--json")
    assert again.returncode == finished.returncode == 0
    assert (out / "length_extrapolation.md").read_text(encoding="utf-8") == finished.stdout
    assert json.loads(again.stdout) == json.loads((out / "length_extrapolation.json").read_text(encoding="utf-8"))
    assert {path: path.read_bytes() for path in (out / "checkpoints").iterdir()} == before


# stopped and started again


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs in this process: a checkpoint every few steps, and one way to evaluate."""
    monkeypatch.setattr(command, "SAVE_EVERY", 5)
    monkeypatch.setattr(command, "MODES", command.MODES[:1])


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "MODES", command.MODES[:1])
        assert command.main([*BRIEF, f"--data={text}", f"--out={out}"]) == 0
    return (out / "length_extrapolation.md").read_text(encoding="utf-8"), states(out)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, stops: set[int]) -> None:
    """Ctrl-C in the middle of the optimizer's n-th step of all, for every n in `stops`."""
    count, step = 0, torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count in stops:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)


@settings(max_examples=3)
@example(stops={1})
@example(stops={STEPS, STEPS + 1})
@given(stops=st.sets(st.integers(1, NUM_MODELS * STEPS), min_size=1, max_size=4))
def test_ctrl_c_changes_nothing(
    stops: set[int],
    uninterrupted: tuple[str, dict[str, dict[str, Any]]],
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.mktemp("interrupted")
    arguments = [*BRIEF, f"--data={text}", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, stops)
        for _ in stops:
            torch.rand(3)  # the random state of the process that goes on is another
            assert command.main(arguments) == 130
        assert command.main(arguments) == 0
    assert (out / "length_extrapolation.md").read_text(encoding="utf-8") == uninterrupted[0]
    assert equal(states(out), uninterrupted[1])


@pytest.mark.parametrize("stop", [1, 7, STEPS + 6])
def test_kill_changes_nothing(
    stop: int, uninterrupted: tuple[str, dict[str, dict[str, Any]]], text: Path, tmp_path: Path
) -> None:
    code = f"""
import torch
command.SAVE_EVERY, left, step = 5, {stop}, torch.optim.AdamW.step
def counted(self):
    global left
    left -= 1
    if not left:
        signal.raise_signal(signal.SIGKILL)
    return step(self)
torch.optim.AdamW.step = counted
"""
    arguments = [*BRIEF, f"--data={text}", f"--out={tmp_path}"]
    killed = run(*arguments, code=code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert command.main(arguments) == 0
    assert (tmp_path / "length_extrapolation.md").read_text(encoding="utf-8") == uninterrupted[0]
    assert equal(states(tmp_path), uninterrupted[1])


def test_kill_while_a_checkpoint_is_written_changes_nothing(
    uninterrupted: tuple[str, dict[str, dict[str, Any]]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [*BRIEF, f"--data={text}", f"--out={tmp_path}"]
    count, write = 0, Path.write_bytes

    def half(self: Path, content: Any) -> int:
        nonlocal count
        count += 1
        if count == 2:
            write(self, content[: len(content) // 2])
            raise KeyboardInterrupt
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        assert command.main(arguments) == 130
    assert command.main(arguments) == 0
    assert (tmp_path / "length_extrapolation.md").read_text(encoding="utf-8") == uninterrupted[0]
    assert equal(states(tmp_path), uninterrupted[1])


def test_the_seed_counts(
    uninterrupted: tuple[str, dict[str, dict[str, Any]]], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*BRIEF, "--seed=1", f"--data={text}", f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out != uninterrupted[0]


# checkpoints that are damaged or of another run


@pytest.fixture(scope="module")
def partial(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped in the middle of the first model."""
    out = tmp_path_factory.mktemp("partial")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, {STEPS // 2})
        assert command.main([*BRIEF, f"--data={text}", f"--out={out}"]) == 130
    return out


@pytest.fixture
def checkpoint(partial: Path, tmp_path: Path) -> Path:
    (source,) = (partial / "checkpoints").glob("*.pt")
    path = tmp_path / "checkpoints" / source.name
    path.parent.mkdir()
    path.write_bytes(source.read_bytes())
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line in which the command refuses."""
    try:
        status = command.main(arguments)
    except SystemExit as end:  # by argparse
        status = int(end.code or 0)
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{SCRIPT.name}: error: ")
    return str(line)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "field":
        state = torch.load(path, weights_only=True)
        del state["optimizer"]
        torch.save(state, path)
    elif kind == "shape":
        state = torch.load(path, weights_only=True)
        name = next(iter(state["model"]))
        state["model"][name] = state["model"][name][:1].clone()
        torch.save(state, path)
    elif kind == "order":
        torch.save({**torch.load(path, weights_only=True), "data_order": torch.zeros(3)}, path)
    else:
        damaged = {"empty": b"", "half": content[: len(content) // 2], "text": b"no checkpoint"}
        path.write_bytes(damaged[kind])


@pytest.mark.parametrize("kind", ["empty", "half", "text", "field", "shape", "order"])
def test_damaged_checkpoint_is_refused(
    kind: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint, kind)
    message = refusal(capsys, *BRIEF, f"--data={text}", f"--out={tmp_path}")
    assert str(checkpoint) in message
    assert "delete it" in message


@given(st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(
    partial: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    (source,) = (partial / "checkpoints").glob("*.pt")
    content = bytearray(source.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    path.write_bytes(content)
    expected = torch.load(source, weights_only=True)
    try:
        state = command.load_checkpoint(path, expected["made_with"])
    except command.ExampleError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome will do
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert equal(state, expected)


@pytest.mark.parametrize(
    "option", [f"--steps={STEPS + 1}", f"--length={LENGTH + 1}", "--seed=3", "--threads=2", f"--data={SCRIPT}"]
)
def test_checkpoint_of_another_run_is_refused(
    option: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, *BRIEF, f"--data={text}", f"--out={tmp_path}", option)
    assert str(checkpoint) in message
    assert "another --out" in message
    name = option.partition("=")[0]
    assert (f"give {name} " in message) == (name != "--data")


# what is asked for in vain


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--length=1"], "--length: 1 is too small; give 2 or more"),
        (["--steps=0"], "--steps: 0 is too small; give 1 or more"),
        (["--seed=x"], "--seed: 'x' is not a whole number"),
        (["--device=nowhere"], "--device: cannot use 'nowhere'"),
        (["--data=/nowhere/to/be/found"], "--data: cannot read /nowhere/to/be/found"),
        ([f"--data={SCRIPT}", "--length=1000"], "give a file of more than 160,010 bytes or a smaller --length"),
        (["--upstream=."], "--no-upstream: not allowed with --upstream"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_usage_errors(arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refusal(capsys, *BRIEF, f"--out={tmp_path}", *arguments)


def test_out_that_cannot_be_made(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(text) in refusal(capsys, *BRIEF, f"--data={text}", f"--out={text}")


QUICK = ("--quick", "--threads=1")


def copy_of_the_fork(tree: Path, version: str) -> Path:
    """A folder that says it has x-transformers, and has the patched one."""
    import x_transformers

    (tree / "x_transformers").mkdir(parents=True)
    for source in Path(str(x_transformers.__file__)).parent.glob("*.py"):
        (tree / "x_transformers" / source.name).write_bytes(source.read_bytes())
    record = tree / f"x_transformers-{version}.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text(f"Metadata-Version: 2.1\nName: x-transformers\nVersion: {version}\n", encoding="utf-8")
    return tree


@pytest.mark.parametrize(
    ("version", "expected"),
    [(None, "there is no x_transformers in"), ("1.0", "x-transformers 1.0, not 2."), ("2.31.10", "is patched")],
)
def test_upstream_that_is_not_upstream(
    version: str | None, expected: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    if version is not None:
        copy_of_the_fork(tree, version)
    import x_transformers

    message = refusal(capsys, *QUICK, f"--data={text}", f"--out={tmp_path}", f"--upstream={tree}")
    assert expected in message
    assert "pip install --no-deps --target" in message
    assert sys.modules["x_transformers"] is x_transformers


@pytest.fixture
def pip_environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("PIP_"):
                patch.delenv(name)
        yield patch


def test_pip_that_finds_nothing_is_loud(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pip_environment: pytest.MonkeyPatch
) -> None:
    for name, value in clean_environment(PIP_NO_INDEX="1").items():
        pip_environment.setenv(name, value)
    message = refusal(capsys, *QUICK, f"--data={text}", f"--out={tmp_path}")
    assert "pip cannot install x-transformers==" in message
    assert "--no-upstream" in message
    assert not list(tmp_path.glob("upstream*"))


def test_pip_installs_the_release_once(tmp_path: Path, pip_environment: pytest.MonkeyPatch) -> None:
    wheelhouse = download_pinned_release(tmp_path / "wheels")
    for name, value in offline(wheelhouse).items():
        pip_environment.setenv(name, value)
    tree = command.install_upstream(tmp_path)
    package = command.load_upstream(tree)
    assert package.version == tree.name.partition("-")[2]
    assert Path(str(package.root.__file__)).parent.parent == tree
    pip_environment.setenv("PIP_FIND_LINKS", "")
    assert command.install_upstream(tmp_path) == tree


# the recorded run


def test_the_recorded_run_is_there() -> None:
    page = command.PAGE.read_text(encoding="utf-8")
    before, after = command.page_around()
    recorded = page[len(before) : len(page) - len(after)]
    assert recorded.count("\n### ") == len(MODES)
    assert f"]({command.FIGURE.name})" in page
    assert xml.etree.ElementTree.parse(command.FIGURE).getroot().tag.endswith("svg")
