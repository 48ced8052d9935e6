# mmdebstrap's customize hook, $1 the new root: the packages of the hypervisor and of the newest kernel, from where the
# root came from, into its /boot. They are unpacked, not installed. Nothing outside of the root can be written to here
# by somebody without root: in his user namespace he is another.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
cd "$1/boot"
kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: *\(linux-image-.*\)/\1/p' | head -n 1)
apt-get -qq -o APT::Sandbox::User=root download "$kernel" xen-hypervisor-4.17-amd64
