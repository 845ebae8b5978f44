"""What was changed at a node, why, and what came of it: as it is kept, and in plain words. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from router.adapt.loop import Change, Verdict


class Noted(msgspec.Struct, frozen=True):
    """One thing that was decided, or what came of it."""

    at_s: float
    """Unix time."""
    pool: str
    what: Change | Verdict


def story(noted: Iterable[Noted], node: str, now_s: float) -> list[str]:
    """A line for each that concerns a node, the oldest first."""
    own = [one for one in noted if one.what.node == node]
    return [f"{_s(max(0.0, now_s - one.at_s)):>8} ago  {_line(one.what)}" for one in own]


def _line(what: Change | Verdict) -> str:
    match what:
        case Change(number, node, role, foretold, quicker, inputs, undoes, hoped):
            if undoes is not None:
                return f"#{number}: {node} is to be a {role} worker again: #{undoes} was in vain."
            gain = f"steps {_share(foretold)} quicker" if quicker else f"{_share(foretold)} more done"
            how = "hoped for" if hoped else "expected"
            return f"#{number}: {node} is to be a {role} worker: {gain} is {how}, where {_why(inputs)}."
        case Verdict(number, _, outcome, why, foretold, measured, error, step_s):
            if outcome == "refused":
                return f"#{number} was not done: {why}."
            seen = ""
            if step_s[1]:
                seen = (
                    f" ({_share(measured)} more done, give or take {_share(error)}, where {_share(foretold)} was "
                    f"foretold; a step takes {_s(step_s[1])} instead of {_s(step_s[0])})"
                )
            return f"#{number} was {outcome}: {why}{seen}."


def _why(inputs: Mapping[str, float]) -> str:
    have = inputs.get
    return (
        f"{have('prefills', 0):.0f} prefill and {have('decodes', 0):.0f} decode workers end {have('rate', 0):.2f} "
        f"steps a second, {_share(have('in_time', 1))} of them in time, each of {_s(have('step_s', 0))} with "
        f"{_s(have('prompt_s', 0))} of prompt and {have('output', 0):.0f} tokens of answer"
    )


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _s(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
