#!/bin/busybox sh
# First program of the outer machine: makes the host's root its own, with a layer of memory over
# it that takes whatever is written, and goes on as agent.sh.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
    insmod "/modules/$module.ko" || echo "nested: no module $module"
done </modules/order
# Guests' RAM is in memfds, and each fault in a nested page table costs an emulated exit and entry.
echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled

mount -t tmpfs -o size=75% layer /layer
mkdir /layer/lower /layer/upper /layer/work /layer/root
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /layer/lower
mount -t overlay -o lowerdir=/fast:/layer/lower,upperdir=/layer/upper,workdir=/layer/work \
    overlay /layer/root
cd /layer/root || exit
mount --move /dev dev
mount --move /proc proc
mount --move /sys sys
mkdir -p dev/pts dev/shm dev/net
mount -t devpts -o ptmxmode=666 pts dev/pts
mount -t tmpfs shm dev/shm
mount -t tmpfs run run
ln -s /proc/self/fd dev/fd
ip link set lo up
hostname nested
mkdir run/nested
cp /bin/busybox /agent.sh /hold.py run/nested
# What switch_root does but for removing the files of the first root, of which /fast is in use.
mount --move . /
exec chroot . /run/nested/busybox sh /run/nested/agent.sh
