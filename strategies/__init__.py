"""Search strategies: latency-regularised DARTS, teacher/student co-search, NNI's own under their names."""
