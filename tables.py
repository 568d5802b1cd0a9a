"""Numbers as Markdown tables."""

import numpy as np


def table(titles, rows):
    """A Markdown table. titles: of its columns; rows: of as many cells each, all of them text."""
    return "\n".join([row_of(titles), "|---" * len(titles) + "|", *map(row_of, rows)])


def row_of(cells):
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def spread(values, digits=4):
    """Mean ± standard deviation, such as of several seeds; of one value the number itself."""
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"
