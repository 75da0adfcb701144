"""Update rules, learning-rate schedule, precision, clipping, moving average."""
