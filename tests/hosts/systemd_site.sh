# Be a small machine that systemd runs, in mount and pid namespaces of its own: systemd_site.sh user|system FOLDER
set -e
folder=$2
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/systemd/journal /run/log/journal /run/user/0
chmod 700 /run/user/0
mount -t tmpfs tmpfs /var/lib/systemd
mkdir /var/lib/systemd/linger
touch /var/lib/systemd/linger/root
mkdir -p "$folder/config"
if [ "$1" = user ]; then
  /lib/systemd/systemd-journald >"$folder/journald.log" 2>&1 &
  export XDG_RUNTIME_DIR=/run/user/0 XDG_CONFIG_HOME="$folder/config"
  # Not as the first process: that would have to be the system's.
  /lib/systemd/systemd --user --log-target=console >"$folder/systemd.log" 2>&1
  exit
fi
# Only what our units ask for: none of the machine's own services is started.
cp /lib/systemd/system/systemd-journald*.s* "$folder/config"
mount -t tmpfs tmpfs /etc/systemd/system
mount -t tmpfs tmpfs /etc/init.d
mount -t tmpfs tmpfs /lib/systemd/system
cp "$folder"/config/* /lib/systemd/system
for unit in sysinit basic network-online time-sync multi-user sockets shutdown umount local-fs network; do
  printf '[Unit]\nDefaultDependencies=no\n' >/lib/systemd/system/$unit.target
done
printf 'Wants=systemd-journald.service\nAfter=systemd-journald.service\n' >>/lib/systemd/system/sysinit.target
# Its own tree of groups, which systemd must be able to write.
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/unified /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
touch /run/console
mount --bind /run/console /dev/console
exec env container=unshare /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=no \
  >"$folder/systemd.log" 2>&1
