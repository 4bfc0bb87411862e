"""``speculate="auto"``: how many states a forward evaluates, by what they cost and by how far they have got so far."""

from collections import deque

CHOICES = (1, 2, 4, 8)  # states of a forward
REMEMBERED = 32  # forwards
ENOUGH = 4  # of them, to go by
FREE = 1.05  # times a forward of one state: what is tried before it is known how far it gets


class Pace:
    """The number of states with the most of the schedule's steps a second.

    The cost of each number is measured once, where it runs. How many steps a forward takes is remembered. One that took
    all that it could might have taken more: each further step is thought as likely as drafts were right so far.
    """

    def __init__(self, most: int):
        """``most``: states that there are, the first among them that the schedule has reached."""
        self.choices = [*(n for n in CHOICES if n < most), most]
        self.cost: dict[int, float] = {}  # of a forward, in seconds or anything else; empty: not measured
        self.begin()

    def begin(self) -> None:
        """Forget how far forwards got: other rows come."""
        self.taken: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)  # (states, steps) of a forward

    def measure(self, time) -> None:
        """``time(n)`` a forward of n states, from the fewest on, until more states could not pay."""
        for n in self.choices:
            self.cost[n] = time(n)
            if self.cost[n] >= n * self.cost[1] and n > 1:
                break
        self.choices = list(self.cost)

    def took(self, states: int, steps: float) -> None:
        """A forward of so many states took so many steps, the mean of its rows."""
        self.taken.append((states, steps))

    @property
    def states(self) -> int:
        """Of the next forward."""
        if len(self.taken) < ENOUGH:
            return max(n for n in self.choices if self.cost[n] <= FREE * self.cost[1])
        return max(self.choices, key=lambda n: (self.steps(n) / self.cost[n], -n))

    def steps(self, n: int) -> float:
        """How many steps a forward of n states may take, by those that are remembered."""
        right = sum(steps - 1 for _, steps in self.taken)
        asked = sum(min(steps, states - 1) for states, steps in self.taken)  # drafts that could be right, or ended it
        again = (right + 1) / (asked + 2)
        total = 0.0
        for states, steps in self.taken:
            total += min(steps, n)
            if steps == states < n:
                total += sum(again**further for further in range(1, n - states + 1))
        return total / len(self.taken)
