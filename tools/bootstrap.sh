#!/usr/bin/env bash
# Makes .venv from uv.lock, with a uv of its own in RAYPLANE_HOME. Says what it does; does nothing when nothing changed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
home=${RAYPLANE_HOME:-$HOME/.cache/rayplane}
uv_version=0.13.9
export UV_CACHE_DIR=$home/uv/cache UV_PROJECT_ENVIRONMENT=$root/.venv UV_PYTHON_DOWNLOADS=never

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Prints the first Python in the supported window.
pick_python() {
  local candidate
  for candidate in python3.11 python3 python3.12 python3.13; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; then
      command -v "$candidate"
      return
    fi
  done
  die "Python 3.11, 3.12 or 3.13 is needed and was not found on PATH; on Debian: apt-get install python3"
}

install_uv() {
  local python=$1 venv=$home/uv/bootstrap
  [ -x "$venv/bin/uv" ] && [ "$("$venv/bin/uv" --version | cut -d' ' -f2)" = "$uv_version" ] && return
  say "installing uv $uv_version into $venv"
  mkdir -p "$home/uv"
  if ! "$python" -m venv --clear "$venv" >/dev/null 2>&1; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      die "python3 -m venv does not work; on Debian: apt-get install python3-venv"
    fi
    say "installing python3-venv"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    "$python" -m venv --clear "$venv"
  fi
  "$venv/bin/pip" install --quiet --disable-pip-version-check "uv==$uv_version"
}

python=$(pick_python)
install_uv "$python"
stamp=$root/.venv/.rayplane-stamp
key=$(cat "$root/uv.lock" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)
# The checkout as the collection rayplane.platform, for ansible.cfg and for Python.
mkdir -p "$root/.collections/ansible_collections/rayplane"
ln -sfn ../../.. "$root/.collections/ansible_collections/rayplane/platform"
if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
  say "installing Ansible, its collections and the test tools into .venv"
  (cd "$root" && "$home/uv/bootstrap/bin/uv" sync --quiet --frozen --all-extras --python "$python")
  printf '%s' "$key" > "$stamp"
fi
