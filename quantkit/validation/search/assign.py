"""The best assignment of schemes to groups under a budget: an integer program, solved exactly.

Of every group one choice is taken. KL is taken as additive over groups, sizes are. Solved by HiGHS
(`scipy.optimize.milp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil

import numpy as np

from quantkit.errors import InputError
from quantkit.validation.search.groups import KEPT

Assignment = dict[str, str]
"""Group → title of its scheme, or `KEPT`."""

APART = 0.05
"""The share of groups in which a neighbour must differ."""


@dataclass(frozen=True)
class Choice:
    """One scheme of one group: what it costs in nats, and in bits."""

    group: str
    scheme: str
    kl: float
    bits: float


@dataclass(frozen=True)
class Totals:
    """What an assignment adds up to."""

    kl: float
    bits: float


def require_scipy() -> None:
    """InputError where the integer program cannot be solved."""
    if find_spec("scipy") is None:
        raise InputError(
            "--method auto needs scipy, which is not installed.",
            hint="pip install 'quantkit[search]'",
            code="search.no_scipy",
        )


def totals(choices: Sequence[Choice], assignment: Mapping[str, str]) -> Totals:
    """The sums over the choices that an assignment takes."""
    taken = [one for one in choices if assignment[one.group] == one.scheme]
    return Totals(sum(one.kl for one in taken), sum(one.bits for one in taken))


def least_kl(
    choices: Sequence[Choice], most_bits: float, others: Sequence[Assignment] = ()
) -> Assignment | None:
    """The assignment of least KL with at most so many bits, unlike each of `others` in `APART` of
    the groups; None where there is none."""
    return _solve(choices, [one.kl for one in choices], [one.bits for one in choices],
                  most_bits, others)  # fmt: skip


def least_bits(
    choices: Sequence[Choice], most_kl: float, others: Sequence[Assignment] = ()
) -> Assignment | None:
    """The smallest assignment with at most so much KL; see `least_kl`."""
    return _solve(choices, [one.bits for one in choices], [one.kl for one in choices],
                  most_kl, others)  # fmt: skip


def _solve(
    choices: Sequence[Choice],
    cost: Sequence[float],
    weight: Sequence[float],
    limit: float,
    others: Sequence[Assignment],
) -> Assignment | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    groups = {name: row for row, name in enumerate(dict.fromkeys(one.group for one in choices))}
    columns = np.arange(len(choices))
    rows = np.array([groups[one.group] for one in choices])
    once = csr_matrix((np.ones(len(choices)), (rows, columns)))
    costs, weights = np.array(cost), np.array(weight)
    unit, scale = max(weights.max(), 1e-30), max(costs.max(), 1e-30)
    held = [LinearConstraint(once, 1, 1), LinearConstraint(weights / unit, -np.inf, limit / unit)]
    most = len(groups) - max(1, ceil(APART * len(groups)))
    for other in others:
        same = np.array([float(other[one.group] == one.scheme) for one in choices])
        held.append(LinearConstraint(same, -np.inf, most))
    done = milp(
        costs / scale,
        constraints=held,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 120},
    )
    if done.x is None:
        return None
    return {
        one.group: one.scheme for one, taken in zip(choices, done.x, strict=True) if taken > 0.5
    }


def with_kept(choices: Sequence[Choice], weights: Mapping[str, int]) -> list[Choice]:
    """The choices and, for every group (group → its weights), to leave it in 16 bit."""
    return [*choices, *(Choice(name, KEPT, 0.0, 16.0 * count) for name, count in weights.items())]
