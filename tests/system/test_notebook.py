"""The notebook: its code runs in order, its saved outputs are there, its links work."""

import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.filterwarnings("default", r"error:.* is now kd_plugins:DeprecationWarning")
def test_cells_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        source = "".join(cell["source"])
        if not source.startswith("%pip"):
            exec(compile(source, f"quickstart.ipynb, cell {number}", "exec"), names)
    assert names["found"].mean() > 0.5 and sum(names["after"]) < names["wrong"].sum()


def test_outputs_are_saved_and_small():
    """In the order in which a reader runs the cells, and without an error."""
    executed = [cell["execution_count"] for cell in CODE if cell["execution_count"]]
    assert executed == list(range(1, len(CODE)))  # all but the installation
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        *("stream", "display_data", "execute_result")
    }
    assert PATH.stat().st_size < 500_000


def test_the_table_of_the_training_has_few_columns():
    [table] = [
        "".join(output["data"]["text/html"])
        for cell in CODE
        for output in cell["outputs"]
        if "Validation Loss" in "".join(output.get("data", {}).get("text/html", ""))
    ]
    columns = re.findall(r"<th>(.*?)</th>", table)
    assert columns[:3] == ["Epoch", "Training Loss", "Validation Loss"] and len(columns) <= 6


def test_links_lead_to_pages():
    text = "".join(
        line for cell in CELLS if cell["cell_type"] == "markdown" for line in cell["source"]
    )
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert targets and all((PATH.parent / target).exists() for target in targets)
