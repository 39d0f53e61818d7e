"""Compare search strategies fairly: one space, one cohort, one split, one budget of optimiser steps, several seeds.

`budget` gives every strategy the same steps, `searching` runs each search in a process of its own, `contest` trains
what was found without distillation, times all networks in turns and sums up, `contest_page` shows it.
"""
