"""How often the loops of a kernel run; from it and the compiled program follow its instructions per weight."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The loops of one kernel launch.

    Attributes:
      steps: how often a program runs through its main loop; 1 where it has none, and all of it counts.
      outlier_steps: how often it runs through its loop over outliers if these are spread evenly, rounded up.
    """

    steps: int = 1
    outlier_steps: int = 0
