"""Update rules, learning-rate schedule, loss scaling, clipping, moving average.

One step: ``clipping`` bounds the reduced gradients, ``Schedule`` says the rate, ``Optimizer`` updates the masters, ``Ema`` follows them.
"""
