"""The answers of a study to the questions of config.study.questions: contrasts of arms, tested together.

A contrast is a formula over arms, such as "noisy/rankclip - noisy/clip - clean/rankclip + clean/clip", in one metric.
Its value is taken seed by seed, so that the common luck of a seed cancels. Two-sided t-tests; Holm's method corrects
for the number of all contrasts of all questions (Holm 1979, Scandinavian Journal of Statistics 6).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.study.arms import Arm
from rankclip_jax.study.statistics import Estimate, estimate

_TERM = re.compile(r"\s*([+-]?)\s*([\w.]+(?:/[\w.]+)?)")


class Answer(NamedTuple):
    """One contrast: its estimate, p and Holm's p (None: fewer than two seeds)."""

    question: str
    label: str
    metric: str
    estimate: Estimate
    p: float | None
    holm: float | None


def check(questions: ConfigDict, arms: list[Arm]) -> None:
    """Raises InputError for a question that is not {"metric": NAME, "contrasts": {label: formula}}, or as `terms`."""
    for name, asked in questions.items():
        of = dict(asked) if isinstance(asked, ConfigDict) else {}
        if of.keys() != {"metric", "contrasts"} or not isinstance(of["contrasts"], ConfigDict):
            expected = '{"metric": NAME, "contrasts": {label: formula}}'
            raise InputError(f"config.study.questions.{name} is not a question. Expected {expected}")
        for formula in asked.contrasts.values():
            terms(formula, arms)


def terms(formula: str, arms: list[Arm]) -> list[tuple[int, Arm]]:
    """[(1 or -1, arm)]. Raises InputError for a formula that is none, or names what the study does not train."""
    known, found, at = {str(arm): arm for arm in arms}, [], 0
    formula = str(formula).strip()
    while not found or at < len(formula):
        match = _TERM.match(formula, at)
        if not match or (found and not match[1]):
            raise InputError(f"config.study.questions: {formula!r}. Expected a formula such as 'a/rankclip - a/clip'")
        if match[2] not in known:
            raise InputError(f"config.study.questions: no arm {match[2]!r}. Expected one of {', '.join(known)}")
        found.append((-1 if match[1] == "-" else 1, known[match[2]]))
        at = match.end()
    return found


def check_metrics(questions: ConfigDict, final: Mapping[str, float]) -> None:
    """Raises InputError for a question about what a run did not measure. `final`: its numbers."""
    for name, asked in questions.items():
        if asked.metric not in final:
            near = ", ".join(difflib.get_close_matches(asked.metric, final, 3, 0.0))
            where = f"config.study.questions.{name}.metric={asked.metric!r}"
            raise InputError(f"{where} is not measured; the nearest are {near}. What is done stays: correct it, resume")


def answers(questions: ConfigDict, arms: list[Arm], runs: list[dict]) -> list[Answer]:
    """Every contrast of every question, over the seeds that all its arms have. Raises InputError as `check_metrics`."""
    found = []
    for run in runs:
        check_metrics(questions, run["final"])
    for question, asked in questions.items():
        for label, formula in asked.contrasts.items():
            signed = [
                {r["seed"]: sign * r["final"][asked.metric] for r in runs if _arm(r) == arm}
                for sign, arm in terms(formula, arms)
            ]
            seeds = sorted(set.intersection(*map(set, signed)))
            seen = [sum(own[seed] for own in signed) for seed in seeds]
            found.append(Answer(question, label, asked.metric, estimate(seen), _p(seen), None))
    corrected = holm([answer.p for answer in found])
    return [answer._replace(holm=p) for answer, p in zip(found, corrected, strict=True)]


def _arm(run):
    return Arm(run["condition"], run["objective"])


def _p(values):
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0] == 0)
    return float(scipy.stats.ttest_1samp(values, 0).pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's corrected p of each: the i-th smallest of n times (n - i + 1), and never below a smaller one's."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    result: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, (p, i) in enumerate(known):
        result[i] = least = max(least, min(1.0, p * (len(known) - rank)))
    return result
