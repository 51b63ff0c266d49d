# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Intervals of means, paired comparisons of two runs and the agreement of two judges.

All is deterministic: resamples and flips come from one fixed seed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .benchmark import Scores


RESAMPLES, FLIPS, LEVEL = 2_000, 10_000, 95.0
_SEED = 233


@dataclass(frozen=True)
class Difference:
    """
    Two runs over the cases that both were scored on.

    Args:
        pairs (`int`): How many cases these are.
        a, b (`float`, *optional*): The runs' means over them; `None` where there is no pair.
        value (`float`, *optional*): `b - a`.
        low, high (`float`, *optional*):
            Its 95% interval, by paired bootstrap; `None` as in [`mean_of_means_interval`].
        p (`float`, *optional*): Two-sided, by flipping the signs of the pairs' differences.
        higher, equal, lower (`int`): In how many pairs `b` has the higher, the same and the lower score.
    """

    pairs: int
    a: float | None
    b: float | None
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    higher: int
    equal: int
    lower: int


@dataclass(frozen=True)
class Comparison:
    """
    Two runs of one benchmark, paired by case.

    Args:
        overall ([`Difference`]): Of the overall score.
        groups (`dict[str, Difference]`): By group, in the benchmark's order.
        only_a, only_b (`list[str]`): The keys of the cases that have a score in one of them alone; they are left out.
    """

    overall: Difference
    groups: dict[str, Difference]
    only_a: list[str]
    only_b: list[str]


@dataclass(frozen=True)
class Agreement:
    """
    Two judges over the same pictures.

    Args:
        pairs (`int`): How many cases both scored.
        pearson, spearman (`float`, *optional*):
            Correlations, the second of ranks, tied ones averaged; `None` where a judge gave everything the same score.
        mean_difference (`float`, *optional*):
            By how much the second judge scores higher; `None` where there is no pair.
        mean_absolute_difference (`float`, *optional*): In points of the score; `None` where there is no pair.
        within_half_a_point (`float`, *optional*): The part of pairs that differ by 0.5 or less, in [0, 1].
    """

    pairs: int
    pearson: float | None
    spearman: float | None
    mean_difference: float | None
    mean_absolute_difference: float | None
    within_half_a_point: float | None


def mean_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """
    The 95% interval of a mean, by the percentile bootstrap: 2,000 times as many values are drawn with replacement.

    Values that are all the same give an interval of no width: the bootstrap knows nothing of what it did not see.

    Returns:
        `tuple`: Its ends, or `None` twice for fewer than two values, which say nothing of their spread.

    Raises:
        ValueError: If a value is not finite.
    """
    return mean_of_means_interval({"": values})


def mean_of_means_interval(
    values_by_group: Mapping[str, Sequence[float]],
) -> tuple[float, float] | tuple[None, None]:
    """
    The 95% interval of the mean over groups' means, as [`mean_interval`], each group resampled by itself.

    Args:
        values_by_group (`Mapping[str, Sequence[float]]`): Groups without values are passed over.

    Returns:
        `tuple`:
            Its ends, or `None` twice where there is no value or a group has just one: its spread is unknown, and an
            interval without it would be too narrow.

    Raises:
        ValueError: If a value is not finite.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in values_by_group.values() if len(values)]
    if not all(np.isfinite(values).all() for values in groups):
        raise ValueError("An interval needs finite values, but got inf or nan among them.")
    if not groups or min(map(len, groups)) < 2:
        return None, None
    rng, means = np.random.default_rng(_SEED), np.zeros(RESAMPLES)
    for values in map(np.sort, groups):  # the same interval in whatever order cases come
        for part in np.array_split(means, 10):  # a part at a time for memory
            part += values[rng.integers(0, len(values), (len(part), len(values)))].mean(axis=1) / len(groups)
    low, high = np.percentile(means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """
    How often a weighted sum of paired differences is as far from 0 as this one if each difference's sign is a coin's
    toss: the two-sided p of a paired permutation test.

    All flips are counted where there are at most 10,000 of them, else 10,000 random ones and the one seen.

    Args:
        differences (`Sequence[float]`): One a pair.
        weights (`Sequence[float]`, *optional*):
            Of each in the sum, such as one over its group's size; all 1 by default.
    """
    terms = np.asarray(differences, dtype=np.float64) * (1.0 if weights is None else np.asarray(weights))
    terms = terms[terms != 0]  # their sign changes nothing
    seen = abs(terms.sum()) * (1 - 1e-9)  # as far in exact numbers is as far here, whatever the rounding
    if 2 ** len(terms) <= FLIPS:
        signs = 1.0 - 2.0 * (np.arange(2 ** len(terms))[:, None] >> np.arange(len(terms)) & 1)
        return float((abs(signs @ terms) >= seen).mean())
    rng, further = np.random.default_rng(_SEED), 1
    for size in [FLIPS // 10] * 10:  # a part at a time for memory
        signs = 1.0 - 2.0 * rng.integers(0, 2, (size, len(terms)), dtype=np.int8)
        further += int((abs(signs @ terms) >= seen).sum())
    return further / (FLIPS + 1)


def compare(a: Scores, b: Scores) -> Comparison:
    """
    What run `b` has more than run `a`, over the cases that have a score in both.

    The overall difference is one of means over groups' means where the benchmark's overall score is such a mean
    (`Scores.mean_of_groups`), else one of means over cases. The p of the groups are not corrected for their number.

    Raises:
        ValueError: If the runs are of different benchmarks, judges or groups of cases.
    """
    for what, given in {"benchmarks": (a.benchmark, b.benchmark), "judges": (a.judge, b.judge)}.items():
        if given[0] != given[1]:
            raise ValueError(
                f"Runs of different {what} cannot be compared: {given[0] or 'none'!r} and {given[1] or 'none'!r}."
            )
    pairs, only_a, only_b = _pairs(a, b)
    groups_of_b = {case.key: case.group for case in b.cases}
    moved = [case.key for case in a.cases if groups_of_b.get(case.key, case.group) != case.group]
    if moved:
        raise ValueError(
            f"The runs are over different data: {len(moved)} cases are of another group, such as {moved[0]!r}."
        )
    by_group: dict[str, list[tuple[float, float]]] = {group: [] for group in (*a.groups, *b.groups)}
    for key, pair in pairs.items():
        by_group[groups_of_b[key]].append(pair)
    groups = {group: _difference([scores]) for group, scores in by_group.items()}
    every = list(by_group.values()) if a.mean_of_groups else [list(pairs.values())]
    return Comparison(_difference(every), groups, only_a, only_b)


def agreement(a: Scores, b: Scores) -> Agreement:
    """
    How far two judges agree on the same pictures, over the cases that both scored.

    Raises:
        ValueError: If the scores are of different benchmarks or runs.
    """
    if a.benchmark != b.benchmark or a.run != b.run:
        raise ValueError("Two judges are compared over the same pictures, but the scores are of two runs.")
    pairs = np.array(list(_pairs(a, b)[0].values()), dtype=np.float64).reshape(-1, 2)
    difference = pairs[:, 1] - pairs[:, 0]
    # A sum of decimals may be off by a last bit, and a difference of half a point counts.
    near = abs(difference) <= 0.5 + 1e-9
    return Agreement(
        pairs=len(pairs),
        pearson=_correlation(pairs[:, 0], pairs[:, 1]),
        spearman=_correlation(_ranks(pairs[:, 0]), _ranks(pairs[:, 1])),
        mean_difference=_mean(difference),
        mean_absolute_difference=_mean(abs(difference)),
        within_half_a_point=_mean(near),
    )


def _pairs(a: Scores, b: Scores) -> tuple[dict[str, tuple[float, float]], list[str], list[str]]:
    """The scores of the cases that both have by key, and the keys of the cases that one alone has a score for."""
    first, second = ({case.key: case.score for case in run.cases if case.score is not None} for run in (a, b))
    return (
        {key: (score, second[key]) for key, score in first.items() if key in second},
        [key for key in first if key not in second],
        [key for key in second if key not in first],
    )


def _difference(groups: Iterable[list[tuple[float, float]]]) -> Difference:
    """Of means over the groups' means; groups without pairs are passed over."""
    pairs = [np.array(group, dtype=np.float64) for group in groups if group]
    if not pairs:
        return Difference(0, None, None, None, None, None, None, 0, 0, 0)
    first, second = (float(np.mean([group[:, run].mean() for group in pairs])) for run in (0, 1))
    differences = [group[:, 1] - group[:, 0] for group in pairs]
    low, high = mean_of_means_interval({str(i): group.tolist() for i, group in enumerate(differences)})
    every = np.concatenate(differences)
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in differences])
    return Difference(
        pairs=len(every),
        a=first,
        b=second,
        value=second - first,
        low=low,
        high=high,
        p=sign_flip_p(every.tolist(), weights.tolist()),
        higher=int((every > 0).sum()),
        equal=int((every == 0).sum()),
        lower=int((every < 0).sum()),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    if len(first) < 2 or not np.ptp(first) or not np.ptp(second):
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the mean of them for tied values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
