"""One option for each of many items, so that the total cost is least at a total size."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store an item.

    Attributes:
      size: of what the item takes.
      cost: of what the item loses.
    """

    size: float
    cost: float


def allocate(options: Sequence[Sequence[Option]], size: float) -> list[int]:
    """The option of each item with the least total cost, of total size at most `size`.

    Minimizes Σ cost + λ Σ size. The best option of each item at λ lies on the lower convex hull of its options, so
    lowering λ from infinity moves one item after the other along its hull. Steps that no longer fit are left out, and
    smaller ones that come later may fill the room. The total cost exceeds the least one by at most that of one step.

    Args:
      options: of each item.
      size: the largest total size.

    Returns:
      The index of each item's option; of the smallest ones if even they exceed the size.

    Source: Shoham and Gersho 1988, Efficient bit allocation for an arbitrary set of quantizers.

    Example:
      >>> allocate([[Option(2, 8.0), Option(3, 2.0)], [Option(2, 3.0), Option(3, 1.0)]], size=5)
      [1, 0]
    """
    hulls = [lower_hull(item) for item in options]
    chosen = [0] * len(hulls)
    room = size - sum(item[hull[0]].size for item, hull in zip(options, hulls, strict=True))
    # Slopes fall along a hull, so the steps of an item are in its order.
    steps = sorted(
        (-_gain(item[before], item[after]), index, place)
        for index, (item, hull) in enumerate(zip(options, hulls, strict=True))
        for place, (before, after) in enumerate(itertools.pairwise(hull))
    )
    for _, index, place in steps:
        item, hull = options[index], hulls[index]
        taken = item[hull[place + 1]].size - item[hull[chosen[index]]].size
        if taken <= room:
            chosen[index] = place + 1
            room -= taken
    return [hull[place] for hull, place in zip(hulls, chosen, strict=True)]


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of cost over size, from the smallest to the one of least cost.

    Example:
      >>> lower_hull([Option(2, 8.0), Option(3, 7.0), Option(4, 2.0), Option(5, 3.0)])
      [0, 2]
    """
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: options[index]):
        if hull and options[index].cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1 and _gain(options[hull[-1]], options[index]) >= _gain(options[hull[-2]], options[hull[-1]]):
            hull.pop()
        hull.append(index)
    return hull


def _gain(before: Option, after: Option) -> float:
    """Cost that an option saves for each unit of size that it takes more."""
    return (before.cost - after.cost) / (after.size - before.size)
