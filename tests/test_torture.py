"""What has to become of folders as they are found; see tests/torture.py."""

from __future__ import annotations

import re
import sys

import pytest

import torture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pipes, sockets, and names of any bytes")


@pytest.mark.parametrize("name", torture.CASES)
def test_data_check_tells_what_it_finds(name, tmp_path):
    case = torture.CASES[name]
    short, text = torture.check(case, torture.built(case, tmp_path))
    assert short == case.check, text
    assert re.search(case.says, text), text
    assert "Traceback" not in text


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return torture.Reference.of(tmp_path_factory.mktemp("torture"))


@pytest.mark.slow
@pytest.mark.parametrize("name", torture.CASES)
def test_train_and_predict_agree_with_it(name, tmp_path, reference):
    case = torture.CASES[name]
    found, _ = torture.outcome(case, torture.built(case, tmp_path), reference)
    assert found == (case.check, case.train, case.predict)


def test_the_page_is_that_of_these_cases():
    lines = torture.PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    expected = [
        [torture.escaping.markdown_cell(case.name), case.check, case.train, case.predict]
        for case in torture.CASES.values()
    ]
    assert [row[:4] for row in rows[2:]] == expected
