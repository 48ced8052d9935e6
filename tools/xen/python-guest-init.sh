#!/bin/busybox sh
# /init of the lab's Python guest: busybox's programs, the modules for user space (no blkfront: that is the test's
# to load), then the agent on the console for ever. What the kernel says goes there, too.
/bin/busybox --install -s /usr/bin
export PATH=/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8 PYTHONPATH=/xenbus/src:/xenbus PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
exec </dev/hvc0 >/dev/hvc0 2>&1
stty raw -echo
ifconfig lo 127.0.0.1 up
for module in xen-evtchn xen-gntdev xenfs; do modprobe "$module" || echo "no $module"; done
modprobe xen-gntalloc limit=32768 || echo "no xen-gntalloc"
mount -t xenfs xenfs /proc/xen
cd /xenbus
while :; do
  python3 -u -m tests.support.guest_agent
  echo "the agent has ended: $?"
done
