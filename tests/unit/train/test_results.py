"""The file to which many runs add their results."""

from kd_plugins.train import append_result, read_results


def test_results_of_many_runs(tmp_path):
    """A line that a kill has cut short is left out, and does not spoil the next one."""
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    results = [{"method": "ce", "accuracy": 0.5}, {"method": "gce", "of": {"a": 1}}]
    for result in results:
        append_result(path, result)
    assert read_results(path) == results
    path.write_text(path.read_text()[:-5])
    append_result(path, {"method": "smkd"})
    assert read_results(path) == [results[0], {"method": "smkd"}]
