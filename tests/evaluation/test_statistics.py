import itertools
import math

import numpy as np
import pytest

from diffusers_dim.evaluation.benchmark import CaseScore, Figure, Scores
from diffusers_dim.evaluation.statistics import agreement, compare, mean_interval, mean_of_means_interval, sign_flip_p


def scores(given, judge="a judge", benchmark="imgedit", run=None, **kwargs):
    """Scores of cases named by group and number, from values by group."""
    cases = [
        CaseScore(f"{group}{i}", group, value) for group, values in given.items() for i, value in enumerate(values)
    ]
    return Scores(benchmark, run or {}, {}, cases, judge, **kwargs)


# Intervals


def test_interval_of_a_mean_is_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(3.5, 0.8, 600)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert mean_interval(values.tolist()) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )


def test_interval_of_successes_is_that_of_the_binomial_distribution():
    # Binomial(100, 0.3) lies in 21 .. 39 with its quantiles at 2.5% and 97.5%.
    assert mean_interval([1.0] * 30 + [0.0] * 70) == pytest.approx((0.21, 0.39), abs=0.011)


def test_interval_is_that_of_values_drawn_one_by_one():
    values = np.array([1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 3.33, 1.67])
    drawn = np.random.default_rng(5).choice(values, (20_000, len(values))).mean(axis=1)
    assert mean_interval(values.tolist()) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.08)


def test_interval_over_groups_resamples_within_each():
    rng = np.random.default_rng(2)
    groups = {"few": rng.normal(1, 1, 50), "many": rng.normal(4, 0.5, 400), "none": np.array([])}
    mean = (groups["few"].mean() + groups["many"].mean()) / 2
    half = 1.96 / 2 * math.sqrt(groups["few"].var() / 50 + groups["many"].var() / 400)
    found = mean_of_means_interval({name: values.tolist() for name, values in groups.items()})
    assert found == pytest.approx((mean - half, mean + half), abs=0.12 * half)


def test_intervals_hold_the_truth_95_times_in_100():
    rng, held = np.random.default_rng(3), 0
    for _ in range(200):
        low, high = mean_of_means_interval({str(mean): rng.normal(mean, 1, 40).tolist() for mean in (1, 2, 3)})
        held += low <= 2 <= high
    assert 0.91 <= held / 200 <= 0.98


def test_interval_does_not_depend_on_the_order_of_values():
    values = [1.0, 2.5, 4.0, 2.5, 5.0]
    assert mean_interval(values) == mean_interval(values[::-1])


def test_interval_of_equal_values_has_no_width():
    assert mean_interval([4.0, 4.0, 4.0]) == (4.0, 4.0)


@pytest.mark.parametrize("groups", [{}, {"a": []}, {"a": [1.0]}, {"a": [1.0, 2.0], "b": [3.0]}])
def test_there_is_no_interval_without_two_values_a_group(groups):
    assert mean_of_means_interval(groups) == (None, None)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_interval_refuses_values_that_are_not_finite(value):
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, value])


# Sign flips


def test_p_of_few_pairs_is_exact():
    differences, weights = [0.5, -0.25, 1.0, 0.75, -0.1], [0.5, 0.5, 0.2, 0.2, 0.2]
    terms = np.multiply(differences, weights)
    sums = [abs(np.dot(signs, terms)) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean([total >= abs(terms.sum()) - 1e-12 for total in sums])
    assert sign_flip_p(differences, weights) == expected


def binomial_p(positive, pairs):
    """The two-sided sign test's p, for differences of one size."""
    return 2 * sum(math.comb(pairs, k) for k in range(positive, pairs + 1)) / 2**pairs


@pytest.mark.parametrize(("positive", "pairs", "tolerance"), [(8, 10, 1e-12), (11, 12, 1e-12), (21, 30, 0.01)])
def test_p_of_equal_differences_is_the_sign_tests(positive, pairs, tolerance):
    differences = [0.1] * positive + [-0.1] * (pairs - positive)
    assert sign_flip_p(differences) == pytest.approx(binomial_p(positive, pairs), abs=tolerance)


def test_pairs_without_a_difference_do_not_change_p():
    assert sign_flip_p([1.0, 1.0, 1.0, 0.0, 0.0]) == sign_flip_p([1.0, 1.0, 1.0]) == 0.25


def test_p_is_1_where_nothing_differs():
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_p_of_many_pairs_is_never_0():
    assert sign_flip_p([1.0] * 200) == 1 / 10_001


def test_p_is_below_5_percent_5_times_in_100_where_runs_do_not_differ():
    rng = np.random.default_rng(4)
    low = [sign_flip_p(rng.normal(0, 1, 12).tolist()) <= 0.05 for _ in range(600)]
    assert 0.03 <= np.mean(low) <= 0.075


# Comparisons


def test_overall_difference_is_of_means_over_groups():
    a = scores({"add": [1.0, 2.0], "style": [4.0, 4.0, 4.0, 4.0]})
    b = scores({"add": [2.0, 3.0], "style": [4.0, 4.0, 4.0, 5.0]})
    found = compare(a, b)
    assert (found.overall.a, found.overall.b) == (2.75, 3.375)
    assert found.overall.value == 0.625
    assert (found.overall.higher, found.overall.equal, found.overall.lower) == (3, 3, 0)
    assert found.groups["style"].value == 0.25
    assert list(found.groups) == ["add", "style"]


def test_overall_difference_is_of_means_over_cases_where_the_benchmarks_is():
    a = scores({"add": [1.0, 2.0], "style": [4.0, 4.0, 4.0, 4.0]}, mean_of_groups=False)
    b = scores({"add": [2.0, 3.0], "style": [4.0, 4.0, 4.0, 5.0]}, mean_of_groups=False)
    assert compare(a, b).overall.value == pytest.approx(0.5)


def test_groups_are_compared_in_the_benchmarks_order():
    a, b = scores({"remove": [1.0], "add": [2.0]}), scores({"remove": [2.0], "add": [2.0]})
    a.figures.update({name: Figure(1.0, 1, 1) for name in ("add", "remove", "overall")})
    assert list(compare(a, b).groups) == ["add", "remove"]


def test_p_of_the_overall_difference_weighs_groups_alike():
    a = scores({"add": [1.0, 2.0], "style": [4.0, 4.0, 4.0, 4.0]})
    b = scores({"add": [2.0, 1.0], "style": [5.0, 4.5, 5.0, 4.25]})
    assert compare(a, b).overall.p == sign_flip_p([1.0, -1.0, 1.0, 0.5, 1.0, 0.25], [0.5] * 2 + [0.25] * 4)


def test_interval_of_a_difference_is_of_pairs():
    rng = np.random.default_rng(6)
    base = rng.normal(3, 1, 60)
    a, b = scores({"add": base.tolist()}), scores({"add": (base + rng.normal(0.3, 0.1, 60)).tolist()})
    found = compare(a, b).overall
    assert found.high - found.low < 0.1  # of unpaired runs it would be some 0.7
    assert found.low < found.value < found.high


def test_cases_with_a_score_in_one_run_alone_are_left_out_and_listed():
    found = compare(scores({"add": [1.0, 2.0, None, None]}), scores({"add": [3.0, None, 4.0, None]}))
    assert (found.overall.pairs, found.overall.value) == (1, 2.0)
    assert (found.only_a, found.only_b) == (["add1"], ["add2"])


def test_group_without_pairs_has_no_difference():
    found = compare(scores({"add": [1.0], "style": [None]}), scores({"add": [2.0], "style": [5.0]}))
    assert (found.groups["style"].pairs, found.groups["style"].value) == (0, None)
    assert found.overall.value == 1.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scores({"add": [1.0]}, benchmark="gedit"), "different benchmarks.*'imgedit' and 'gedit'"),
        (scores({"add": [1.0]}, judge="another"), "different judges.*'a judge' and 'another'"),
        (scores({"add": [1.0]}, judge=""), "different judges.*'a judge' and 'none'"),
        (Scores("imgedit", {}, {}, [CaseScore("add0", "style", 1.0)], "a judge"), "different data.*'add0'"),
    ],
)
def test_runs_that_have_nothing_in_common_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        compare(scores({"add": [1.0]}), other)


# Agreement


def test_agreement_of_judges_of_whom_one_scores_higher():
    found = agreement(scores({"add": [1.0, 2.0, 3.0]}), scores({"add": [1.5, 2.5, 4.0]}, judge="another"))
    assert found.pairs == 3
    assert found.pearson == pytest.approx(2.5 / math.sqrt(2 * 3.1666667))
    assert found.spearman == pytest.approx(1)
    assert found.mean_difference == found.mean_absolute_difference == pytest.approx(2 / 3)
    assert found.within_half_a_point == pytest.approx(2 / 3)


def test_tied_ranks_are_averaged():
    found = agreement(scores({"add": [1.0, 2.0, 2.0, 3.0]}), scores({"add": [1.0, 2.0, 3.0, 4.0]}, judge="another"))
    assert found.spearman == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_differences_of_both_signs_do_not_cancel():
    found = agreement(scores({"add": [1.0, 3.0]}), scores({"add": [2.0, 2.0]}, judge="another"))
    assert (found.mean_difference, found.mean_absolute_difference) == (0.0, 1.0)


def test_there_is_no_correlation_with_a_judge_who_gives_all_the_same():
    found = agreement(scores({"add": [1.0, 3.0]}), scores({"add": [2.0, 2.0]}, judge="another"))
    assert (found.pearson, found.spearman) == (None, None)


def test_judges_who_share_no_case_have_no_agreement():
    found = agreement(scores({"add": [1.0, None]}), scores({"add": [None, 2.0]}, judge="another"))
    assert found.pairs == 0
    assert (found.pearson, found.mean_absolute_difference, found.within_half_a_point) == (None, None, None)


def test_judges_of_different_pictures_are_refused():
    with pytest.raises(ValueError, match="two runs"):
        agreement(scores({"add": [1.0]}, run={"seed": 1}), scores({"add": [1.0]}, run={"seed": 2}))
