"""When ``Rewind`` suspects that losses have risen, and how a trial is decided."""

import copy
import json
import math

import numpy as np
import pytest

from lossguard.torch.rewind.detector import THRESHOLD, Detector, Scale
from lossguard.torch.rewind.trial import LONGEST, Trial

SEEDS = range(100, 103)


def noise(seed, count, kind="normal"):
    rng = np.random.default_rng(seed)
    if kind == "student":
        return rng.standard_t(1.5, count)
    if kind == "lognormal":
        return rng.lognormal(0, 1, count)
    if kind == "growing":
        return np.linspace(0.2, 4, count) * rng.standard_normal(count)
    rho = {"normal": 0.0, "autocorrelated": 0.8}[kind]
    made = rng.standard_normal(count) * math.sqrt(1 - rho**2)
    for k in range(1, count):
        made[k] += rho * made[k - 1]
    return made


def falling(count):
    return 2 + 3 * np.exp(-np.arange(count) / 1000)


def suspicions(losses):
    """The numbers of losses at which it suspects, where no trial finds anything."""
    detector, found = Detector(), []
    for k, loss in enumerate(losses):
        if detector.hear(float(loss)):
            found.append(k)
            detector.learn(losses[max(0, k - 24) : k + 1].tolist(), confirmed=False)
    return found


def numpy_sums(values):
    """What ``Scale`` says of single losses, from its definition, with all blocks anew each time."""
    sums, blocks, block, total = [], [], [], 0.0
    level = deviation = usual = None
    for x in values:
        if level is not None:
            z = np.clip((x - level) / deviation, -3, 3)
            total = max(0.0, total + z - usual - 0.5)
        sums.append(total)
        if total < 5:
            block.append(x)
            if len(block) == 8:
                blocks.append(block)
                block = []
                if len(blocks) >= 4:
                    last = np.array(blocks[-16:])
                    level = min(np.median(last), np.median(last[-4:]))
                    near = last - np.median(last, axis=1, keepdims=True)
                    means = last.mean(axis=1)
                    wide = [1.4826 * np.median(np.abs(near)), 0.02 * np.ptp(means)]
                    for lag in (1, 2, 4):
                        if len(means) >= 2 * lag:
                            steps = means[lag:] - means[:-lag]
                            apart = np.median(np.abs(steps - np.median(steps)))
                            wide.append(1.4826 * 2 * apart)
                    deviation = max(*wide, 1e-6 * abs(level))
                    usual = max(0.0, np.clip(near / deviation, -3, 3).mean())
    return sums


@pytest.mark.parametrize("kind", ["normal", "student", "lognormal", "autocorrelated"])
def test_the_sum_is_that_of_its_definition(kind):
    losses = falling(600) + 0.1 * noise(0, 600, kind)
    losses[400:] += 0.4
    scale, sums = Scale(1), []
    for k, loss in enumerate(losses):
        scale.hear(loss, k + 1)
        sums.append(scale.sum)
    np.testing.assert_allclose(sums, numpy_sums(losses), rtol=1e-9, atol=1e-12)
    assert max(sums[400:]) > 10


def test_a_longer_scale_is_the_same_of_means():
    losses = falling(2400) + 0.1 * noise(1, 2400)
    longer, single = Scale(8), Scale(1)
    means = losses.reshape(-1, 8).sum(axis=1) / 8
    for k, loss in enumerate(losses):
        longer.hear(loss, k + 1)
    for k, mean in enumerate(means):
        single.hear(mean, k + 1)
    assert longer.sum == pytest.approx(single.sum) and longer.level == pytest.approx(single.level)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("normal", 3), ("student", 1), ("lognormal", 1), ("growing", 5), ("autocorrelated", 8)],
)
def test_noise_is_seldom_suspected(kind, most):
    for seed in SEEDS:
        losses = falling(10_000) + 0.1 * noise(seed, 10_000, kind)
        assert len(suspicions(losses)) <= most


@pytest.mark.parametrize(
    ("rise", "within"), [(0.2, 100), (0.4, 50), (math.inf, 30), (math.nan, 30)]
)
@pytest.mark.parametrize("at", [100, 400, 4000])
def test_a_rise_that_lasts_is_suspected(rise, within, at):
    for seed in SEEDS:
        losses = 2 + 0.1 * noise(seed, at + 200)
        losses[at:] += rise
        detector = Detector()
        told = [detector.hear(loss) for loss in losses]
        assert not any(told[:at]) and any(told[at : at + within])
        first = told.index(True)
        detector = Detector()
        for loss in losses[: first + 1]:
            detector.hear(loss)
        assert abs(detector.onset - 1 - at) < 64


def test_a_slow_rise_is_suspected():
    """Half a nat in 2,000 steps, of noise of 0.1."""
    for seed in SEEDS:
        losses = 2 + 0.1 * noise(seed, 8000)
        losses[5000:] += np.minimum(np.arange(3000) / 4000, 0.5)
        found = suspicions(losses)
        assert found and 5000 < found[0] < 6200


def test_a_spike_that_ends_is_no_suspicion():
    for length in (1, 4, 12, 20):
        losses = 2 + 0.1 * noise(5, 1000)
        losses[500 : 500 + length] += 3
        assert not suspicions(losses)


def test_each_failed_trial_raises_the_bar_for_a_while():
    detector = Detector()
    for loss in 2 + 0.1 * noise(6, 200):
        detector.hear(loss)
    detector.learn([2.0] * 24, confirmed=True)
    assert detector.threshold == THRESHOLD and detector.score == 0
    for _ in range(2):
        detector.learn([2.0] * 24, confirmed=False)
    assert detector.threshold == 4 * THRESHOLD
    for loss in 2 + 0.1 * noise(7, 1300):
        detector.hear(loss)
    assert detector.threshold == THRESHOLD


@pytest.mark.parametrize(
    "losses",
    [
        [1.0] * 500,
        [math.nan] * 500,
        [-math.inf, math.inf] * 250,
        [1e300, -1e300] * 250,
        [0.0] * 500,
    ],
)
def test_hostile_losses_raise_nothing(losses):
    detector = Detector()
    for k, loss in enumerate(losses):
        if detector.hear(loss):
            detector.learn(losses[k - 24 : k], confirmed=False)
    assert not math.isnan(detector.score)


def test_what_it_knows_is_saved_as_plain_numbers():
    losses = (falling(1500) + 0.1 * noise(8, 1500)).tolist()
    detector, again = Detector(), Detector()
    for loss in losses[:777]:
        detector.hear(loss)
    saved = json.loads(json.dumps(detector.numbers()))
    before = copy.deepcopy(saved)
    again.load(saved)
    for loss in losses[777:]:
        assert detector.hear(loss) == again.hear(loss)
    assert json.dumps(again.numbers()) == json.dumps(detector.numbers())
    assert json.dumps(saved) == json.dumps(before)


def verdict(before, since, deviation=0.1):
    trial = Trial(before, deviation)
    for loss in since:
        if (answer := trial.hear(float(loss))) is not None:
            return answer, len(trial.since)
    raise AssertionError


def test_a_trial_is_decided_by_its_definition():
    rng = np.random.default_rng(3)
    for _ in range(200):
        before = 2 + 0.1 * rng.standard_normal(rng.integers(24, 65))
        since = 2 - rng.choice([0, 0.03, 0.1, 0.3]) + 0.1 * rng.standard_normal(LONGEST)
        for n in range(8, LONGEST + 1, 8):
            deviation = max(0.1, since[:n].std(ddof=1))
            error = deviation * math.sqrt(1 / n + 1 / len(before))
            score = (before.mean() - since[:n].mean()) / error
            if score < -1 + 4 * n / LONGEST:
                expected = False, n
                break
            if score > 4 or n == LONGEST:
                expected = True, n
                break
        assert verdict(before.tolist(), since) == expected


def test_by_chance_a_return_stays_in_one_of_a_thousand():
    """Of independent noise; where the losses before were chosen as high it is more."""
    rng = np.random.default_rng(4)
    stays = [
        verdict(rng.standard_normal(24).tolist(), rng.standard_normal(LONGEST), 1.0)[0]
        for _ in range(4000)
    ]
    assert sum(stays) <= 8


def test_losses_that_are_not_finite_count_as_high():
    assert verdict([math.nan] * 24, [1.0] * 8) == (True, 8)
    assert verdict([math.inf] * 24, [math.nan] * LONGEST)[0] is False
    assert verdict([1.0] * 24, [math.nan] * 8) == (False, 8)


def test_a_trial_is_saved_as_plain_numbers():
    trial, again = Trial([2.0] * 24, 0.1), Trial([], 0.0)
    trial.hear(1.0)
    again.load(json.loads(json.dumps(trial.numbers())))
    assert vars(again) == vars(trial)
