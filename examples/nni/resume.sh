#!/usr/bin/env bash
# Kill the manager of an experiment as a power cut would, and go on: finished trials stay, the others continue.
# Usage: resume.sh run.yaml FOLDER
set -euo pipefail
glioma-nas nni config "$1" --out "$2" --trials 2
glioma-nas nni create "$2" --detach
until ls "$2"/trials/*/epochs.json > /dev/null 2>&1; do sleep 1; done # until a trial has done its first epoch
kill -9 "$(pgrep -f "nni_node/main.js .*$(basename "$2"/experiments/*/)")"
glioma-nas nni status
glioma-nas nni resume "$2"
glioma-nas nni stop "$2"
