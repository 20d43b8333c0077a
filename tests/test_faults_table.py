"""reliability.md names tests that exist and run when it says."""

import ast
import re

from tests.paths import REPOSITORY

FOLDER = REPOSITORY / "tests"


def marks(function: ast.FunctionDef) -> str:
    """Whether every case of a test is slow ("S"), or none, or some ("F")."""
    return "S" if any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in function.decorator_list) else "F"


def functions() -> dict[str, ast.FunctionDef]:
    return {
        f"{path.stem}.{node.name}": node
        for path in FOLDER.glob("test_*.py") for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }  # fmt: skip


def test_every_row_is_real():
    found = functions()
    rows = re.findall(r"^\| ([A-Z]\d.*?) \| (.+?) \| ([FS]) \| (.+?) \|$", (FOLDER / "reliability.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 50
    for identity, _, when, names in rows:
        for name in names.split(", "):
            assert name in found, f"{identity}: there is no test {name}"
            # a test whose cases are slow for most methods runs some of them always
            if name != "test_resume.test_every_method_resumes":
                assert marks(found[name]) == when, f"{identity}: {name}"


def test_the_rows_of_faults_are_complete():
    """A test of faults that no row names would be forgotten."""
    text = (FOLDER / "reliability.md").read_text(encoding="utf-8")
    helpers = {"test_faults_table", "test_faults_options.test_bounds_of_every_kind", "test_faults_options.test_the_command_line_refuses_before"}
    unnamed = [name for name in functions() if name.startswith("test_faults") and name not in text and not name.startswith(tuple(helpers))]
    assert not unnamed
