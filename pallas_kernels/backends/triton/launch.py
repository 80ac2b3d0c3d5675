"""How often the loops of a kernel run; from it and the compiled program follow its instructions per weight."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The loops of one kernel launch.

    Attributes:
      steps: how often a program runs through its main loop; 1 where it has none, and all of it counts.
      sparse_programs: how many of the programs multiply outliers, and no codes.
      outlier_steps: how often those run through their loop if outliers are spread evenly, rounded up.
    """

    steps: int = 1
    sparse_programs: int = 0
    outlier_steps: int = 0
