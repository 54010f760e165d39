#!/usr/bin/env bash
# The most important checks on a machine with one GPU, within a quarter of an hour and without a network.
#
#   scripts/gpu_check.sh --collect [--all]     first, where there is a package index: download the wheels
#   scripts/gpu_check.sh [OUT]                 on that machine, from the repository root: run the stages, write OUT
#
#   --wheels DIR    folder of the wheels (wheels)
#   --python 3.12   the Python that the wheels are for
#   --all           with packages that a machine for training usually has: numpy, scipy, ..., transformers
#   --limit S       seconds for everything (880)
#   --each S        limit of each stage (880)
#   --grace S       seconds from SIGTERM to SIGKILL (20): a run saves a checkpoint
#   --stages A,B    only these stages: kernels, tests, step, layer, step_512, step_1152, ranking
#
# PYTHON names the interpreter, which must have torch with CUDA; missing packages are installed from the
# wheels into a temporary folder. The most important stages come first, each with its own limit. OUT has one log for
# each, and summary.txt, to which a line is added as each ends, so results survive the loss of the machine.
# MOEBENCH_TEST_DEVICE=cpu tries everything on a CPU, in small sizes.
#
# Exit codes: 0 all stages succeeded, 1 some failed, 2 no GPU, no torch, or an unknown option.
set -uo pipefail

PYTHON=${PYTHON:-python3}
DEVICE=${MOEBENCH_TEST_DEVICE:-cuda}
OUT=gpu_check WHEELS=wheels LIMIT_S=880 EACH_S=880 GRACE_S=20 FOR_PYTHON=3.12 STAGES='' COLLECT='' ALL=''
ALL_STAGES=(kernels tests step layer step_512 step_1152 ranking)

# Besides torch and its dependencies; without mlflow and datasets: no tracker runs, and the data are in the package.
SMALL=(PyYAML lightning lightning-utilities torchmetrics packaging tqdm typer annotated-doc shellingham rich
  markdown-it-py mdurl pygments pydantic pydantic-core annotated-types typing-inspection filelock psutil
  soundfile cffi pycparser pytest pytest-timeout pytest-xdist execnet
  iniconfig pluggy hypothesis sortedcontainers)
PEERS=(st-moe-pytorch mixture-of-experts soft-moe-pytorch einops beartype CoLT5-attention local-attention
  hyper-connections torch-einops-utils liger-kernel)
LARGE=(numpy scipy pandas pyarrow pillow matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six
  statsmodels patsy formulaic interface_meta narwhals wrapt tokenizers huggingface_hub hf-xet regex safetensors
  transformers)

die() {
  echo "gpu_check: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --collect) COLLECT=yes ;;
    --all) ALL=yes ;;
    --wheels | --python | --limit | --each | --grace | --stages)
      (($# > 1)) || die "$1: a value is missing"
      case $1 in
        --wheels) WHEELS=$2 ;;
        --python) FOR_PYTHON=$2 ;;
        --limit) LIMIT_S=$2 ;;
        --each) EACH_S=$2 ;;
        --grace) GRACE_S=$2 ;;
        --stages) STAGES=$2 ;;
      esac
      shift
      ;;
    -*) die "$1: no such option (allowed: --collect, --all, --wheels, --python, --limit, --each, --grace, --stages)" ;;
    *) OUT=$1 ;;
  esac
  shift
done
for seconds in "$LIMIT_S" "$EACH_S" "$GRACE_S"; do
  [[ $seconds =~ ^[0-9]+$ ]] || die "--limit, --each, --grace: '$seconds' is not a whole number of seconds"
done
for stage in ${STAGES//,/ }; do
  [[ " ${ALL_STAGES[*]} " == *" $stage "* ]] || die "--stages: '$stage' is unknown (allowed: ${ALL_STAGES[*]})"
done
[[ $DEVICE == cpu || $DEVICE == cuda ]] || die "MOEBENCH_TEST_DEVICE: '$DEVICE' is unknown (allowed: cuda, cpu)"
[[ -f pyproject.toml && -d moebench ]] || die "run it from the repository root"

collect() {
  local wanted=("${SMALL[@]}" "${PEERS[@]}") platforms=() name
  [[ -n $ALL ]] && wanted+=("${LARGE[@]}")
  for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
  done
  mkdir -p "$WHEELS" && rm -f "$WHEELS"/*.whl || return 1 # two versions of one package would stop the installation
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
    --python-version "$FOR_PYTHON" "${platforms[@]}" --constraint constraints.txt --dest "$WHEELS" "${wanted[@]}" || return 1
  echo "$(find "$WHEELS" -name '*.whl' | wc -l) wheels for Python $FOR_PYTHON, $(du -sm "$WHEELS" | cut -f1) MB, in $WHEELS"
}

if [[ -n $COLLECT ]]; then
  collect || die "the wheels could not be collected; see above"
  exit 0
fi

"$PYTHON" -c 'import torch' 2>/dev/null || die "$PYTHON has no torch (PYTHON names another interpreter)"
[[ $DEVICE == cpu ]] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  die "torch finds no CUDA device (MOEBENCH_TEST_DEVICE=cpu tries the script without one)"

BEGIN_S=$SECONDS FAILED=0
mkdir -p "$OUT" || die "$OUT: cannot be written"
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/summary.txt
WORK=$(mktemp -d) || die "no folder for temporary files"
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH=$PWD:$WORK/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=160
export MOEBENCH_RESULTS=$WORK/results

report() { # print a line, and append it to the summary
  echo "$*" | tee -a "$SUMMARY"
}

left_s() {
  echo $((LIMIT_S - (SECONDS - BEGIN_S)))
}

# run_stage NAME SECONDS COMMAND...: run a command with a time limit and report its outcome; later stages run anyway.
run_stage() {
  local name=$1 limit=$2 left begin=$SECONDS code
  shift 2
  [[ -z $STAGES || ,$STAGES, == *,$name,* ]] || return 0
  left=$(($(left_s) - GRACE_S))
  if ((left < 1)); then
    report "$name: not run: out of time"
    FAILED=1
    return 0
  fi
  [[ $DEVICE == cuda ]] || limit=$((limit * 3)) # a trial run on a shared CPU
  ((limit < EACH_S)) || limit=$EACH_S
  ((limit < left)) || limit=$left
  timeout --kill-after="$GRACE_S" "$limit" "$@" >"$OUT/$name.log" 2>&1 </dev/null
  code=$?
  case $code in
    0) report "$name: ok, $((SECONDS - begin)) s" ;;
    124 | 137) report "$name: stopped after $limit s; partial output in $name.log" ;;
    *) report "$name: failed with exit code $code, $((SECONDS - begin)) s: $(grep -v '^\s*$' "$OUT/$name.log" | tail -n 1 | cut -c 1-200)" ;;
  esac
  ((code == 0)) || FAILED=1
}

# Install only packages that are missing or too old for pyproject.toml: torch and its companions are left as they are.
install_wheels() {
  "$PYTHON" - "$WHEELS" "$WORK/site" <<'PYTHON'
import re, subprocess, sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

def numbers(text):
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])

wheels, target = sys.argv[1:]
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
least = dict(re.findall(r'([\w.-]+)>=([\d.]+)', " ".join(project["dependencies"])))
chosen = []
for wheel in sorted(Path(wheels).glob("*.whl")):
    name = wheel.name.split("-")[0].replace("_", "-").lower()
    try:
        if numbers(version(name)) >= numbers(least.get(name, "0")):
            continue
    except PackageNotFoundError:
        pass
    chosen.append(str(wheel))
print(len(chosen), "wheels to install", *(Path(wheel).name for wheel in chosen), flush=True)
if chosen:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    sys.exit(subprocess.call([*pip, "--disable-pip-version-check", "--target", target, *chosen]))
PYTHON
}

# Keep the results of finished cells, also of an interrupted run, one per line.
keep_results() {
  find "$MOEBENCH_RESULTS/runs" -name result.json -exec sh -c 'tr -d "\n" <"$1"; echo' _ {} \; >"$OUT/results.jsonl" 2>/dev/null
  report "results: $(wc -l <"$OUT/results.jsonl") finished cells"
}

if [[ $DEVICE == cuda ]]; then
  TESTS='group_of_one or one_process or exchange or no_multiple or evaluated or synchronise or resumed'
  STEP=(--steps 20 --rounds 3) LAYER=(--only gpu --rounds 3) ROUTERS=(--router dense --router switch --router top_k)
  WIDE=(task.sequence_length=512 model.num_layers=8 layout.num_experts=16 train.batch_size=16)
  W512=(model.d_model=512 model.num_heads=8 model.ffn_width=2048)
  W1152=(model.d_model=1152 model.num_heads=16 model.ffn_width=4608)
  MODEL=() RANKING=()
else
  TESTS='collectives_of_one_process or no_multiple'
  STEP=(--steps 1 --rounds 1 --threads 1) LAYER=(--shape '64,16,16,4,2,swiglu' --rounds 1 --threads 1) ROUTERS=(--router switch)
  WIDE=(task.sequence_length=16 train.batch_size=2)
  W512=(model.d_model=16 model.num_heads=2 model.ffn_width=32)
  W1152=("${W512[@]}") MODEL=("${WIDE[@]}" "${W512[@]}" model.num_layers=2)
  RANKING=(tune=null seeds='[0]' 'grid.router=[dense,top_k]' task.data.pack=domains task.data.tokenizer=bytes task.sequence_length=16
    task.eval_windows=2 model.d_model=16 model.num_layers=1 train.steps=2 train.batch_size=2 train.precision=fp32)
fi
run_module=("$PYTHON" -m)
STEP_BENCH=("${run_module[@]}" moebench bench step --device "$DEVICE" --markdown "${STEP[@]}" "${ROUTERS[@]}")
HALF=$([[ $DEVICE == cuda ]] && echo bf16 || echo fp32)

report "$(date -u +%FT%TZ), $DEVICE, limit $LIMIT_S s: $("$PYTHON" -c 'import platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, *[torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())])')"
# Not a stage, because all stages need it.
if install_wheels >"$WORK/setup.log" 2>&1; then
  report "setup: $(head -n 1 "$WORK/setup.log" | cut -c 1-500)"
else
  report "setup: failed: $(tail -n 1 "$WORK/setup.log" | cut -c 1-500)"
  FAILED=1
fi

run_stage kernels 120 "${run_module[@]}" pytest -p no:cacheprovider -m gpu --timeout 100 tests/gpu/test_gpu_kernels.py tests/gpu/test_gpu_routing_kernels.py tests/gpu/test_gpu_step.py
run_stage tests 200 "${run_module[@]}" pytest -p no:cacheprovider -m gpu -k "$TESTS" --timeout 120 tests/gpu tests/contract/test_execution.py
run_stage step 90 "${STEP_BENCH[@]}" "${MODEL[@]}" train.precision="$HALF"
run_stage layer 200 "${run_module[@]}" moebench bench layer --device "$DEVICE" --markdown "${LAYER[@]}"
run_stage step_512 90 "${STEP_BENCH[@]}" "${WIDE[@]}" "${W512[@]}" train.precision="$HALF"
run_stage step_1152 90 "${STEP_BENCH[@]}" "${WIDE[@]}" "${W1152[@]}" train.precision="$HALF"
run_stage ranking 600 "${run_module[@]}" moebench run results/published/routers_h200.yaml --jobs 9 --tracker none --ignore-memory \
  train.device="$DEVICE" "${RANKING[@]}"
keep_results
report "total: $((SECONDS - BEGIN_S)) s"
exit $FAILED
