"""How a slot's weights follow from its members': one file a rule."""

from moeconsolidate.merging.average import Average
from moeconsolidate.merging.base import MergeRule, SlotContext
from moeconsolidate.merging.first import First
from moeconsolidate.merging.frequency_weighted import FrequencyWeighted
from moeconsolidate.merging.regmean import RegMean
from moeconsolidate.merging.round_robin import RoundRobin
from moeconsolidate.merging.task_arithmetic import TaskArithmetic
from moeconsolidate.merging.ties import Ties

__all__ = ["MERGE_RULES", "MergeRule", "SlotContext"]

MERGE_RULES: dict[str, MergeRule] = {
    "average": Average(),
    "first": First(),
    "frequency-weighted": FrequencyWeighted(),
    "regmean": RegMean(),
    "round-robin": RoundRobin(),
    "task-arithmetic": TaskArithmetic(),
    "ties": Ties(),
}
"""Every rule, by its name in a recipe."""
