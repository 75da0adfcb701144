"""What a run will cost before it is started: pipeline schedules on the clock, and their drawing."""
