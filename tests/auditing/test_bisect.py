"""The search for modules to keep: against brute force, within its budget, honest about what it did not find."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.auditing.bisect import Candidate, Ending, bisect, candidate_tree

PATHS = ["a", "b", "b.0", "b.1", "b.1.x", "b.1.y", "c"]


def covered(keep: tuple[str, ...], path: str) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in keep)


def test_the_tree_of_paths():
    tree = candidate_tree(PATHS)
    assert [node.path for node in tree] == ["a", "b", "c"]
    assert [node.path for node in tree[1].children] == ["b.0", "b.1"]
    assert [node.path for node in tree[1].children[1].children] == ["b.1.x", "b.1.y"]
    assert [node.path for node in candidate_tree(["m.0.a", "m.0.b"])] == ["m.0.a", "m.0.b"]


@pytest.mark.parametrize(
    "guilty", [["a"], ["b.1.x"], ["b.1.x", "c"], ["b.0", "b.1.y"], ["b"], ["a", "b.0", "b.1.x", "b.1.y", "c"]]
)
def test_culprits_are_found_where_they_are(guilty: list[str]):
    """Each guilty module adds 1 to the error until it, or what it lies in, is kept."""
    result = bisect(
        candidate_tree(PATHS), lambda keep: float(sum(not covered(keep, one) for one in guilty)), tolerance=0.5
    )
    assert result.ending is Ending.FOUND
    assert all(covered(result.keep, one) for one in guilty)
    assert result.error_after == 0
    if guilty not in (["b"], ["a", "b.0", "b.1.x", "b.1.y", "c"]):
        assert sorted(result.keep) == sorted(guilty)


@given(
    st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 7),
)
@settings(deadline=None, max_examples=200)
def test_sets_are_minimal_for_monotone_errors(causes: list[set[int]], size: int):
    """The error goes away when every cause has a module kept; brute force says what the smallest sets are."""
    causes = [{index % size for index in cause} for cause in causes]
    names = [f"m{index}" for index in range(size)]

    def error(keep: tuple[str, ...]) -> float:
        return float(sum(not any(f"m{index}" in keep for index in cause) for cause in causes))

    result = bisect([Candidate(name) for name in names], error, tolerance=0.0)
    assert result.ending is Ending.FOUND
    assert error(result.keep) == 0
    for name in result.keep:
        assert error(tuple(one for one in result.keep if one != name)) > 0
    smallest = next(n for n in range(size + 1) if any(not error(c) for c in combinations(names, n)))
    assert len(result.keep) >= smallest


@given(st.dictionaries(st.frozensets(st.sampled_from("abcde")), st.floats(0, 2)), st.integers(2, 60))
@settings(deadline=None, max_examples=200)
def test_any_error_function_ends_within_the_budget(errors: dict[frozenset[str], float], budget: int):
    def error(keep: tuple[str, ...]) -> float:
        return errors.get(frozenset(keep), 1.5)

    result = bisect([Candidate(name) for name in "abcde"], error, tolerance=1.0, budget=budget)
    assert len(result.evaluations) <= budget
    assert len({frozenset(one.keep) for one in result.evaluations}) == len(result.evaluations)
    if result.ending in (Ending.FOUND, Ending.BUDGET):
        assert error(result.keep) <= 1.0
    if result.ending is Ending.FOUND:
        for name in result.keep if len(result.keep) > 1 else ():
            assert error(tuple(one for one in result.keep if one != name)) > 1.0


def test_nothing_to_do_and_nothing_to_be_done():
    tree = candidate_tree(PATHS)
    assert bisect(tree, lambda keep: 0.1, tolerance=0.5).ending is Ending.NOT_NEEDED
    result = bisect(tree, lambda keep: 0.7, tolerance=0.5)
    assert (result.ending, result.keep, result.error_all) == (Ending.NOT_ENOUGH, (), 0.7)
    assert bisect(tree, lambda keep: float("nan"), tolerance=0.5).ending is Ending.NOT_ENOUGH
