"""`python -m x_transformers.xpos`: it passes on the package, refuses what it cannot do, and fails on broken copies."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging_support import hatch_build

import x_transformers
from x_transformers.xpos import __main__ as command
from x_transformers.xpos import formula, models, package, properties, report
from x_transformers.xpos.subject import Point, Subject, deviation

LINE = Path(__file__).parent.parent / "patches" / "2.x"
PACKAGE = Path(x_transformers.__file__).parent
SHORT = ("--max-len", "128")
KEYS = [prop.key for prop in properties.PROPERTIES]


def run(cwd: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which imports from `path` first."""
    # models this small gain nothing from threads, and lose much where other tests run beside them
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "x_transformers.xpos", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def failed(document: dict[str, Any]) -> set[str]:
    return {result["key"] for result in document["results"] if not result["passed"]}


# on the package itself


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def table(directory: Path) -> subprocess.CompletedProcess[str]:
    return run(directory, *SHORT, "--plot", "plot.png")


@pytest.fixture(scope="module")
def document(directory: Path) -> subprocess.CompletedProcess[str]:
    return run(directory, "check", *SHORT, "--json", "--plot", "plot.svg")


def test_every_property_holds(table: subprocess.CompletedProcess[str]) -> None:
    assert table.returncode == 0, table.stdout + table.stderr
    assert table.stdout.count("  pass  ") == len(KEYS)
    assert "FAIL" not in table.stdout
    assert f"all {len(KEYS)} properties hold" in table.stdout


def test_table_fits_in_100_columns(table: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in table.stdout.splitlines() if str(PACKAGE) not in line]
    assert max(map(len, lines)) <= 100


def test_table_says_what_was_checked(table: subprocess.CompletedProcess[str]) -> None:
    assert str(PACKAGE) in table.stdout
    assert all(name in table.stdout for name in hatch_build.read_series(LINE))


def test_progress_is_on_stderr_alone(
    table: subprocess.CompletedProcess[str], document: subprocess.CompletedProcess[str]
) -> None:
    lines = [f"[{number}/{len(KEYS)}] {prop.name}" for number, prop in enumerate(properties.PROPERTIES, 1)]
    assert table.stderr.splitlines() == document.stderr.splitlines() == lines


def test_json_is_the_same_run(
    table: subprocess.CompletedProcess[str], document: subprocess.CompletedProcess[str]
) -> None:
    assert document.returncode == 0
    fields = json.loads(document.stdout)
    assert fields["passed"]
    assert [result["key"] for result in fields["results"]] == KEYS
    assert all(f"{result['name']}  " in table.stdout for result in fields["results"])
    for result in fields["results"]:
        assert result["deviation"] == max(point["deviation"] for point in result["points"]) <= result["tolerance"]


def test_plots_are_pictures(
    directory: Path, table: subprocess.CompletedProcess[str], document: subprocess.CompletedProcess[str]
) -> None:
    assert table.returncode == document.returncode == 0
    assert (directory / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert xml.etree.ElementTree.parse(directory / "plot.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_dtype_passes(dtype: str, directory: Path) -> None:
    result = run(directory, *SHORT, "--dtype", dtype, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["run"]["dtype"] == dtype


# requests that cannot be met


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that refuses the arguments, with status 2 and nothing on stdout."""
    status: object = None
    try:
        status = command.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "int8"], ["--dtype", "int8", "float32", "bfloat16"]),
        (["--max-len", "many"], ["--max-len", "many"]),
        (["--max-len", "63"], ["--max-len", "63", "64 or more"]),
        (["--max-len", "-1"], ["--max-len", "-1", "64 or more"]),
        (["--max-len", "100000", "--dtype", "float16"], ["--max-len", "100000", "float16", "5665 or fewer"]),
        (["--max-len", "32862"], ["--max-len", "32862", "float32", "32861 or fewer"]),
        (["--text", "missing.txt"], ["--text", "missing.txt", "readable file"]),
        (["--text", "."], ["--text", "readable file"]),
        (["--text", "short.txt"], ["--max-len", "4096", "7 bytes of short.txt", "--text FILE"]),
        (["--device", "no-such"], ["--device", "no-such", "as cpu"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "as cpu"]),
        (["--device", "meta"], ["--device", "meta", "as cpu"]),
        (["--plot", "no-such-folder/plot.png"], ["--plot", "no-such-folder/plot.png"]),
        (["--plot", "plot.txt"], ["--plot", "plot.txt", ".png"]),
        (["--plot", "plot"], ["--plot", "plot", ".png"]),
        (["--max", "128"], ["--max"]),
        (["no-such-command"], ["no-such-command", "check"]),
    ],
)
def test_refusals_name_the_argument_and_a_way_out(
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_bytes(b"7 bytes")
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, *arguments)
    assert [words for words in expected if words not in message] == []
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


def test_no_default_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "--text FILE" in refusal(capsys, *SHORT)


def test_a_plot_without_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('a stub')\n")
    result = run(tmp_path, *SHORT, "--plot", "plot.png", path=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert 'pip install "x-transformers[plot]"' in result.stderr


def test_an_existing_plot_survives_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"before")
    report.prepare_plot(str(plot))
    assert plot.read_bytes() == b"before"


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(properties, "check", interrupt)
    assert command.main(SHORT) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_reader_that_has_had_enough() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        command._write(stream, "a table\n")
        command._write(stream, "and more\n")


def test_a_terminal_gets_one_line_of_progress() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    progress = command.Progress(terminal, 2)
    progress("first", "")
    progress("first", "length 7")
    progress("second", "")
    progress.clear()
    assert terminal.getvalue().split("\r\x1b[K") == ["", "[1/2] first", "[1/2] first, length 7", "[2/2] second", ""]


# the parts


def test_formula_is_the_sum_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (3, 5))
    query_pos, key_pos = torch.tensor([4, 5, 9]), torch.arange(5, 10)
    found, _ = formula.scores(q, k, query_pos, key_pos, rotary_dim=4)
    for h, (i, m), (j, n) in (
        (h, i, j) for h in range(2) for i in enumerate(query_pos.tolist()) for j in enumerate(key_pos.tolist())
    ):
        expected = 0.0
        for d in (0, 1):
            angle, decay = 10_000 ** (-2 * d / 4) * (m - n), ((2 * d / 4 + 0.4) / 1.4) ** ((m - n) / 512)
            (a, b), (x, y) = q[h, i, 2 * d : 2 * d + 2].tolist(), k[h, j, 2 * d : 2 * d + 2].tolist()
            expected += decay * ((a * x + b * y) * math.cos(angle) + (a * y - b * x) * math.sin(angle))
        expected += float(q[h, i, 4:] @ k[h, j, 4:])
        expected = expected / math.sqrt(6) if m >= n else 0.0
        assert float(found[h, i, j]) == pytest.approx(expected, abs=1e-12)


def test_formula_refuses_an_odd_rotary_dim() -> None:
    q = torch.ones(1, 1, 4)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        formula.scores(q, q, torch.tensor([0]), torch.tensor([0]), rotary_dim=3)


def test_the_model_without_positions_has_the_same_weights() -> None:
    state = torch.random.get_rng_state()
    with_xpos = models.build(64).state_dict()
    without = models.build(64, xpos=False).state_dict()
    assert set(with_xpos) - set(without) == {f"attn_layers.rotary_pos_emb.{name}" for name in ("inv_freq", "scale")}
    assert all(torch.equal(with_xpos[name], without[name]) for name in without)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_is_left_at_zero_or_one() -> None:
    constant = [name for name, parameter in models.build(64).named_parameters() if parameter.std() == 0]
    assert constant == []


def short_subject(dtype: torch.dtype = torch.float32) -> Subject:
    return Subject(torch.arange(64), 64, device=torch.device("cpu"), dtype=dtype)


@torch.no_grad()
def test_attention_is_far_from_uniform() -> None:
    net = models.build(64, flash=False)
    _, attention = net(short_subject().tokens, return_attn=True)
    assert all(layer[0, :, -1].max() > 8 / 64 for layer in attention)


def test_a_property_that_raises_fails_and_the_rest_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_subject: Subject) -> Iterator[Point]:
        yield Point(1, 0.0)
        raise RuntimeError("on\ntwo lines")

    def holds(_subject: Subject) -> Iterator[Point]:
        yield Point(1, 0.0)

    chosen = [
        properties.Property(name, name, measure, lambda _: 0.0) for name, measure in (("a", raises), ("b", holds))
    ]
    monkeypatch.setattr(properties, "PROPERTIES", chosen)
    first, second = properties.check(short_subject())
    assert (first.verdict, first.deviation, first.detail) == ("FAIL", None, "RuntimeError: on two lines")
    assert (second.verdict, second.deviation) == ("pass", 0.0)


def test_table_and_json_show_the_same_numbers() -> None:
    point = Point(7, 1.5e-3, "somewhere")
    results = (
        properties.Result("a", "a good one", 1.5e-3, 2.5e-3, "7 to 7", (point,)),
        properties.Result("b", "a bad one", 5e-3, 2.5e-3, "7 to 7", (point,)),
        properties.Result("c", "not a number", math.inf, 2.5e-3, "not finite at 7", (point,)),
        properties.Result("d", "an error", None, None, "KeyError: 'x'", error="KeyError: 'x'"),
    )
    found = package.Package(Path("x_transformers"), None, None)
    run: dict[str, str | int | float] = {
        "device": "cpu",
        "dtype": "float32",
        "max_len": 64,
        "text": "a",
        "model": "m",
        "torch": "2",
        "seconds": 1.0,
    }
    outcome = report.Report(found, run, results, 4.0)

    lines = report.table(outcome).splitlines()
    rows = [line.split("  ") for line in lines if line.startswith(tuple(result.name for result in results))]
    assert [[word.strip() for word in row if word.strip()][:4] for row in rows] == [
        ["a good one", "1.5e-03", "2.5e-03", "pass"],
        ["a bad one", "5.0e-03", "2.5e-03", "FAIL"],
        ["not a number", "inf/nan", "2.5e-03", "FAIL"],
        ["an error", "error", "error", "FAIL"],
    ]
    fields = json.loads(report.document(outcome))
    assert not fields["passed"]
    assert [(result["deviation"], result["tolerance"], result["passed"]) for result in fields["results"]] == [
        (1.5e-3, 2.5e-3, True),
        (5e-3, 2.5e-3, False),
        (None, 2.5e-3, False),
        (None, None, False),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    bad = torch.tensor([value])
    assert deviation(bad, bad) == math.inf
    result = properties.Result("key", "name", math.inf, 1.0, "")
    assert not result.passed


# on copies that are broken


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return tmp_path


def append(copy: Path, code: str) -> None:
    """Add code to the module in the copy, and say in the record that it belongs there."""
    module, record = (copy / PACKAGE.name / name for name in ("x_transformers.py", "xpos/provenance.json"))
    module.write_text(f"{module.read_text(encoding='utf-8')}\n{code}", encoding="utf-8")
    fields = json.loads(record.read_text(encoding="utf-8"))
    fields["files"]["x_transformers/x_transformers.py"] = hashlib.sha256(module.read_bytes()).hexdigest()
    record.write_text(json.dumps(fields), encoding="utf-8")


CENTER_OF_ALL_POSITIONS = """
_with_window = RotaryEmbedding.forward
def _without_window(self, t, offset = 0, seq_len = None):
    return _with_window(self, t)
RotaryEmbedding.forward = _without_window
"""

KEYS_BEFORE_THE_QUERIES_ONE_OFF = """
_right = RotaryEmbedding.forward
def _one_off(self, t, offset = 0, seq_len = None):
    return _right(self, t - (t < offset).long(), offset, seq_len)
RotaryEmbedding.forward = _one_off
"""

KEYS_WITHOUT_DECAY = """
_with_factors = XPosTable.with_factors
def _without_decay(self, *args):
    table = _with_factors(self, *args)
    q_factor, k_factor = table.factors
    table.factors = (q_factor, k_factor / k_factor.abs())
    return table
XPosTable.with_factors = _without_decay
"""

RAISES_WITH_MEMS = """
_no_mems = AttentionLayers.forward
def _raises(self, *args, mems = None, **kwargs):
    assert mems is None, 'no mems today'
    return _no_mems(self, *args, **kwargs)
AttentionLayers.forward = _raises
"""

DECODING = {"cached-whole", "cached-new", "chunked", "mems", "scores-cache"}


@pytest.mark.parametrize(
    ("code", "must_fail", "must_pass"),
    [
        pytest.param(CENTER_OF_ALL_POSITIONS, {"scores-cache"}, {"prefix", "scores"}, id="center"),
        pytest.param(KEYS_BEFORE_THE_QUERIES_ONE_OFF, DECODING, {"prefix", "scores"}, id="one-off"),
        pytest.param(KEYS_WITHOUT_DECAY, {"prefix", "scores", *DECODING}, {"shift"}, id="no-decay"),
        pytest.param(RAISES_WITH_MEMS, {"mems"}, set(KEYS) - {"mems"}, id="raises"),
    ],
)
def test_a_broken_package_fails_where_it_is_broken(
    code: str, must_fail: set[str], must_pass: set[str], copy: Path
) -> None:
    append(copy, code)
    result = run(copy, *SHORT, "--json", path=copy)
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    # it is the properties that fail, not the comparison with the record
    assert found["package"]["modified"] == found["package"]["unpatched"] == []
    assert must_fail <= failed(found)
    assert not must_pass & failed(found)


def test_the_unpatched_release_is_told_from_the_fork(copy: Path) -> None:
    for name in reversed(hatch_build.read_series(LINE)):
        subprocess.run(["git", "apply", "--reverse", str(LINE / name)], cwd=copy, check=True)
    (copy / PACKAGE.name / "xpos" / "provenance.json").unlink()
    result = run(copy, *SHORT, path=copy)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("UNPATCHED ") == 2
    assert "RotaryEmbedding.forward takes no seq_len" in result.stdout
    rows = {line[: line.index("  ")]: " FAIL " in line for line in result.stdout.splitlines() if "  " in line}
    assert rows["shift of positions"]
    assert rows["scores, long cache"]
    assert not rows["prefix consistency"]


def test_a_modified_file_is_told_although_every_property_holds(copy: Path) -> None:
    with (copy / PACKAGE.name / "attend.py").open("a", encoding="utf-8") as file:
        file.write("\n# a note\n")
    result = run(copy, *SHORT, path=copy)
    assert result.returncode == 1, result.stderr
    assert "MODIFIED  not as they were built: x_transformers/attend.py" in result.stdout
    assert f"all {len(KEYS)} properties hold, but the package is MODIFIED" in result.stdout
