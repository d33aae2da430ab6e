"""Cases that only ``make check`` runs, while ``make test`` runs a part that shows each law at work."""

import pytest


def some_slow(*values):
    """These cases, slow; a case is a value, or a tuple of several."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


def all_but(quick, values):
    """All cases in their order, slow except for the ``quick`` ones."""
    assert set(quick) <= set(values)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def one_in(count, cases):
    """All cases in their order, slow except for every ``count``-th; a case is a value, or a tuple of several."""
    several = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [[] if index % count == 0 else [pytest.mark.slow] for index in range(len(several))]
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=mark) for case, mark in zip(several, marks, strict=True)
    ]
