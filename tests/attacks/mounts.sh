#!/bin/bash
# Run by a user: makes a private mount namespace with very many mounts, and prints their number.
# shellcheck disable=SC2016  # the inner shell expands it
exec unshare -Urm --propagation private bash -c '
mount -t tmpfs a /mnt; mkdir /mnt/d; cd /mnt/d
for i in $(seq 1 14); do mkdir /mnt/$i; mount --rbind /mnt /mnt/$i 2>/dev/null || break; done
wc -l < /proc/self/mountinfo; exec sleep infinity'
