#!/usr/bin/env bash
# A strategy that comes with NNI and two of ours side by side, three seeds each.
# Usage: strategies.sh run.yaml FOLDER
set -euo pipefail
glioma-nas nni config "$1" --out "$2" --strategy co_search --strategy latency_darts --strategy nni.gumbel_darts \
  --search strategy --search seed --seeds 3 --tuner GridSearch --trials 9
glioma-nas nni create "$2"
glioma-nas nni compare "$2" --by strategy
glioma-nas nni stop "$2"
