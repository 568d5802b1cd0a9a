"""Markdown tables."""

import tables


def test_a_table_has_a_rule_below_its_titles_and_a_line_for_each_row():
    lines = ["| a | b |", "|---|---|", "| 1 | 2 |", "| 3 |  |"]
    assert tables.table(["a", "b"], [["1", "2"], ["3", ""]]) == "\n".join(lines)


def test_a_spread_is_the_standard_deviation_of_a_sample():
    """Of 1 and 3 it is sqrt(2), with n - 1; of one value there is none."""
    assert tables.spread([1, 3], 3) == "2.000 ± 1.414" and tables.spread([0.5]) == "0.5000"
