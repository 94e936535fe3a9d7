"""What adapting a LoRA takes."""

from __future__ import annotations

from ..models.streaming import room_for_states
from ..settings.convert_settings import AdaptLoraConfig
from .counts import ADAPTING_PASSES, EXACT, FP32, Count
from .demand import Demand

STATES = (
    6  # of a boundary: both teachers before a place and behind it, its block alone, what is wanted
)
SUMS = 3  # sums, scaled sums, their factor
FFN_WIDTHS = 4  # what an FFN's last map reads, in widths of the model


def adapt_lora(count: Count, config: AdaptLoraConfig) -> Demand:
    """States of both teachers, a student, and the sums of the widest map that is fitted in closed
    form."""
    places = len(count.intervals) + (0 if count.plan is None else len(count.plan.sites))
    states = STATES * count.kept(count.samples.count)
    room = room_for_states() if config.streamed else states
    waiting, on_disk = min(room, states), max(0, states - room)
    student = max(count.students) * (count.size + FP32)
    sums = SUMS * EXACT * (FFN_WIDTHS * count.width) ** 2
    forwards = ADAPTING_PASSES * count.samples.count + 3 * config.updates * count.samples.batch
    return Demand(
        certain=count.teacher + (0 if config.streamed else waiting),
        likely=student + sums + count.backward + (count.on_host(waiting) if config.streamed else 0),
        disk=on_disk,
        flops=2 * count.samples.count * count.forward
        + places * forwards * count.forward / count.blocks,
    )
