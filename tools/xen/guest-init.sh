#!/bin/sh
# /init of the lab's Linux guest: busybox, the modules in order, then each line from the console is evaluated.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/hvc0 >/dev/hvc0 2>&1
stty -echo -onlcr
for module in $(cat /modules/order); do
  insmod "/modules/$module" || echo "insmod $module failed"
done
echo "guest is up"
while read -r line; do
  eval "$line" </dev/null
done
