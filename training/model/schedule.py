"""The learning rate, a function of the step."""

from __future__ import annotations

import math

from training.settings.config import ScheduleConfig


class LearningRate:
    """The learning rate of each optimiser step: linear warm-up, then constant or a cosine to zero.

    Args:
        peak: the rate after the warm-up.
        schedule: lengths in steps or epochs.
        steps_per_epoch: optimiser steps in an epoch, not necessarily whole.
    """

    def __init__(self, peak: float, schedule: ScheduleConfig, steps_per_epoch: float) -> None:
        self.peak = peak
        self.decay = schedule.decay
        self.total_steps = schedule.steps or max(1, round((schedule.epochs or 0) * steps_per_epoch))
        self.warmup_steps = schedule.warmup_steps or round((schedule.warmup_epochs or 0) * steps_per_epoch)

    def at(self, step: int) -> float:
        """The rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
