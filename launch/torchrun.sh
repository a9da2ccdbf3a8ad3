#!/usr/bin/env bash
# Run a training program under torchrun, with the settings that make it dependable on gloo and NCCL.
#
#   NPROC=2 launch/torchrun.sh launch/train.py --config configs/powersgd.yaml
#
# Several machines: run the same line on each, with a port of the first machine as the meeting point.
#
#   NNODES=2 RDZV_ENDPOINT=host0:29400 IFNAME=eth0 launch/torchrun.sh launch/train.py ...
#
# Environment:
#   NPROC               ranks on this machine (1)
#   NNODES              machines, or MIN:MAX to let them come and go (1)
#   RDZV_ENDPOINT       host:port where machines meet (one machine: a free local port)
#   NODE_RANK           number of this machine, 0 being that of RDZV_ENDPOINT; only needed where torch
#                       does not recognise the endpoint's name as its own, and then on each machine
#   LOCAL_ADDR          address at which the other machines reach this one (what its name resolves to);
#                       ranks are numbered in the order of these addresses as text
#   RDZV_ID             name of the job, the same on each machine (commkit)
#   RDZV_CONF           more for the rendezvous, as KEY=VALUE,...
#   MAX_RESTARTS        restarts after a failed rank (0); the program must be started with --resume
#   IFNAME              network interface for all of the following; needed when the host's name
#                       resolves to 127.0.0.1
#   GLOO_SOCKET_IFNAME  interface for gloo (IFNAME)
#   NCCL_SOCKET_IFNAME  interface for NCCL (GLOO_SOCKET_IFNAME)
#   OMP_NUM_THREADS     threads of each rank (1)
#   PYTHON              interpreter (python3)
set -euo pipefail

nnodes=${NNODES:-1}
if [[ $nnodes != 1 && -z ${RDZV_ENDPOINT:-} ]]; then
  echo "RDZV_ENDPOINT: not set, but NNODES=$nnodes needs a meeting point; say RDZV_ENDPOINT=host:port" >&2
  exit 2
fi

# With torchrun's store shared, restarted ranks on gloo read the addresses of the dead ones and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ifname=${GLOO_SOCKET_IFNAME:-${IFNAME:-}}
if [[ -n $ifname ]]; then
  export GLOO_SOCKET_IFNAME=$ifname NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$ifname}
  export TP_SOCKET_IFNAME=${TP_SOCKET_IFNAME:-$ifname}  # torch's RPC
fi

conf=${RDZV_CONF:-}
if [[ -n ${RDZV_ENDPOINT:-} && -n ${NODE_RANK:-} && $conf != *is_host=* ]]; then
  if [[ $NODE_RANK == 0 ]]; then is_host=1; else is_host=0; fi
  conf=is_host=$is_host${conf:+,$conf}
fi
local_addr=()
if [[ -n ${LOCAL_ADDR:-} ]]; then local_addr=(--local-addr "$LOCAL_ADDR"); fi

# The c10d rendezvous: the static one cannot restart.
exec "${PYTHON:-python3}" -m torch.distributed.run \
  --nnodes "$nnodes" \
  --nproc-per-node "${NPROC:-1}" \
  --max-restarts "${MAX_RESTARTS:-0}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}" \
  --rdzv-id "${RDZV_ID:-commkit}" \
  --rdzv-conf "$conf" \
  "${local_addr[@]}" \
  "$@"
