#!/bin/bash
# as a user: a namespace of his own with very many mounts
# shellcheck disable=SC2016  # for the inner shell to expand
exec unshare -Urm --propagation private bash -c '
mount -t tmpfs a /mnt; mkdir /mnt/d; cd /mnt/d
for i in $(seq 1 14); do mkdir /mnt/$i; mount --rbind /mnt /mnt/$i 2>/dev/null || break; done
wc -l < /proc/self/mountinfo; exec sleep infinity'
