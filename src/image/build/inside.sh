#!/bin/sh
# Runs as root of a mount and PID namespace of its own; the tree lies in memory, so that
# nothing of it outlives this script, whoever kills it.
#
#   inside.sh build             all of it: the root file system comes out, in $BUILD/disk.raw
#   inside.sh setup|early|late ROOT   called by mmdebstrap on the way
#
# $BUILD holds what is wanted: sources, packages, dpkg (one line each), steps/early-*,
# steps/late-*: scripts for the shell of the new system, a first line `# what is done`.
# Lines that begin with `pavo-step: ` are shown to the user, all others if it fails.
set -eu
umask 022

say() {
  echo "pavo-step: $*"
}

# Runs steps in the new system, in order.
steps() {
  for step in "$BUILD/steps/$2"-*; do
    [ -e "$step" ] || continue
    say "$(sed -n '1s/^# //p' "$step")"
    # What an earlier step may have put there is not followed.
    rm -rf "$1/.pavo-step"
    cp "$step" "$1/.pavo-step"
    chroot "$1" /bin/sh -eu /.pavo-step </dev/null
    rm "$1/.pavo-step"
  done
}

build() {
  tree=$BUILD/tree
  mkdir "$tree"
  mount -t tmpfs -o "size=$SIZE,mode=755" tree "$tree"
  mkdir "$tree/tmp" "$tree/root"
  export TMPDIR="$tree/tmp"
  say "Downloading packages of $SUITE"
  mmdebstrap --verbose --mode=root --variant=minbase --format=directory \
    --skip=check/empty,download/empty,essential/unlink,cleanup/apt/cache \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Retries "3"' \
    --dpkgopt="$BUILD/dpkg" --include="$(paste -sd, "$BUILD/packages")" \
    --setup-hook='sh "$BUILD/inside.sh" setup "$1"' \
    --extract-hook='echo "pavo-step: Setting the base system up"' \
    --essential-hook='sh "$BUILD/inside.sh" early "$1"' \
    --customize-hook='sh "$BUILD/inside.sh" late "$1"' \
    "$SUITE" "$tree/root" "$BUILD/sources"
  finish "$tree/root"
  say "Writing the file system"
  MKE2FS_CONFIG=$BUILD/mke2fs.conf mke2fs -q -F -t ext4 -L root -U "$ROOT_UUID" \
    -d "$tree/root" -E "hash_seed=$ROOT_UUID,root_owner=0:0,lazy_itable_init=1,nodiscard,offset=$OFFSET" \
    "$BUILD/disk.raw" "$ROOT_KIB"k
}

# What no image may hold, since VMs are made of it. In the new system: where its links lead
# to is in it.
finish() {
  chroot "$1" /bin/sh -eu <<'INSIDE'
  : >/etc/machine-id
  rm -f /etc/hostname /etc/ssh/ssh_host_* /etc/apt/apt.conf.d/99mmdebstrap \
    /var/lib/dbus/machine-id /var/lib/systemd/random-seed
  # It holds time stamps, and is made again when it is missing.
  rm -f /var/cache/ldconfig/aux-cache /var/log/*.log /var/log/apt/*
  if [ -e /lib/systemd/systemd-resolved ]; then
    # Programs ask the cluster's responder. The stub would answer the guest's own name by
    # itself: with its link-local address, and without its domain.
    ln -sf ../run/systemd/resolve/resolv.conf /etc/resolv.conf
  fi
INSIDE
  if [ -n "${SOURCE_DATE_EPOCH:-}" ]; then
    find "$1" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +
  fi
}

case $1 in
build) build ;;
setup)
  # Downloaded once: the next image finds them here.
  mkdir -p "$2/var/cache/apt/archives"
  mount --bind "$CACHE" "$2/var/cache/apt/archives"
  ;;
early)
  steps "$2" early
  say "Installing $(wc -l <"$BUILD/packages") packages and what they need"
  ;;
late)
  umount "$2/var/cache/apt/archives"
  steps "$2" late
  ;;
esac
