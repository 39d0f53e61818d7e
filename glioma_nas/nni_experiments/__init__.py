"""NNI experiments with a web UI: write them, start them on the loopback address, run their trials, resume them."""
