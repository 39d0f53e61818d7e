"""Registered preprocessing steps: each takes a case's volumes one step nearer to the slices networks see."""
