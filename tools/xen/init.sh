#!/bin/sh
# /init of the lab's dom0: what a Debian dom0 has after boot, without udev and systemd; then the job, then off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8 PYTHONPATH=/xenbus/src
export PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /run/lock /run/xen /run/xenstored /var/lib/xenstored /var/log/xen/console /var/lib/xen /results
ln -sfn /run /var/run
ln -sfn /run/lock /var/lock
depmod
for module in xen-evtchn xen-gntdev xen-privcmd xenfs virtio_pci virtio_blk loop; do modprobe "$module"; done
modprobe xen-gntalloc limit=65536  # pages; 1024 are fewer than one of the tests asks for
mount -t xenfs xenfs /proc/xen
ip link set lo up 2>/dev/null || busybox ifconfig lo 127.0.0.1 up
xen=/usr/lib/xen-4.17/bin
xenstored --pid-file /run/xenstored.pid || "$xen/xenstored" --pid-file /run/xenstored.pid
"$xen/xen-init-dom0"
xenconsoled --log=all --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid ||
  "$xen/xenconsoled" --log=all --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid
cat /guest/base.cpio /guest/init.cpio >/guest/initrd
cd /xenbus
. /job
eval "set -- $ARGS"
echo "== dom0 is up after $(cut -d' ' -f1 /proc/uptime) s"
if [ "$MODE" = shell ]; then
  export TERM=linux
  busybox setsid busybox cttyhack bash
else
  case "$MODE" in
    bench) set -- bench.xen --results /results "$@" ;;
    *) set -- pytest -vv -p no:cacheprovider --junitxml=/results/junit.xml "$@" ;;
  esac
  timeout -s INT -k 20 "$SECONDS_MOST" python3 -u -m "$@"
  echo $? >/results/exit
  pidof xenstored >/dev/null || echo "== xenstored has died"
  timeout -k 1 20 xenstore-ls -f -p >/results/store.txt 2>&1
  timeout -k 1 20 xl list -v >/results/domains.txt 2>&1
  timeout -k 1 20 xl dmesg >/results/xen.log 2>&1
  dmesg >/results/dom0.log
  mkdir -p /results/consoles
  cp -r /var/log/xen/. /results/consoles/
  echo "== tests ended after $(cut -d' ' -f1 /proc/uptime) s"
  tar -C /results -cf /dev/vda . && sync
fi
echo "== off"
sync
echo o >/proc/sysrq-trigger
sleep 60
