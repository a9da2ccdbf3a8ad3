#!/usr/bin/env bash
# Run a training program under DeepSpeed's launcher (0.19), without ssh: run the same line on each machine.
#
#   NPROC=2 launch/deepspeed.sh launch/train.py --config configs/powersgd.yaml
#   NPROC=2 launch/deepspeed.sh configs/deepspeed/onebit_adam.json   # launch/deepspeed_train.py, with DeepSpeed's engine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 IFNAME=eth0 launch/deepspeed.sh launch/train.py ...
#
# Ranks get RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under
# torchrun. The rendezvous is static: failed ranks are not restarted, start again with --resume.
#
# Environment:
#   NPROC            ranks on each machine (1)
#   NNODES           machines (1)
#   NODE_RANK        number of this machine, from 0 (one machine: 0)
#   MASTER_ADDR      address of machine 0 (one machine: 127.0.0.1)
#   MASTER_PORT      a free port there (one machine: looked for; several: 29500)
#   IFNAME           network interface for gloo and NCCL
#   OMP_NUM_THREADS  threads of each rank (1)
#   PYTHON           interpreter (python3)
set -euo pipefail

if [[ ${1:-} == *.json ]]; then
  set -- "$(dirname "${BASH_SOURCE[0]}")/deepspeed_train.py" --config "$@"
fi
python=${PYTHON:-python3}
nproc=${NPROC:-1}
nnodes=${NNODES:-1}
if [[ $nnodes != 1 ]]; then
  for name in NODE_RANK MASTER_ADDR; do
    if [[ -z ${!name:-} ]]; then
      echo "$name: not set, but NNODES=$nnodes needs it; say $name=..." >&2
      exit 2
    fi
  done
fi
port=${MASTER_PORT:-29500}
if [[ $nnodes == 1 && -z ${MASTER_PORT:-} ]]; then
  port=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
fi
export LOCAL_WORLD_SIZE=$nproc OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${IFNAME:-} ]]; then
  export GLOO_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME
fi

# Without ssh, the launcher takes from its host file how many machines and ranks there are; the
# names in it are not looked up.
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
for ((node = 0; node < nnodes; node++)); do
  echo "node$node slots=$nproc"
done >"$hostfile"

"$python" -m deepspeed.launcher.runner --no_ssh --no_local_rank --hostfile "$hostfile" \
  --node_rank "${NODE_RANK:-0}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$port" \
  "$@"
