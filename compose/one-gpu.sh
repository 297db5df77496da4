#!/bin/sh
# Runs a command with an NVIDIA device of its own: the first one that no other container of this composition has.
#
#   one-gpu COMMAND ARGUMENTS...
#
# (With "count: 1" in its reservation, Docker gives every container the machine's first device.) A device is locked in
# the folder that all these containers share; the lock goes to the command, and ends with it.
set -eu
folder=${ONE_GPU_FOLDER:-/srv/devices}
devices=$(nvidia-smi --query-gpu=uuid --format=csv,noheader)
for device in $devices; do
  exec 9>>"$folder/$device"
  if flock --nonblock 9; then
    echo "one-gpu: $device" >&2
    export CUDA_VISIBLE_DEVICES="$device"
    exec "$@"
  fi
done
echo "one-gpu: each of the devices $(echo $devices) has a worker: scale gpu-worker to at most as many" >&2
exit 1
