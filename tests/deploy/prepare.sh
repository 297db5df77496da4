#!/usr/bin/env bash
# Makes what the tests of this folder need and a machine may lack: programs from Debian, an image to build on, wheels.
# Each only once; as root, for apt-get, debootstrap and dockerd ask for it.
#
#   prepare.sh PYTHON     PYTHON has pip, and decides for which versions the wheels are
#
# Leaves ~/.cache/gym-queue/base.tar (Debian 12 with python3 and redis-server) and build/wheelhouse.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gym-queue
wheelhouse=build/wheelhouse

declare -A package_of=(
  [dockerd]=docker.io [docker-compose]=docker-compose [debootstrap]=debootstrap [chromium]=chromium
)
missing=()
for program in "${!package_of[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
if ((${#missing[@]})); then
  echo "Installing ${missing[*]}"
  if [[ $(id -u) != 0 ]]; then
    echo "that needs root: sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" iptables >/dev/null
fi

base=$cache/base.tar
if [[ ! -s $base ]]; then
  echo "Making $base (a minute, the first time)"
  mkdir -p "$cache"
  root=$(mktemp -d "$cache/base.XXXXXX")
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,redis-server bookworm "$root" \
    >"$cache/debootstrap.log" 2>&1 || { tail -n 20 "$cache/debootstrap.log" >&2; exit 1; }
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  tar -C "$root" -cf "$base.part" .
  mv "$base.part" "$base"
fi

# torch and transformers are left out: the workers of these tests play their models.
wanted=$(cat pyproject.toml constraints.txt "$0" compat/pycosat/* | sha256sum)
if [[ $(cat "$wheelhouse/.made-of" 2>/dev/null) != "$wanted" ]]; then
  echo "Making $wheelhouse"
  rm -rf "$wheelhouse" && mkdir -p "$wheelhouse"
  # async-timeout: what redis-py needs on Python before 3.11.3, such as Debian's.
  "$python" -m pip wheel --quiet --disable-pip-version-check --constraint constraints.txt --wheel-dir "$wheelhouse" \
    pip setuptools hatchling editables async-timeout ./compat/pycosat .
  rm "$wheelhouse"/gym_queue-*.whl "$wheelhouse"/pycosat-*.whl
  echo "$wanted" >"$wheelhouse/.made-of"
fi
