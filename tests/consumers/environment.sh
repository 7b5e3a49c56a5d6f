#!/bin/sh
# Make the environment of a consumer, .venv/consumers/$1, by the interpreter $2, with the pinned packages of requirements/$1.txt,
# and for transformers-js those of package-lock.json beside it. Where that fails, `failed` in it holds the reason, which the
# tests that need it give for being skipped, and the next `make consumers` tries again.
set -u
here=$(cd "$(dirname "$0")" && pwd)
folder=.venv/consumers/$1
log=$folder/log
rm -rf "$folder"
mkdir -p "$folder"
refuse() {
    reason=$(grep -iE 'error|fatal' "$log" | tail -n 1)
    echo "$(basename "$folder"): $1: ${reason:-$(tail -n 1 "$log")}" | tee "$folder/failed" >&2
    exit 0
}
"$2" -m venv "$folder" >"$log" 2>&1 || refuse "no environment can be made"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$here/requirements/$1.txt" >"$log" 2>&1 ||
    refuse "packages cannot be installed"
if [ "$1" = transformers-js ]; then
    cp "$here/requirements/package.json" "$here/requirements/package-lock.json" "$folder"
    # onnxruntime-node brings its CPU library; the script that it runs after being installed fetches the one for CUDA.
    PATH="$PWD/$folder/bin:$PATH" npm ci --prefix "$folder" --ignore-scripts --no-audit --no-fund >"$log" 2>&1 ||
        refuse "packages of npm cannot be installed"
fi
touch "$folder/ready"
