#!/usr/bin/env bash
# A TPU pod without Kubernetes: makes it, installs on all of its hosts, runs there, and deletes it at the end.
#   PROJECT=… ZONE=us-west4-a MODEL=org/name MESH=tensor=16 tpu_vm.sh "What is the capital of France?"
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${MODEL:?}" "${MESH:?}"
NAME=${NAME:-llmir} TYPE=${TYPE:-v5litepod-16} VERSION=${VERSION:-v2-alpha-tpuv5-lite} QUANTIZE=${QUANTIZE:-int8}
tpu() { gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"; }

tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION"
trap 'tpu delete "$NAME" --quiet' EXIT
tpu scp "$(dirname "$0")/run.sh" "$NAME": --worker=all
tpu ssh "$NAME" --worker=all --command="python3 -m venv llmir && llmir/bin/pip install --quiet llmir-jax 'jax[tpu]'"
printf -v ARGUMENTS '%q ' "$@"
tpu ssh "$NAME" --worker=all \
    --command="PATH=\$HOME/llmir/bin:\$PATH MODEL=$MODEL MESH=$MESH QUANTIZE=$QUANTIZE ./run.sh $ARGUMENTS"
