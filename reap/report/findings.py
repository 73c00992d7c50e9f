"""What a reader should know first, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from reap.files.units import counted
from reap.report.cochosen import Cochosen
from reap.report.evidence import FEW, SURE, Cut, Evidence
from reap.report.measured import Cost
from reap.report.wording import letter, number, plain, share, signed


def findings(seen: Evidence, together: Cochosen | None, costs: Sequence[Cost]) -> Iterator[str]:
    """A sentence each, the widest first."""
    experts = sum(layer.info.num_experts for layer in seen.layers)
    domains = seen.stats.domains
    named = ", ".join(plain(domain, 40) for domain in domains[:6])
    more = f" and {len(domains) - 6} more" if len(domains) > 6 else ""
    yield (
        f"{counted(seen.stats.tokens, 'token')} of {counted(len(domains), 'domain')} ({named}"
        f"{more}) went through {counted(len(seen.layers), 'MoE layer')} with "
        f"{counted(experts, 'expert')}."
    )
    for at, cut in enumerate(seen.cuts):
        yield from _of_cut(at, cut, experts)
    few = sum(map(len, seen.few))
    unrouted = sum(map(len, seen.unrouted))
    if few:
        yield (
            f"{counted(few, 'expert')} of {experts:,} ({share(few / experts)}) saw fewer than "
            f"{FEW} tokens, {unrouted:,} of them none: more text would judge them better."
        )
    else:
        yield f"Every expert saw {FEW} tokens or more."
    yield from _of_criteria(seen)
    if seen.domains is not None:
        found = seen.domains.shared[0, 1:].tolist()
        known = [(value, at) for at, value in enumerate(found) if not math.isnan(value)]
        if known:
            value, at = min(known)
            yield (
                f"Text of {seen.domains.names[1 + at]} alone would drop {share(value)} of the "
                "experts that all text drops, the least of the domains; unrelated rankings would "
                f"share {share(seen.domains.chance)}."
            )
    if together is not None:
        pair = together.pairs[0]
        yield (
            f"The most striking pair is {pair.experts[0]} and {pair.experts[1]} of layer "
            f"{seen.labels[pair.at]}, chosen together by {counted(pair.tokens, 'token')}: "
            f"{number(pair.tokens / pair.expected, 2)} times what proportion would give."
        )
    yield from _of_costs(costs)


def _of_cut(at: int, cut: Cut, experts: int) -> Iterator[str]:
    gone = sum(map(len, cut.dropped))
    line = (
        f"{'Plan' if cut.given else 'Cut'} {letter(at)}, {cut.name}, drops {gone:,} of "
        f"{counted(experts, 'expert')} ({share(gone / experts)}) by {plain(cut.plan.criterion, 40)}"
    )
    known = [width for width in cut.gaps if not math.isnan(width)]
    against = sum(width <= -SURE for width in known)
    if cut.unsure:
        line += (
            f"; in {len(cut.unsure)} of {len(known)} layers the weakest kept and the strongest "
            f"dropped are within {SURE:g} standard errors, and more text may swap them"
        )
    if against:
        line += (
            f"; in {against} of {len(known)} layers it keeps an expert that scores at least "
            f"{SURE:g} standard errors less than one that it drops"
        )
    if known and not against and not cut.unsure:
        line += (
            "; in every layer the weakest kept and the strongest dropped are at least "
            f"{SURE:g} standard errors apart"
        )
    yield f"{line}."


def _of_criteria(seen: Evidence) -> Iterator[str]:
    of = seen.criteria
    named = dict(zip(of.names[1:], of.shared[0, 1:].tolist(), strict=True))
    told = [
        f"{name} {share(named[name])}"
        for name in ("reap", "frequency", "ean")
        if name in named and not math.isnan(named[name])
    ]
    if told:
        yield (
            f"Of the experts that {of.names[0]} drops, other criteria drop too: {', '.join(told)}; "
            f"unrelated ones would share {share(of.chance)}."
        )


def _of_costs(costs: Sequence[Cost]) -> Iterator[str]:
    whole = [cost for cost in costs if cost.domain == "total" and not math.isnan(cost.increase)]
    if whole:
        best, worst = (pick(whole, key=lambda cost: cost.increase) for pick in (min, max))
        least = " least," if len(whole) > 1 else ""
        line = f"On held-out text {best.plan} costs{least} {signed(best.increase)} nats per token"
        if worst is not best:
            line += f"; {worst.plan} most, {signed(worst.increase)}"
        yield f"{line}."
