#!/usr/bin/env bash
# What the jobs of this folder have in common: `train FLAGS...` runs one training step of Slurm, a task for each GPU, and
# puts the job back into the queue when its time is up. To be sourced from the repository.
#   SPARSECOD_PYTHON   the interpreter (default: .venv/bin/python; in an image: python)
#   SPARSECOD_IMAGE    a container image to run in, where Slurm has pyxis
#   SPARSECOD_MOUNTS   what the container sees of the cluster, as pyxis wants it (default: the repository and runs)
#   SPARSECOD_SRUN     more flags for srun

train() {
  local -a in_container=() more=()
  local python=${SPARSECOD_PYTHON:-.venv/bin/python} step status=0 told=""
  if [[ -n ${SPARSECOD_IMAGE:-} ]]; then
    in_container=(--container-image="$SPARSECOD_IMAGE" --container-workdir="$PWD"
      --container-mounts="${SPARSECOD_MOUNTS:-$PWD:$PWD}")
    python=${SPARSECOD_PYTHON:-python}
  fi
  read -r -a more <<<"${SPARSECOD_SRUN:-}"

  srun --kill-on-bad-exit=1 "${in_container[@]}" "${more[@]}" \
    "$python" -m sparsecod_mcore.cluster.launch examples/pretrain_cod.py "$@" &
  step=$!
  # Slurm sends TERM to this script (--signal=B:TERM@...); srun hands it to every task, each of which saves and exits 0.
  trap 'told=yes; kill -TERM "$step"' TERM
  wait "$step" || status=$?
  if [[ -n $told ]]; then # the signal ended that wait; the step is still saving
    trap '' TERM
    status=0
    wait "$step" || status=$?
    if ((status == 0)); then
      echo "saved in time; job $SLURM_JOB_ID goes back into the queue"
      scontrol requeue "$SLURM_JOB_ID"
    fi
  fi
  return "$status"
}
