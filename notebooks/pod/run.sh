#!/usr/bin/env bash
# What every process of a pod runs: the same command. Process 0 prints, the others are silent; if one ends, all do.
#   MODEL=org/name MESH=tensor=16 QUANTIZE=int8 run.sh "What is the capital of France?"
set -euo pipefail
: "${MODEL:?a name on the hub, or a directory that all hosts have}" "${MESH:?as llmir plan says, such as tensor=16}"
exec llmir generate -m "$MODEL" --mesh "$MESH" --coordinator auto -q "${QUANTIZE:-none}" --dtype bfloat16 "$@"
