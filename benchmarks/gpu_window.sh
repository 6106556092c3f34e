#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first.
#
# A visit is three calls of less than ten minutes each, in this order; each stays below BUDGET where every step takes all of its
# LIMIT (below). One call after the other, while the machine still has the build of the first: where it has not, "build" comes
# first by itself, and what then finds no time left is said in steps.jsonl. A step that hangs costs its limit and ten seconds,
# one of tests twenty.
#
#   STEPS="facts build smoke headline" benchmarks/gpu_window.sh     is it right, is it fast; beside the build, parity of Triton
#   STEPS="parity sanitize micro peers" benchmarks/gpu_window.sh    is all of it right; what the design rests on; torch.compile
#   STEPS="ops profile sizes slow" benchmarks/gpu_window.sh         where the time goes (gates by descriptor and by address too)
#
# Half an hour in all is less than three calls, their start and transfers: give the third BUDGET=the seconds left, less 40.
# Every call empties OUT: fetch it before the next. `python -m benchmarks.gpu.collect merge` puts three bench.json into one.
#
#   benchmarks/gpu_window.sh                       all steps, as far as BUDGET goes
#   DRY_RUN=1 benchmarks/gpu_window.sh             every command on a machine without a GPU, as far as it goes
#
# Each step has a timeout of its own, so that one that hangs or fails costs only itself; what is done is stored before the
# next begins. Needs Python with torch, pytest and what setup.py needs (cmake, ninja, pybind11); nothing is downloaded.
#
#   OUT       results, default build/gpu_window: steps.jsonl, bench.json, parity.json, micro.json, sanitizer.json,
#             profile.json, profile.ncu-rep, log.txt (at most these eight files)
#   BUDGET    seconds for everything, default 570
#   PYTHON    default python3                      JOBS      default: the number of CPUs
#   MEMNET_CUDA_ARCHS, MEMNET_NO_CUDA ...          as setup.py takes them
#   TRAIN     command of the step "train", for example "benchmarks/train_leg.sh deblock" (what it needs is said there)
#   TRAIN_SECONDS  its timeout, default 500
#   MEMNET_COMMIT  the commit, where the sources come without git's history
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
ROOT=$PWD
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-build/gpu_window}")
WORK=$(realpath -m "${WORK:-build/gpu_window_work}")
BUDGET=${BUDGET:-570}
JOBS=${JOBS:-$(nproc)}
DRY_RUN=${DRY_RUN:-}
STEPS=${STEPS:-facts build smoke headline parity sanitize micro peers ops profile sizes slow train}
TRAIN=${TRAIN:-}
LIB=$WORK/lib
# Seconds at most. Parity and sanitizers run at once; build holds another 40 for facts, profile 40 of reading its file.
declare -A LIMIT=([facts]=40 [build]=280 [smoke]=60 [headline]=100 [parity]=200 [sanitize]=150 [micro]=90 [peers]=230
  [ops]=130 [profile]=130 [sizes]=120 [slow]=120 [train]=${TRAIN_SECONDS:-500})
# A dry run has no clock to beat: on a busy machine an import alone can take a minute.
[ -n "$DRY_RUN" ] && for step in ${!LIMIT[*]}; do [ "$step" = train ] || LIMIT[$step]=$((4 * LIMIT[$step])); done

if ! command -v "$PYTHON" >/dev/null; then
  echo "gpu_window.sh: $PYTHON was not found; name a Python with torch in PYTHON" >&2
  exit 2
fi
for step in $STEPS; do
  if [ -z "${LIMIT[$step]:-}" ]; then
    echo "gpu_window.sh: unknown step '$step' in STEPS" >&2
    exit 2
  fi
done
if [ -z "$DRY_RUN" ] && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "gpu_window.sh: no NVIDIA GPU answers here; DRY_RUN=1 goes as far as it can without one" >&2
  exit 5
fi

# Without a build of these very sources, tests would skip and benchmarks time something else.
STATE=
if [ -z "$DRY_RUN" ]; then
  STATE=$(find setup.py pyproject.toml csrc kernels memnet_fast -type f ! -name '*.pyc' ! -name '*.so' ! -name _build_info.json \
    -print0 | sort -z | xargs -0 sha256sum | sha256sum)
  case " $STEPS " in
  *" build "*) ;;
  *) [ "$(cat "$WORK/built" 2>/dev/null)" = "$STATE" ] || STEPS="build $STEPS" ;;
  esac
fi

# The folder itself may be a mount.
mkdir -p "$OUT"
find "$OUT" -mindepth 1 -delete
rm -rf "$WORK/logs"
mkdir -p "$WORK/logs"
[ -z "$DRY_RUN" ] && export PATH=$PATH:/usr/local/cuda/bin
# The built package comes first, the checkout after it (benchmarks/), the current folder nowhere: its memnet_fast is not built.
export PYTHONSAFEPATH=1 PYTHONPATH=$LIB:$ROOT PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$JOBS}
export MEMNET_CUDA_ARCHS=${MEMNET_CUDA_ARCHS:-80;90a}
# Sanitizer and profiler name source lines; the code is the same.
export NVCC_APPEND_FLAGS=${NVCC_APPEND_FLAGS:--lineinfo}
export MPLBACKEND=Agg

wanted() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }

publish() { # logs so far, into one file; never fails the window
  local logs=("$WORK"/logs/*.log)
  [ -e "${logs[0]}" ] && "$PYTHON" -m benchmarks.gpu.collect log "$OUT/log.txt" "${logs[@]}" >/dev/null 2>&1
  true
}
trap publish EXIT

record() { # name status seconds
  printf '{"step": "%s", "status": %s, "seconds": %s, "at": %s}\n' "$1" "$2" "$3" "$SECONDS" >>"$OUT/steps.jsonl"
  printf '== %-14s status %-3s %4ss   (%ss of %ss)\n' "$1" "$2" "$3" "$SECONDS" "$BUDGET"
}

# bounded LOG LIMIT COMMAND...: at most LIMIT seconds and what is left of the budget. SIGINT first, so that pytest still writes
# what it knows (a command in the background would otherwise ignore it), SIGKILL PATIENCE seconds later, by default ten.
bounded() {
  local log=$WORK/logs/$1.log left=$((BUDGET - SECONDS)) limit=$2
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 3 ]; then
    echo "no time left" >"$log"
    return 125
  fi
  env --default-signal=INT timeout -s INT -k "${PATIENCE:-10}" "$limit" "$@" >"$log" 2>&1
}

step() { # name seconds command...
  local name=$1 begin=$SECONDS status
  bounded "$@"
  status=$?
  record "$name" $status $((SECONDS - begin))
  [ $status -ne 0 ] && tail -n 5 "$WORK/logs/$name.log" | cut -c1-300 | sed 's/^/   | /'
  publish
  return $status
}

# As step, of a program with --journal: where a variant has taken the GPU from it (status 7), it goes on without that variant, as
# long as its seconds last.
step_on() { # name seconds command...
  local name=$1 end=$((SECONDS + $2)) status
  shift 2
  rm -f "$WORK/$name.journal"
  while true; do
    step "$name" $((end - SECONDS)) "$@" --journal "$WORK/$name.journal"
    status=$?
    [ $status -eq 7 ] && [ $((end - SECONDS)) -gt 10 ] || return $status
  done
}

has() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }

# ---- pytest -------------------------------------------------------------------------------------------------------------

# One of several workers has few threads: references run on the CPU.
PYTEST=(env OMP_NUM_THREADS=2 "$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= --tb=short --continue-on-collection-errors)
if [ -n "$DRY_RUN" ]; then
  PYTEST+=(--collect-only)
else
  # A kernel that writes elsewhere poisons its whole process: several workers lose only their own tests. A test that hangs ends.
  # By a thread, for no signal reaches a worker that waits for a kernel; it ends the worker, so there must be several.
  # A fault that many tests meet costs as many workers, of which xdist by itself allows four in the place of each.
  if has xdist; then
    PYTEST+=(-n "$((JOBS < 8 ? JOBS : 8))" --max-worker-restart 1000)
    has pytest_timeout && PYTEST+=(--timeout 60 --timeout-method thread)
  fi
fi
# For the first look, which has less time than a few tests that hang.
HURRY=()
[[ " ${PYTEST[*]} " == *" --timeout "* ]] && HURRY=(--timeout 25)
# Every file with a test that needs a GPU (tests/test_gpu_benchmarks.py holds the list against the marks).
GPU_TESTS=(tests/test_gpu_{parity,module,streams,benchmarks}.py tests/test_adversarial_inputs.py tests/test_restore_restorer.py)
gpu_tests() { # junit, marker expression, -k expression, files...
  local xml=$1 marks=$2 names=$3
  shift 3
  "${PYTEST[@]}" -m "$marks" -k "$names" --junitxml "$WORK/$xml.xml" "$@"
}
collect_parity() {
  local files=("$WORK"/*.xml)
  [ -e "${files[0]}" ] && "$PYTHON" -m benchmarks.gpu.collect parity "${files[@]}" "$OUT/parity.json"
}
# timeout runs programs, not functions. Before it writes what it knows, xdist waits ten seconds for workers that hang.
export -f gpu_tests
run_tests() { # name seconds, then as gpu_tests
  local name=$1 limit=$2
  shift 2
  PATIENCE=20 step "$name" "$limit" bash -c "$(declare -p PYTEST WORK); gpu_tests \"\$@\"" -- "$@"
}

# ---- steps ---------------------------------------------------------------------------------------------------------------

build_package() {
  "$PYTHON" setup.py -q build --build-base "$WORK/build" --build-lib "$LIB" || return 1
  # A build that fails says so and leaves the rest installable; here it is a failure.
  "$PYTHON" - <<'PROGRAM'
import os
import memnet_fast
from memnet_fast import native, native_cuda

print("package:", memnet_fast.__file__)
good = memnet_fast.__file__.startswith(os.environ["LIB"])
for name, part, skip in (("cpu", native, "MEMNET_NO_NATIVE"), ("cuda", native_cuda, "MEMNET_NO_CUDA")):
    reason = part.why_missing()
    # An editable install in the same environment would lend its modules where the build made none.
    if reason is None and not part.module().__file__.startswith(os.environ["LIB"]):
        reason = f"{part.module().__file__} is not from this build"
    print(f"{name}: {reason or 'ok'}")
    good = good and (reason is None or any(os.environ.get(n) for n in (skip, "MEMNET_NO_NATIVE")))
for note in native_cuda.build_info().get("notes", []):
    print("note:", note)
raise SystemExit(0 if good else 1)
PROGRAM
}
build_micro() {
  nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -O3 -Xptxas -warn-spills -o "$WORK/micro" benchmarks/gpu/micro.cu
}
export -f build_package build_micro
export PYTHON WORK LIB OUT

if [ -n "$DRY_RUN" ]; then
  DEVICE=(--device cpu)
  TINY=(--sizes 1x9x8 --seconds 0.05)
  TARGET=(--device cpu --backend torch)
else
  DEVICE=()
  TINY=()
  TARGET=()
fi
network() { # name seconds sizes peers
  local sizes=(--sizes "$3" --peers "$4")
  [ -n "$DRY_RUN" ] && sizes=("${TINY[@]}" --peers none)
  step_on "$1" "$2" "$PYTHON" -m benchmarks.gpu.network "$OUT/bench.json" "${DEVICE[@]}" "${sizes[@]}"
}

wanted facts && step facts ${LIMIT[facts]} "$PYTHON" -m benchmarks.gpu.facts "$OUT/bench.json"

if wanted build; then
  rm -rf "$LIB" "$WORK/built"
  begin=$SECONDS
  # While the compilers work, the GPU runs the tests of the Triton backend, which needs no build: from a copy of the sources.
  triton=
  if [ -z "$DRY_RUN" ]; then
    rm -rf "$WORK/plain"
    mkdir -p "$WORK/plain"
    cp -r memnet_fast "$WORK/plain/memnet_fast"
    cp -r kernels "$WORK/plain/memnet_fast/kernels"
    (
      export PYTHONPATH=$WORK/plain:$ROOT
      PATIENCE=20 bounded parity_triton 240 bash -c "$(declare -p PYTEST WORK); gpu_tests \"\$@\"" -- \
        parity_triton "gpu and not slow" triton "${GPU_TESTS[@]}"
      echo $? >"$WORK/parity_triton.status"
    ) &
    triton=$!
  fi
  bounded build_micro 120 bash -c build_micro &
  micro=$!
  step build $((LIMIT[build] - 40)) bash -c build_package && echo "$STATE" >"$WORK/built"
  # What was noted before the build said that there is none.
  wanted facts && rm -f "$OUT/bench.json" && bounded facts_built 40 "$PYTHON" -m benchmarks.gpu.facts "$OUT/bench.json"
  wait $micro
  record build_micro $? $((SECONDS - begin))
  if [ -n "$triton" ]; then
    wait "$triton"
    record parity_triton "$(cat "$WORK/parity_triton.status")" $((SECONDS - begin))
    tail -n 3 "$WORK/logs/parity_triton.log" | cut -c1-300 | sed 's/^/   | /'
    collect_parity
  fi
fi

wanted smoke && run_tests smoke ${LIMIT[smoke]} smoke "gpu and not slow" "cuda and (full_depth or policy_matched)" \
  tests/test_gpu_parity.py "${HURRY[@]}"

wanted headline && network headline ${LIMIT[headline]} 1080p,256x256 fast

if wanted parity || wanted sanitize; then
  # Correctness does not mind company: tests and sanitizers share the GPU. Nothing is timed meanwhile.
  begin=$SECONDS
  tools=()
  if wanted sanitize; then
    for tool in memcheck racecheck synccheck initcheck; do
      if [ -n "$DRY_RUN" ]; then
        watch=()
      else
        watch=(compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20)
        # Only our kernels: PyTorch's would take all the time.
        compute-sanitizer --help 2>&1 | grep -q -- --kernel-regex && watch+=(--kernel-regex kns=memnet)
      fi
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 bounded "$tool" "${LIMIT[sanitize]}" "${watch[@]}" "$PYTHON" -m benchmarks.gpu.sanitize "${TARGET[@]}" &
      tools+=("$tool:$!")
    done
  fi
  if wanted parity; then
    run_tests parity ${LIMIT[parity]} parity "gpu and not slow" "cuda and not triton" "${GPU_TESTS[@]}"
    collect_parity
  fi
  for entry in ${tools[@]+"${tools[@]}"}; do
    wait "${entry#*:}"
    record "${entry%%:*}" $? $((SECONDS - begin))
  done
  wanted sanitize && "$PYTHON" -m benchmarks.gpu.collect sanitizer "$OUT/sanitizer.json" \
    "$WORK"/logs/{memcheck,racecheck,synccheck,initcheck}.log
fi

if wanted micro; then
  if [ -n "$DRY_RUN" ]; then
    record micro 0 0 # it was compiled with the build; there is nothing to run it on
  elif step micro ${LIMIT[micro]} "$WORK/micro"; then
    cp "$WORK/logs/micro.log" "$OUT/micro.json"
  fi
fi

wanted peers && network peers ${LIMIT[peers]} 1080p,256x256 slow

wanted ops && step_on ops ${LIMIT[ops]} "$PYTHON" -m benchmarks.gpu.ops "$OUT/bench.json" "${DEVICE[@]}" "${TINY[@]}"

if wanted profile; then
  if [ -n "$DRY_RUN" ]; then
    step profile 60 "$PYTHON" -m benchmarks.gpu.profile_target "${TARGET[@]}" --size 1x9x8
  else
    # The first kernels of a pass: packing, first convolution, one memory block and its gate. The clock stays as it is.
    step profile $((LIMIT[profile] - 40)) ncu --clock-control none --set full --profile-from-start off --kernel-name-base mangled -k regex:memnet \
      --launch-count 10 -f -o "$WORK/profile" "$PYTHON" -m benchmarks.gpu.profile_target
    if [ -e "$WORK/profile.ncu-rep" ]; then
      bounded profile_page 40 ncu --import "$WORK/profile.ncu-rep" --page raw --csv
      "$PYTHON" -m benchmarks.gpu.collect ncu "$WORK/logs/profile_page.log" "$OUT/profile.json"
      [ "$(stat -c %s "$WORK/profile.ncu-rep")" -lt $((15 << 20)) ] && cp "$WORK/profile.ncu-rep" "$OUT/"
      rm -f "$WORK/logs/profile_page.log" # its numbers are in profile.json
    fi
  fi
fi

wanted sizes && network sizes ${LIMIT[sizes]} 512x512,4k,16x64x64,4x256x256,16x256x256,64x256x256 fast

if wanted slow; then
  run_tests slow ${LIMIT[slow]} slow "gpu and slow" "cuda or triton" "${GPU_TESTS[@]}"
  collect_parity
fi

if wanted train && [ -n "$TRAIN" ]; then
  step train "${LIMIT[train]}" bash -c "$TRAIN"
fi

publish
echo "results are in $OUT"
# The window itself has done its work when it comes here; steps.jsonl says what failed.
exit 0
