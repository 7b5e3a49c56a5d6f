#!/bin/sh
# Unpack what tests need beside Python, docker-registry and skopeo, which those of registries talk to, and qemu, which runs a
# CPU that has no VNNI, from Debian's packages into the folder $1. Nothing is installed or started, and nobody need be root.
# Without apt-get those tests skip, and say why.
set -eu
folder=$1
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    echo "no apt-get here: the tests that need docker-registry or qemu will be skipped" >&2
    exit 0
fi
rm -rf "$folder"
mkdir -p "$folder/new/lists/partial" "$folder/new/cache/archives/partial"
cd "$folder/new"
lists=
fetch() { apt-get -q=2 -o APT::Sandbox::User= $lists download "$@" >log 2>&1; }
if ! fetch docker-registry; then
    # The machine's own lists of packages are missing or old, and only root may renew them: use our own.
    lists="-o Dir::State::lists=$PWD/lists -o Dir::Cache=$PWD/cache"
    if ! { apt-get -q=2 -o APT::Sandbox::User= $lists update >log 2>&1 && fetch docker-registry; }; then
        echo "docker-registry cannot be fetched by apt-get: $(tail -n 1 log)" >&2
        exit 1
    fi
fi
# A second client, and a CPU, with their libraries as Debian's releases name them; the tests that ask them skip without.
for package in skopeo libgpgme11 libgpgme11t64 libassuan0 libassuan9 libdevmapper1.02.1 \
    qemu-user libcapstone4 libcapstone5 libglib2.0-0 libglib2.0-0t64 libgnutls30 libgnutls30t64 libnuma1 liburing2; do
    fetch "$package" || true
done
for package in *.deb; do
    dpkg -x "$package" ..
done
cd ..
rm -rf new
touch ready
