"""``recommended`` and ``hedged`` again, over the relay, as ``numpy_guards.py`` has the paper's."""

from copy import deepcopy

import numpy as np


class Lane:
    """An optimizer, and where it is."""

    def __init__(self, w: np.ndarray, optimizer):
        self.w, self.optimizer = w, optimizer

    def run(self, objective, numbers: range) -> list[float]:
        """A step on each of these minibatches, and the loss before each."""
        losses = []
        for i in numbers:
            losses.append(objective.loss(self.w, i))
            self.w = self.optimizer.step(self.w, objective.gradient(self.w, i))
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
    """All losses of challenger and leader since it began, and what follows from them."""

    def __init__(self, cycles: int):
        self.cycles, self.challenger, self.leader = cycles, [], []

    def hear(self, challenger: list[float], leader: list[float]) -> None:
        self.challenger.append(challenger)
        self.leader.append(leader)

    @property
    def differences(self) -> np.ndarray:
        """Of the second half."""
        d = np.ravel(self.challenger) - np.ravel(self.leader)
        return d[self.cycles * len(self.leader[0]) // 2 :]

    def outcome(self) -> str:
        if len(self.leader) < self.cycles and not np.isnan(self.differences).any():
            return "goes on"
        d = self.differences
        return "won" if d.mean() < -2.5 * d.std() / np.sqrt(len(d) - 1) else "lost"


class Relay:
    """x, which y or z leads. ``events`` are those of the last cycle."""

    def __init__(self, objective, learned, fallback, *, nt: int, share: float):
        self.objective, self.nt, self.share = objective, nt, share
        self.y, self.z = Lane(objective.start, learned), Lane(objective.start, fallback)
        self.leader, self.trial, self.trials, self.spent = self.z, None, 0, 0
        self.curve, self.level = Curve(0.0), 0.0

    def cycle(self, i: int, k: int) -> tuple[list[float], dict | None]:
        """The losses of the leader, and of y and z if there is a trial."""
        self.events, numbers, led_by_y = set(), range(i, i + self.nt), self.leader is self.y
        self.led_by_y, leader = led_by_y, self.leader
        self.begin_trial(k)
        challenger = (self.z if led_by_y else self.y) if self.trial else None
        losses = leader.run(self.objective, numbers)
        others = challenger.run(self.objective, numbers) if challenger else None
        for lane in (self.y, self.z):
            if lane is not leader and lane is not challenger:
                lane.optimizer.schedule_steps += self.nt
        self.curve.add(losses)
        outcome = None
        if challenger:
            self.spent += self.nt
            self.trial.hear(others, losses)
            outcome = self.trial.outcome()
        if led_by_y:
            self.after_lead_of_y(outcome)
        elif outcome == "won":
            self.events.add("won")
            self.leader, self.level = self.y, self.curve.lasting
            self.curve = Curve(self.curve.recent + self.trial.differences.mean(), k // 16)
        elif outcome == "lost":
            self.events.add("lost")
        if outcome in ("won", "lost"):
            self.trial = None
        if others is None:
            return losses, None
        return losses, {"y": losses, "z": others} if led_by_y else {"y": others, "z": losses}

    def begin_trial(self, k: int) -> None:
        cycles = int(np.ceil((20 if k else 10) / self.nt))
        cycles = max(cycles, int(np.round(0.3 * self.share * k / self.nt)))
        steps = cycles * self.nt
        cost = steps if self.led_by_y else 2 * steps  # y's may be followed by one of z
        afforded = self.spent + cost <= self.share * k + 2 * np.sqrt(k)
        since = self.curve.age - self.curve.marks[-1][0]
        due = afforded and since >= steps and not (self.led_by_y and self.trials == 1)
        if self.trial is not None or not (due or k == 0):
            return
        self.trial, self.trials = Trial(cycles), self.trials + 1
        if self.led_by_y:
            self.z.w = self.y.w
            self.level = min(self.level, self.curve.lasting)
        else:
            self.y.w = self.z.w
            self.y.optimizer.forget()

    def after_lead_of_y(self, outcome: str | None) -> None:
        curve, level = self.curve, self.level
        stalls, risen = curve.power() < 0.25, curve.lasting > level + abs(level) / 2
        if outcome == "lost" and stalls:
            behind = self.trial.differences.mean()
            outcome = "lost" if behind > 0.05 * abs(curve.recent) else "given way"
        if outcome in ("won", "given way"):
            self.events.add(f"z has {outcome}" if outcome == "won" else outcome)
            self.curve = Curve(curve.recent + self.trial.differences.mean())
            self.leader, self.trial = self.z, None
        elif risen:
            self.events.add("from the snapshot")
            self.leader, self.trial, self.curve = self.z, None, Curve(level)
        elif stalls and self.trials == 1:
            self.events.add("from x")
            self.leader, self.z.w, self.curve = self.z, self.y.w, Curve(curve.recent)
        elif outcome == "lost" or (not self.trial and curve.lasting < level - abs(level) / 5):
            self.events.add("z has lost" if outcome else "new snapshot")
            self.z.w, self.level = self.y.w, min(level, curve.lasting)
            self.trial = None

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
        losses, tried = x.cycle(i, k)
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
            against.hear(of_s, losses)
            outcome = against.outcome()
            if outcome == "won":
                x.go_to(s, np.mean(of_s))
                own = True
            if outcome != "goes on":
                against = Trial(3)
        elif own and "won" in x.events:
            own, s, against = False, deepcopy(x.z), Trial(3)
        yield told(x, losses, tried, own, runs)


def hedged(objective, learned, fallback, *, nt: int, share: float, cycles: int):
    """The relay, and s in every cycle that x is off its path: likewise."""
    x = Relay(objective, learned, fallback, nt=nt, share=share)
    s, own, regret, away, behind = None, True, 0.0, 0, 0
    for cycle in range(cycles):
        i = cycle * nt
        losses, tried = x.cycle(i, i)
        runs, leads = not own, False
        of_s = s.run(objective, range(i, i + nt)) if runs else []
        if runs and not s.is_finite(of_s):
            x.events.add("s breaks")
            s.w, regret, away, behind = x.leader.w, 0.0, away + 1, 0
            s.optimizer.forget()
        elif runs:
            regret = 0.7 * regret + sum(losses) - sum(of_s)
            leads = regret > 0
            away, behind = away + 1, behind + 1 if leads else 0
            if leads and behind >= max(3, away / 10):
                x.go_to(s, np.mean(of_s))
                own = True
        elif "won" in x.events:
            own, s, regret, away, behind = False, deepcopy(x.z), 0.0, 0, 0
        cycle = told(x, losses, tried, own, runs)
        if leads:
            x.events.add("s leads")
            cycle |= {"x": s.w, "losses": of_s, "winner": 2, "used_learned": [False] * nt}
        yield cycle


def told(x: Relay, losses: list[float], tried: dict | None, own: bool, s_ran: bool) -> dict:
    nt, learned = len(losses), x.led_by_y
    return {
        "x": x.leader.w,
        "used_learned": [learned] * nt,
        "losses": losses,
        "learned_loss": np.mean(tried["y"]) if tried else np.nan,
        "fallback_loss": np.mean(tried["z"]) if tried else np.nan,
        "winner": 0 if x.leader is x.y else 2 if own else 1,
        "gradients": nt * (1 + bool(tried) + s_ran),
        "learned_updates": nt * (learned or bool(tried)),
        "events": x.events,
    }
