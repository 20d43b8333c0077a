"""AICSD: inter-class similarity distillation with adaptive loss weighting."""

from losses.icsd import ICSD


class AICSD(ICSD):
    """`icsd`, from imitation of the pixels to the task: with alpha the progress of the training from 0 to 1, the total is
    alpha * (task + ics_weight * ics) + (1 - alpha) * kd_weight * kd.

    The training begins with plain KD alone; also the task loss is scaled, for every method that runs beside this one.

    Differs from the released code: alpha grows with every step, there with every epoch (epoch / epochs); for the rest see `icsd`.
    """

    title = "Adaptive inter-class similarity distillation"

    def factors(self, progress):
        return {"task": progress, "ics": progress, "kd": 1 - progress}
