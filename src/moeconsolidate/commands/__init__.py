"""The commands of the compiler, by what they start from.

compiling   checkpoints: consolidate, plan
packs       a finished pack: inspect, verify, export, eval, report, push
"""
