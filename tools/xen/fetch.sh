#!/bin/sh
# mmdebstrap's customize hook, $1 the new root, $2 where to put things: the packages of the hypervisor and of the
# newest kernel, from where the root came from. They are unpacked, not installed.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
cd "$2"
kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: *\(linux-image-.*\)/\1/p' | head -n 1)
apt-get -qq -o APT::Sandbox::User=root download "$kernel" xen-hypervisor-4.17-amd64
