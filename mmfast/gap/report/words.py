"""A survey in words: four answers, by plain rules on its numbers, and how it writes numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mmfast.gap.survey import Retrieval, SideFacts, Survey

MINUS, UNKNOWN, SPACE = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NO-BREAK SPACE}"

# of the mean squared distance between a row of x and one of y, what the gap makes
WIDE, MODERATE = 0.25, 0.05
# of the mean cosine of two rows of one side
NARROW_CONE, CONE = 0.5, 0.2
# less of the loss than this is no gain
GAIN = 1e-3

RULES = (
    f"A gap is called wide where it makes {WIDE:.0%} or more of the mean squared distance between "
    f"a row of one side and a row of the other, moderate from {MODERATE:.0%}, narrow below; and "
    "none where it is less than three times what two samples of one distribution would show.",
    f"A side is called a narrow cone where two of its rows have a mean cosine of {NARROW_CONE} or "
    f"more, a wide cone from {CONE}, and no cone below.",
    f"A shift is said to lower the loss where it lowers it by more than {GAIN:.1%}.",
    "Retrieval is called no better than chance where a guess would find as many first, within "
    "three standard deviations.",
)


class Answer(NamedTuple):
    """A question, its answer in a number or two, and in a few sentences."""

    question: str
    figure: str
    text: str


def answers(survey: Survey) -> list[Answer]:
    """What the numbers say: the gap, the cone, the loss if the gap were closed, retrieval."""
    made = (_gap(survey), _cone(survey), _closing(survey), _retrieval(survey))
    return [answer for answer in made if answer is not None]


def _gap(survey: Survey) -> Answer:
    x, y = survey.x, survey.y
    distance, share = float(survey.gap.distance), gap_share(survey)
    chance = math.sqrt(_variance(x) / x.rows + _variance(y) / y.rows)
    if distance < 3 * chance:
        verdict = f"No gap to speak of: {number(chance)} is what chance makes of so many rows."
    elif share >= MODERATE:
        verdict = "A wide gap." if share >= WIDE else "A moderate gap."
    else:
        verdict = "A narrow gap."
    return Answer(
        "How wide is the gap?",
        number(distance),
        f"{verdict} The means of {x.name} and {y.name} lie {number(distance)} apart (0 where they "
        f"meet, 2 at most). That makes {percent(share)} of the mean squared distance between a row "
        "of one and a row of the other; the rest is how each side spreads.",
    )


def gap_share(survey: Survey) -> float:
    """The gap squared over the mean of |x_i - y_j|^2 over all i and j."""
    gap = survey.gap
    squares = _square(survey.x) + _square(survey.y)
    return float(gap.distance**2 / (squares - 2 * gap.x_mean @ gap.y_mean))


def _square(side: SideFacts) -> float:
    """The mean squared length of its rows, which are unit rows or zeros."""
    return 1 - side.zero_rows / side.rows


def _variance(side: SideFacts) -> float:
    """The mean squared distance of its rows from their mean."""
    return max(0.0, _square(side) - float(side.mean @ side.mean))


def _cone(survey: Survey) -> Answer:
    x, y = survey.x, survey.y
    kinds = [_cone_kind(side.cosines.mean) for side in (x, y)]
    if kinds == ["no cone", "no cone"]:
        verdict = "Neither side is a cone."
    elif kinds[0] == kinds[1]:
        verdict = f"Each side is {kinds[0]}."
    else:
        verdict = f"{x.name} is {kinds[0]}, {y.name} is {kinds[1]}."
    a, b = x.cosines, y.cosines
    return Answer(
        "Is it a cone?",
        f"{number(a.mean)} and {number(b.mean)}",
        f"{verdict} Two rows of {x.name} have a cosine of {number(a.mean)} on average and "
        f"{number(a.min)} at least, two of {y.name} {number(b.mean)} and {number(b.min)}. "
        f"Spread evenly over the sphere they would have 0 ± {number(x.width**-0.5)}.",
    )


def _cone_kind(mean: float) -> str:
    if mean >= CONE:
        return "a narrow cone" if mean >= NARROW_CONE else "a wide cone"
    return "no cone"


class Optimum(NamedTuple):
    """The lowest symmetric loss tried at a temperature, where it is, and the loss unshifted."""

    temperature: float
    at_rest: float
    loss: float
    distance: float

    @property
    def gain(self) -> float:
        """The share of the loss that the shift takes away."""
        return (self.at_rest - self.loss) / self.at_rest if self.at_rest else 0.0


def optima(survey: Survey) -> list[Optimum]:
    """One for each temperature of the landscape."""
    landscape = survey.landscape
    if landscape is None:
        return []
    losses = landscape.symmetric
    return [
        Optimum(
            temperature,
            float(losses[survey.rest, t]),
            float(losses[:, t].min()),
            float(landscape.distance[losses[:, t].argmin()]),
        )
        for t, temperature in enumerate(landscape.temperatures.tolist())
    ]


def _closing(survey: Survey) -> Answer | None:
    gap = float(survey.gap.distance)
    kinds: dict[str, list[Optimum]] = {"rest": [], "narrower": [], "wider": []}
    for at in optima(survey):
        moved = "narrower" if abs(at.distance) < gap else "wider"
        kinds[moved if at.gain > GAIN else "rest"].append(at)
    T = sum(map(len, kinds.values()))
    if T == 0:
        return None
    text = ""
    if kinds["rest"]:
        text += f"No shift along the gap lowers the loss at {_temperatures(kinds['rest'])}. "
    for kind in ("narrower", "wider"):
        if kinds[kind]:
            most = max(kinds[kind], key=lambda at: at.gain)
            where = f" for {inverse(most.temperature)}" if len(kinds[kind]) > 1 else ""
            text += (
                f"A {kind} gap lowers the loss at {_temperatures(kinds[kind])}: by "
                f"{percent(most.gain)}{where}, at a distance of {number(most.distance)}. "
            )
    n = len(kinds["narrower"])
    figure = "yes" if n == T else f"at {n} of {T} temperatures" if n else "no"
    text += f"The loss is that of chunks of {survey.options['chunk']} neighbouring pairs."
    return Answer("Would a narrower gap lower the loss?", figure, text)


def _temperatures(found: Sequence[Optimum]) -> str:
    word = "temperature" if len(found) == 1 else "temperatures"
    return f"{word} {listed([inverse(at.temperature) for at in found])}"


def _retrieval(survey: Survey) -> Answer | None:
    x, y = survey.x.name, survey.y.name
    there, back = survey.retrieval.x_to_y, survey.retrieval.y_to_x
    if there is None or back is None:
        return None
    first = [percent(way.recall[1]) for way in (there, back)]
    tenth = [percent(way.recall[10]) for way in (there, back)]
    return Answer(
        "How good is retrieval?",
        " and ".join(first),
        f"The right row of {y} comes first for {first[0]} of {x}{_beside_chance(survey, there)}, "
        f"the right row of {x} for {first[1]} of {y}; it is among the first ten for {tenth[0]} and "
        f"{tenth[1]}. The median rank is {there.median_rank:,.0f} and {back.median_rank:,.0f}, of "
        f"{there.candidates:,} and {back.candidates:,} candidates.",
    )


def _beside_chance(survey: Survey, way: Retrieval) -> str:
    """How the first places compare with a guess; nothing where several may be right."""
    if survey.labelled:
        return ""
    guessed = way.queries / way.candidates
    found = way.recall[1] * way.queries
    if found <= guessed + 3 * math.sqrt(guessed):
        return ", no better than chance"
    return f", {found / guessed:,.0f} times as often as by chance"


ALT = {
    "pairs": "Two histograms of cosines, of pairs and of rows that do not belong together.",
    "cone": "Two histograms of cosines, within one side and within the other.",
    "cloud": "A scatter plot of both sides with an arrow between their means.",
    "ranks": "A rising curve for each way: the share of queries whose match is among k.",
    "landscape": "A curve for each temperature: the loss over the distance of the means.",
}


def captions(survey: Survey) -> dict[str, str]:
    """What stands below each picture, by its name."""
    x, y = survey.x.name, survey.y.name
    gap = number(float(survey.gap.distance))
    plane = survey.pca.axes @ survey.gap.vector
    return {
        "pairs": f"Cosines of pairs, and of rows of {x} and {y} that do not belong together: the "
        "less they overlap, the easier the retrieval.",
        "cone": f"Cosines of two rows of {x} and of two rows of {y}: the further right, the "
        "narrower the cone.",
        "cloud": f"Rows of {x} and {y} in the plane of their largest common variance. The arrow "
        f"goes from mean to mean: the gap of {gap}, of which {number(float(plane.norm()))} lies in "
        "this plane.",
        "ranks": "How often the right match is among the k nearest candidates.",
        "landscape": "The loss as both sides are shifted along the gap, on a scale of its own for "
        "each temperature τ. Full dots: the lowest loss tried; rings: other minima.",
    }


def number(value: float) -> str:
    """Three decimals; a dash for what is not known."""
    # + 0.0 leaves no minus before a zero
    if not math.isfinite(value):
        return UNKNOWN
    return f"{round(value, 3) + 0.0:.3f}".replace("-", MINUS)


def percent(share: float) -> str:
    """A share, in per cent."""
    return UNKNOWN if math.isnan(share) else f"{100 * share:.1f}{SPACE}%"


def inverse(temperature: float) -> str:
    """1/100 for 0.01."""
    return f"1/{1 / temperature:.4g}" if temperature < 1 else f"{temperature:.4g}"


def plain(text: str) -> str:
    """The text in characters that programs read."""
    return text.replace(MINUS, "-").replace(SPACE, " ")


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def clean(name: str) -> str:
    """The name as people may see it: without line breaks and what else cannot be printed."""
    return "".join(c if c.isprintable() else "?" for c in name)


def short(name: str, length: int = 28) -> str:
    """The name without its middle, where it is too long for its place."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[: length - 1 - half]}…{name[-half:]}"
