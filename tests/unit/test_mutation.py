"""The tool that breaks the package: its changes are small, can be run, and leave what is written for readers alone."""

import importlib.util
from pathlib import Path

SOURCE = b'''"""A docstring with 1 number."""
LIMIT: int = 3


def checked(rows, names=("a", "b")):
    """Another, with 2."""
    if not rows or len(rows) > LIMIT and rows[0] is None:
        raise ValueError(f"{len(rows) + 1} rows; allowed are {LIMIT}")
    rows.append("end")
    return {name: row - 1 for name, row in zip(names, rows, strict=True) if row}
'''


def load():
    path = Path(__file__).parents[2] / "tools" / "mutation.py"
    spec = importlib.util.spec_from_file_location("mutation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_changes_are_small_and_leave_prose_alone():
    found = {}
    for mutation in load().mutations("checked.py", SOURCE):
        start, end = mutation["span"]
        changed = SOURCE[:start] + mutation["new"].encode() + SOURCE[end:]
        compile(changed, "checked.py", "exec")
        found.setdefault(mutation["old"], set()).add(mutation["new"])
    assert found["3"] == {"(4)", "(2)"} and found["0"] == {"(1)", "(-1)"}
    assert found['"a"'] == {"'ax'"}
    assert found["len(rows) > LIMIT"] == {"(len(rows) >= LIMIT)"}
    assert found["rows[0] is None"] == {"(rows[0] is not None)"}
    assert found["not rows"] == {"(rows)"}
    assert found["row - 1"] == {"(row + 1)"} and found["row"] == {"(not (row))"}
    assert found['rows.append("end")'] == {"pass"} and found['"end"'] == {"'endx'"}
    assert [new for old, new in found.items() if old.startswith("raise")] == [{"pass"}]
    assert [new for old, new in found.items() if old.startswith("return")] == [{"return None"}]
    assert not {"2", "True", "strict"} & found.keys()
    assert not any("allowed" in old for old in found if not old.startswith("raise"))
