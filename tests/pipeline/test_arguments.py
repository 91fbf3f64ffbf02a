"""The modules that are called with `python -m`: a slip is one line and exit code 2, before any work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import environment

BUILD, EXAMPLES, MEASURE = "pipeline.nano.build", "pipeline.nano.examples", "pipeline.nano.measure"
BEHAVIOUR, HELD_OUT = "pipeline.evaluate.behaviour", "pipeline.evaluate.held_out"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([BUILD, "--minutes", "-1"], "argument --minutes: '-1' is no number of minutes above 0"),
        ([BUILD, "--minutes", "nan"], "argument --minutes: 'nan' is no number of minutes above 0"),
        ([BUILD, "--out", "file"], "cai: file: File exists; choose a folder that can be written"),
        ([BUILD, "more"], "unrecognized arguments: more"),
        ([MEASURE, "--cases", "0"], "argument --cases: '0' is no whole number from 1"),
        ([MEASURE, "gone"], "cai: gone: no config.json here; give a model's folder"),
        ([MEASURE, "broken"], "cai: broken: cannot be loaded ("),
        ([BEHAVIOUR], "the following arguments are required: run; see `python -m pipeline.evaluate.behaviour --help`"),
        ([BEHAVIOUR, "gone"], "cai: gone: no run here"),
        ([HELD_OUT, "gone"], "cai: gone: no models/sft; `cai run` or `cai train-sft` makes it"),
        ([HELD_OUT, "gone", "--cases", "0"], "argument --cases: '0' is no whole number from 1"),
        ([EXAMPLES, "--num", "0"], "argument --num: '0' is no whole number from 1"),
        ([EXAMPLES, "--out", "gone/file"], "cai: gone/file: No such file or directory; choose a folder"),
        (["pipeline.engines.scripted", "--port", "x"], "argument --port: invalid int value: 'x'"),
    ],
)
def test_a_slip_is_one_line_with_exit_code_2(tmp_path, arguments, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("no JSON")
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
