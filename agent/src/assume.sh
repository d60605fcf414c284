# What the programs of a distribution have to do in a guest that goes on from another's memory:
# its arguments are its interfaces. Where there is no such program, there is nothing to do.
[ -d /run/systemd/system ] || exit 0
runs() { systemctl --quiet is-active "$1"; }

# A running kernel still takes the other's address for the one that the hardware has.
for file in /run/systemd/network/*.network; do
	[ -e "$file" ] && sed -i 's/^PermanentMACAddress=/MACAddress=/' "$file"
done
if runs systemd-networkd; then
	networkctl reload
	for name; do networkctl reconfigure "$name"; done
elif runs NetworkManager; then
	nmcli connection reload
	for name; do nmcli device connect "$name"; done
elif command -v ifup >/dev/null; then
	for name; do
		ifdown --force "$name"
		ifup "$name"
	done
fi 2>/dev/null

for unit in ssh sshd dropbear; do
	runs $unit && systemctl --quiet --no-block restart $unit
done
exit 0
