"""Iterations of a kernel's loops, from which the report derives its instructions per weight."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The loops of one kernel launch.

    Attributes:
      steps: iterations of a program's main loop; 1 where it has none.
      sparse_programs: number of programs that multiply outliers, and no codes.
      outlier_steps: iterations of their loop if outliers are spread evenly, rounded up.
    """

    steps: int = 1
    sparse_programs: int = 0
    outlier_steps: int = 0
