import re
from pathlib import Path

import pytest

import fedspa_kernels
from fedspa_kernels import dispatch

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_has_examples():
    assert len(BLOCKS) == 3


def test_somebody_elses_script_is_short():
    assert len([line for line in BLOCKS[1].splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("block", BLOCKS, ids=("functions", "script", "checks"))
def test_its_examples_run(block):
    exec(compile(block, "kernels/README.md", "exec"), {})


def test_its_tables_name_every_operator_and_nothing_that_is_not_there():
    backends = README.partition("## Backends")[2].partition("`python -m")[0]
    for table in (README.partition("## Use")[0], backends):
        for operator in dispatch.operators():
            assert f"`{operator}" in table
    for name in re.findall(r"^\| `(\w+)", README, flags=re.MULTILINE):
        assert name in fedspa_kernels.__all__
