#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: environment, doctor, tests marked gpu, engines of every GPU target
# for this machine's architecture, every bench. Writes OUT/<UTC time>/result.json and log.txt beside it.
#
#   benchmarks/gpu.sh [--dry-run] [--quick] [--venv DIR] [--checkpoint SRC] [--out DIR]
#
# --dry-run prints the steps. --quick: the benches' smallest cases. --venv: an environment that is there already (default:
# .venv-gpu, made when it is not). --checkpoint: what engines are built from (default: synthetic:nano?seed=0).
# Exit codes: 0 every step went well, 1 some did not (result.json says which), 2 usage, 3 no GPU or no environment.
set -euo pipefail
cd "$(dirname "$0")/.."

TARGETS=(torch ort-cuda tensorrt-rtx tensorrt)
BENCHES=(kernels tiles encoders llm)

dry_run=''
quick=()
venv=.venv-gpu
checkpoint='synthetic:nano?seed=0'
out=out/gpu

fail() {
    echo "gpu.sh: $2" >&2
    exit "$1"
}

while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=yes ;;
        --quick) quick=(--quick) ;;
        --venv | --checkpoint | --out)
            [ $# -ge 2 ] || fail 2 "$1 wants a value"
            case $1 in
                --venv) venv=$2 ;;
                --checkpoint) checkpoint=$2 ;;
                *) out=$2 ;;
            esac
            shift
            ;;
        *) fail 2 "$1 is no option, expected --dry-run, --quick, --venv, --checkpoint or --out" ;;
    esac
    shift
done

if [ -z "$dry_run" ] && ! { gpus=$(nvidia-smi -L 2>/dev/null) && [ -n "$gpus" ]; }; then
    fail 3 "no NVIDIA GPU here (nvidia-smi -L lists none): nothing was run; --dry-run prints the steps"
fi

here=$out/$(date -u +%Y%m%dT%H%M%SZ)
failed=''

# step NAME FILE COMMAND...: runs it, its standard output in FILE, both streams' rest in the log; a failure is recorded
# and the next step runs.
step() {
    local name=$1 file=$2 code=0 started
    shift 2
    if [ -n "$dry_run" ]; then
        echo "$name: $*"
        return
    fi
    echo "== $name: $*" | tee -a "$here/log.txt"
    started=$(date +%s)
    "$@" >"$here/$file" 2>>"$here/log.txt" || code=$?
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$(($(date +%s) - started))" "$file" >>"$here/steps.tsv"
    if [ "$code" -ne 0 ]; then
        failed="$failed $name"
        echo "$name: exit code $code, see $here/log.txt" >&2
    fi
}

# onnxruntime-gpu takes the place of onnxruntime: the same module, never both.
environment() {
    python3 -m venv "$venv" &&
        "$venv/bin/pip" install -q -c constraints/full.txt -e '.[export,tensorrt-rtx,dev]' &&
        "$venv/bin/pip" uninstall -q -y onnxruntime &&
        "$venv/bin/pip" install -q 'onnxruntime-gpu[cuda,cudnn]' tensorrt
}

[ -n "$dry_run" ] || mkdir -p "$here"
if [ ! -x "$venv/bin/python" ]; then
    step environment environment.txt environment
fi
[ -n "$dry_run" ] || [ -x "$venv/bin/wsi-rt" ] || fail 3 "$venv has no wsi-rt: see $here/log.txt"

step doctor doctor.json "$venv/bin/wsi-rt" doctor --json
# Target torch would run, and verify, on the CPU.
step torch-cuda torch-cuda.txt "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
step tests tests.txt "$venv/bin/python" -m pytest -n 0 -m gpu
for target in "${TARGETS[@]}"; do
    step "build-$target" "build-$target.txt" \
        "$venv/bin/wsi-rt" build-engines --checkpoint "$checkpoint" --target "$target" --out "$here/$target"
    step "verify-$target" "verify-$target.json" "$venv/bin/wsi-rt" verify "$here/$target" --target "$target" --json
done
for bench in "${BENCHES[@]}"; do
    step "bench-$bench" "bench-$bench.json" "$venv/bin/wsi-rt" bench "$bench" "${quick[@]}" --json
done
[ -z "$dry_run" ] || exit 0

"$venv/bin/python" - "$here" "$checkpoint" "$(git describe --always --dirty 2>/dev/null || echo unknown)" "$gpus" <<'PYTHON'
import json
import sys
from pathlib import Path

here, checkpoint, commit, gpus = Path(sys.argv[1]), *sys.argv[2:]


def told(path):
    """A step's own JSON, where it wrote some."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


steps = []
for line in (here / "steps.tsv").read_text().splitlines():
    name, code, seconds, file = line.split("\t")
    row = {"name": name, "exit_code": int(code), "seconds": int(seconds), "file": file}
    steps.append({**row, "result": told(here / file)} if file.endswith(".json") else row)
result = {"time": here.name, "commit": commit, "gpus": gpus.splitlines(), "checkpoint": checkpoint, "steps": steps}
(here / "result.json").write_text(json.dumps(result, indent=1) + "\n")
PYTHON
echo "$here/result.json"
[ -z "$failed" ] || fail 1 "these steps failed:$failed"
