"""The numbers in the guards' rules, which JAX and PyTorch share. Imports neither."""

# A trial of a challenger against the leader.
MARGIN = 3.0
"""Standard errors by which a challenger has to be better, or worse, for the trial to end so."""
DIVERGED = 9.0
"""The part by which a leader that diverges is above a trial's bound."""
LOOKS = 3
"""Cycles on which a lane that seldom runs is compared with the leader, each time that it is."""

# The progress of a run.
MEMORY = 0.7
"""Weight of the past in the smoothed loss, a cycle."""
LONG_MEMORY = 0.95
"""The same in the loss that is smoothed for longer."""
BETWEEN = 4
"""Cycles between two marks, at least: a smoothed loss needs some to follow."""

# The relay: y is the learned lane, z the fallback's, k the steps so far.
TRIAL_STEPS = 10
"""Optimizer steps of a trial, at least."""
PART = 0.6
"""The length of a trial, as a part of what trials may have cost by then."""
STALL = 0.25
"""The learned optimizer leads while its loss falls at least by this power of its age."""
YOUTH = 16
"""k / 16 is the age that y is taken for when it takes over."""
RISE = 0.5
"""The part by which the loss may be above that at the snapshot."""
GAIN = 0.2
"""The part by which it has to be below it for the snapshot to move."""
YOUNG_GAIN = 0.5
"""The same until the lead of y is known for longer."""

# The recommended guard: s is the fallback by itself, x the leader's iterate.
MORE = 5
"""Times ``share``: that of s where, as its losses fall, it would be below x by then."""
BELOW = 0.1
"""By this part of the loss of x."""

# The hedged guard.
DECAY = 0.7
"""Weight of the past in the regret, a cycle."""
PATIENCE = 0.1
"""x goes back to s once s has led for this part of the cycles since x left it, at a stretch."""
STRETCH = 3
"""The least number of these cycles."""

# Best of several, with a share.
HEAD_START = 100
"""Steps at first in which all run: who begins slowly may be ahead by then."""

# Rewinding.
IN_A_ROW = 3
"""Returns to one snapshot. If they don't help, its losses are no measure any more."""
SOON = 10
"""Windows. After a return so soon after another one the scale stays lower."""
DEEPEST = 5
"""How many times ``factor`` lowers it for good at most: data may be broken for long, and heal."""
