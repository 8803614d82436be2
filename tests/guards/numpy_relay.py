"""``recommended`` and ``hedged`` again, over the relay, as ``numpy_guards.py`` has the paper's."""

from copy import deepcopy

import numpy as np


class Lane:
    """An optimizer, and where it is."""

    def __init__(self, w: np.ndarray, optimizer):
        self.w, self.optimizer, self.is_new = w, optimizer, False

    def run(self, objective, numbers: range) -> list[float]:
        """A step on each of these minibatches, and the loss before each."""
        losses = []
        for i in numbers:
            losses.append(objective.loss(self.w, i))
            proposed = self.optimizer.step(self.w, objective.gradient(self.w, i))
            part = len(losses) / len(numbers) if self.is_new else 1
            self.w = self.w + part * (proposed - self.w)
        self.is_new = False
        return losses

    def is_finite(self, losses: list[float]) -> bool:
        return bool(np.isfinite(self.w).all() and np.isfinite(losses).all())


class Curve:
    """A run's smoothed loss, with marks: each at twice the age of the last, and 4 cycles later."""

    def __init__(self, loss: float, age: int = 0, weight: float = 0.7):
        self.weight = weight
        self.recent, self.lasting, self.age, self.marks = loss, loss, age, [(age, loss)]

    def add(self, losses: list[float]) -> None:
        loss = np.mean(losses)
        self.recent = (
            loss if self.age == 0 else self.weight * self.recent + (1 - self.weight) * loss
        )
        self.lasting = loss if self.age == 0 else 0.95 * self.lasting + 0.05 * loss
        self.age += len(losses)
        since = self.age - self.marks[-1][0]
        if since >= max(self.marks[-1][0], 4 * len(losses)):
            self.marks.append((self.age, self.recent))

    @property
    def mark(self) -> tuple[int, float] | None:
        """The last mark but one, if the run had begun by then."""
        return self.marks[-2] if len(self.marks) > 1 and self.marks[-2][0] > 0 else None

    def power(self) -> float:
        """a in loss ~ age^-a since that mark."""
        if self.mark is None:
            return 1.0
        age, loss = self.mark
        if loss > 0 and self.recent > 0:
            return np.log(loss / self.recent) / np.log(self.age / age)
        return float(self.recent < loss)

    def extrapolated(self, age: float) -> float:
        """Its loss at an age, on the line through where it is, both axes logarithmic."""
        if self.recent <= 0 or age == 0:
            return self.recent
        return np.exp(np.log(self.recent) - self.power() * (np.log(age) - np.log(self.age)))


class Trial:
    """All losses of y and of z since it began, and what follows from them."""

    def __init__(self, cycles: int, to_beat: float | None):
        self.cycles, self.to_beat, self.y, self.z = cycles, to_beat, [], []

    def outcome(self, of_y: list[float], of_z: list[float]) -> str:
        self.y.append(of_y)
        self.z.append(of_z)
        nt, middle = len(of_y), self.cycles // 2
        if self.to_beat is None:  # nothing is known of z yet: a tenth off its first loss
            self.to_beat = of_z[0] - abs(of_z[0]) / 10
        first = middle * nt if len(self.y) > middle else 0
        d = (np.ravel(self.y) - np.ravel(self.z))[first or nt // 2 :]
        d = np.pad(d, (0, max(0, 2 - len(d))))
        mean, error = d.mean(), d.std() / np.sqrt(len(d) - 1)
        over = len(self.y) >= self.cycles
        last, others = np.array(of_y[nt // 2 :]), np.array(of_z[nt // 2 :])
        diverges = others.mean() - self.to_beat > 9 * abs(self.to_beat) and (last < others).all()
        if over and (mean < -3 * error or diverges) and last.mean() < self.to_beat:
            return "won"
        return "lost" if over or mean > 3 * error else "goes on"


class Relay:
    """x, which y or z leads. ``events`` are those of the last cycle."""

    def __init__(self, objective, learned, fallback, *, nt: int, share: float):
        self.objective, self.nt, self.share = objective, nt, share
        self.y, self.z = Lane(objective.start, learned), Lane(objective.start, fallback)
        self.leader, self.trial, self.spent = self.z, None, 0
        self.curve, self.level = Curve(0.0), 0.0

    def cycle(self, i: int, k: int) -> tuple[list[float], list[float] | None]:
        """The losses of the leader, and of y if it is on trial."""
        self.events, numbers = set(), range(i, i + self.nt)
        self.led_by_y = self.leader is self.y
        if self.led_by_y:
            losses = self.y.run(self.objective, numbers)
            self.z.optimizer.schedule_steps += self.nt
            self.curve.add(losses)
            self.lead_on_or_stop()
            return losses, None
        self.begin_trial(k)
        losses = self.z.run(self.objective, numbers)
        self.curve.add(losses)
        if self.trial is None:
            self.y.optimizer.schedule_steps += self.nt
            return losses, None
        of_y = self.y.run(self.objective, numbers)
        self.spent += self.nt
        outcome = self.trial.outcome(of_y, losses)
        if outcome != "goes on":
            self.trial = None
            self.events.add(outcome)
        if outcome == "won":
            self.leader, self.level = self.y, self.curve.lasting
            self.curve = Curve(np.mean(of_y), k // 16)
        return losses, of_y

    def begin_trial(self, k: int) -> None:
        cycles = max(int(np.ceil(10 / self.nt)), int(np.round(0.6 * self.share * k / self.nt)))
        afforded = self.spent + cycles * self.nt <= self.share * k + np.sqrt(k)
        if self.trial is None and (afforded or k == 0):
            self.y.w = self.z.w
            self.y.optimizer.forget()
            self.trial = Trial(cycles, None if k == 0 else self.curve.recent)

    def lead_on_or_stop(self) -> None:
        curve, level = self.curve, self.level
        young = curve.mark is None
        risen = curve.lasting > level + abs(level) / 2
        if risen or curve.power() < 0.25:
            self.leader = self.z
            if risen:
                self.events.add("from the snapshot")
                self.curve = Curve(level)
            else:
                self.events.add("from x")
                self.curve = Curve(curve.recent)
                self.have_z_at_x()
        elif curve.lasting < level - abs(level) * (0.5 if young else 0.2):
            self.events.add("new snapshot")
            self.level = curve.lasting
            self.have_z_at_x()

    def have_z_at_x(self) -> None:
        self.z.w = self.y.w
        self.z.optimizer.forget()
        self.z.is_new = True

    def go_to(self, s: Lane, loss: float) -> None:
        self.events.add("back to s")
        self.z = self.leader = deepcopy(s)
        self.curve, self.trial = Curve(loss), None


def recommended(objective, learned, fallback, *, nt: int, share: float, cycles: int):
    """The relay, and s in a share of the steps: yields after every cycle what is to be reported."""
    x = Relay(objective, learned, fallback, nt=nt, share=share)
    s, of_own, own, against, curve = None, 0, True, None, Curve(0.0, weight=0)
    more = min(1, 5 * share)
    for cycle in range(cycles):
        i = k = cycle * nt
        goal = x.curve.recent - 0.1 * abs(x.curve.recent)
        soon = not own and curve.extrapolated(more * k) < goal
        runs = not own and of_own < (more if soon else share) * k
        losses, of_y = x.cycle(i, k)
        of_own += nt * (own or runs)
        if own:
            curve.add(losses)
        before = s and s.w
        of_s = s.run(objective, range(i, i + nt)) if runs else []
        if runs and not s.is_finite(of_s):
            x.events.add("s breaks")
            s.w = before
            s.optimizer.forget()
        elif runs:
            curve.add(of_s)
            if of_own > share * k + nt:
                x.events.add("s catches up")
            outcome = against.outcome(of_s, losses)
            if outcome == "won":
                x.go_to(s, np.mean(of_s))
                own = True
            if outcome != "goes on":
                against = Trial(3, np.inf)
        elif own and "won" in x.events:
            own, s, against = False, deepcopy(x.z), Trial(3, np.inf)
        yield told(x, losses, of_y, own, runs)


def hedged(objective, learned, fallback, *, nt: int, share: float, cycles: int):
    """The relay, and s in every cycle that x is off its path: likewise."""
    x = Relay(objective, learned, fallback, nt=nt, share=share)
    s, own, regret, away, behind = None, True, 0.0, 0, 0
    for cycle in range(cycles):
        i = cycle * nt
        losses, of_y = x.cycle(i, i)
        runs, leads = not own, False
        of_s = s.run(objective, range(i, i + nt)) if runs else []
        if runs and not s.is_finite(of_s):
            x.events.add("s breaks")
            s.w, regret, away, behind = x.leader.w, 0.0, away + 1, 0
            s.optimizer.forget()
        elif runs:
            worse_by = sum(losses) - sum(of_s)
            regret = 0.7 * regret + worse_by
            leads = worse_by > 0 or regret > 0
            away, behind = away + 1, behind + 1 if regret > 0 else 0
            if behind >= max(3, away / 10):
                x.go_to(s, np.mean(of_s))
                own = True
        elif "won" in x.events:
            own, s, regret, away, behind = False, deepcopy(x.z), 0.0, 0, 0
        cycle = told(x, losses, of_y, own, runs)
        if leads:
            x.events.add("s leads")
            cycle |= {"x": s.w, "losses": of_s, "winner": 2, "used_learned": [False] * nt}
        yield cycle


def told(x: Relay, losses: list[float], of_y: list[float] | None, own: bool, s_ran: bool) -> dict:
    nt, learned = len(losses), x.led_by_y
    return {
        "x": x.leader.w,
        "used_learned": [learned] * nt,
        "losses": losses,
        "learned_loss": np.nan if of_y is None else np.mean(of_y),
        "fallback_loss": np.nan if of_y is None else np.mean(losses),
        "winner": 0 if x.leader is x.y else 2 if own else 1,
        "gradients": nt * (1 + (of_y is not None) + s_ran),
        "forwards": 0,
        "learned_updates": nt * (learned or of_y is not None),
        "events": x.events,
    }
