#!/usr/bin/env bash
# Swap an operator and compare side by side: two operator sets, three seeds each, one of them with a plugin's operator.
# Usage: operator_swap.sh run.yaml FOLDER
set -euo pipefail
plugin=$(dirname "$0")/../operator_plugin/asymmetric_conv.py
glioma-nas nni config "$1" --out "$2" --plugin "$plugin" --operators skip+conv3x3+zoomed_conv \
  --operators skip+asymmetric_conv+zoomed_conv --search operators --search seed --seeds 3 --tuner GridSearch --trials 6
glioma-nas nni create "$2"
glioma-nas nni compare "$2" --by operators
glioma-nas nni stop "$2"
