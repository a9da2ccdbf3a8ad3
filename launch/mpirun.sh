#!/usr/bin/env bash
# Run a training program under Open MPI's mpirun, which starts the ranks; they talk over gloo or NCCL, and schemes with
# a coordinator over MPI if their recipe says transport: mpi.
#
#   launch/mpirun.sh -n 2 launch/train.py --config configs/powersgd.yaml
#   NNODES=2 NPROC=4 HOSTFILE=hosts MASTER_ADDR=host0 IFNAME=eth0 launch/mpirun.sh launch/train.py ...
#
# Run it once, on the machine that mpirun starts from. Ranks get RANK, WORLD_SIZE, LOCAL_RANK,
# LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under torchrun. When one fails, mpirun ends all, unless it is told
# MPIRUN_ARGS="--with-ft ulfm": then schemes that can do without a worker go on without it.
#
# Environment:
#   NPROC            ranks on each machine (1), if there is no -n
#   NNODES           machines (1)
#   HOSTFILE         Open MPI's list of machines; needed when there are several
#   MASTER_ADDR      machine of rank 0, the first of HOSTFILE (one machine: 127.0.0.1)
#   MASTER_PORT      a free port there (one machine: looked for; several: 29500)
#   IFNAME           network interface for gloo and NCCL
#   OMP_NUM_THREADS  threads of each rank (1)
#   PYTHON           interpreter, the same path on each machine (python3)
#   MPIRUN           mpirun of Open MPI 4 or 5 (mpirun)
#   MPIRUN_ARGS      more for mpirun, separated by spaces
# Open MPI refuses to run as root unless OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -euo pipefail

python=${PYTHON:-python3}
nproc=${NPROC:-1}
if [[ ${1:-} == -n ]]; then
  if [[ ! ${2:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "-n: got '${2:-}', but it takes the number of ranks on each machine" >&2
    exit 2
  fi
  nproc=$2
  shift 2
fi
nnodes=${NNODES:-1}
hosts=()
if [[ $nnodes != 1 ]]; then
  for name in HOSTFILE MASTER_ADDR; do
    if [[ -z ${!name:-} ]]; then
      echo "$name: not set, but NNODES=$nnodes needs it; say $name=..." >&2
      exit 2
    fi
  done
  hosts=(--hostfile "$HOSTFILE")
fi
if [[ -z ${MASTER_PORT:-} ]]; then
  MASTER_PORT=29500
  if [[ $nnodes == 1 ]]; then
    MASTER_PORT=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
  fi
fi
export MASTER_PORT MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
export LOCAL_WORLD_SIZE=$nproc OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exported=(-x MASTER_ADDR -x MASTER_PORT -x LOCAL_WORLD_SIZE -x OMP_NUM_THREADS)
if [[ -n ${IFNAME:-} ]]; then
  export GLOO_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME
  exported+=(-x GLOO_SOCKET_IFNAME -x NCCL_SOCKET_IFNAME)
fi

# shellcheck disable=SC2016,SC2086  # the ranks expand the first, words of MPIRUN_ARGS are split
exec "${MPIRUN:-mpirun}" -n $((nnodes * nproc)) "${hosts[@]}" \
  --map-by "ppr:$nproc:node:oversubscribe" --bind-to none "${exported[@]}" ${MPIRUN_ARGS:-} \
  bash -c 'export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE
           export LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK
           exec "$@"' rank "$python" "$@"
