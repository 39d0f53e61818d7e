"""Search strategies: latency-regularised DARTS and teacher/student co-search."""
