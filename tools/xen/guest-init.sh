#!/bin/sh
# /init of the lab's Linux guest: busybox, the modules in order, then each line from the console is evaluated.
# `load NAME` is for those lines: the modules of another list that the image has (GUEST_MODULES in image.py).
# With root=/dev/xvda on the kernel's command line that disk's /sbin/init goes on instead.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/hvc0 >/dev/hvc0 2>&1
stty -echo -onlcr
load() {
  for module in $(cat "/modules/$1"); do
    insmod "/modules/$module" || return
  done
}
load boot || echo "insmod $module failed"
root=$(sed -n 's/.*\broot=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ -n "$root" ]; then
  for i in $(seq 600); do [ -b "$root" ] && break; sleep 0.1; done
  mount -t ext4 "$root" /mnt
  for each in proc sys dev; do mount -o move "/$each" "/mnt/$each"; done
  exec switch_root /mnt /sbin/init
fi
echo "guest is up"
while read -r line; do
  eval "$line" </dev/null
done
