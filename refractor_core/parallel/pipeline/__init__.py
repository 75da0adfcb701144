"""Pipeline parallelism as data: a schedule is a list of actions for each rank.

Generators make the compute order, one pass adds the communication, one validator proves the result, one simulator times it.
"""
