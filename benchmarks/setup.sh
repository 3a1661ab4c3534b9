#!/usr/bin/env bash
# Make .venv-bench: Maodun beside its peers, in an environment of its own. Safe to run again.
# PYTHON names the interpreter (default python3), TORCH the torch to install (default torch==2.13.0), TORCH_INDEX an index
# with CPU wheels, where the default one has CUDA builds only.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
env=.venv-bench
stamp=$env/.complete
if [ -f "$stamp" ] && [ "$stamp" -nt benchmarks/requirements.txt ] && [ "$stamp" -nt benchmarks/peers.txt ]; then
  exit 0
fi
[ -x $env/bin/python ] || "$python" -m venv $env
pip="$env/bin/python -m pip install --quiet --disable-pip-version-check"

# torch first and pinned, so that nothing that follows can choose another build of it.
if ! $env/bin/python -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null; then
  $pip ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "${TORCH:-torch==2.13.0}"
fi
$pip -r benchmarks/requirements.txt
# Peers without their dependencies: torchattacks pins requests~=2.25.1 and asks for torchvision, adv-lib asks for
# torchvision and visdom; either would pull a CUDA build of torch, or fail to build.
$pip --no-deps -r benchmarks/peers.txt
$pip -e '.[data]'
$env/bin/python - <<'PY'
import torch
from benchmarks.contenders import peer
for library in ("torchattacks", "foolbox", "art", "advlib"):
    try:
        peer(library, "pgd")
        print(f"{library}: ready")
    except Exception as error:
        print(f"{library}: will be missing from the table: {error}")
print("torch", torch.__version__)
PY
touch "$stamp"
