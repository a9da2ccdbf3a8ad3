"""The committed table of faults is what the committed figures say."""

import json

import pytest

from .test_benchmarks import BENCHMARKS


def test_the_table_is_made_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from losing.table import PAGE, SOURCE, markdown

    result = json.loads(SOURCE.read_text())
    assert PAGE.read_text() == markdown(result)
    names = {row[""] for row in result["tables"]["F1 to F20"]}
    assert names == {f"F{number}" for number in range(1, 21)}
