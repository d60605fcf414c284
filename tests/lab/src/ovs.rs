//! Open vSwitch on a host, with the userspace datapath: it needs no kernel module.
//!
//! Tunnels of that datapath leave only through an address on a bridge of its own, so
//! `br-phy` takes over `eth1` and its address. What is tunnelled is others' business.

use crate::error::{Error, Result};
use crate::host::Host;
use crate::service::Daemon;

/// Kept over a restart, as on a real host.
const DATABASE: &str = "/var/lib/openvswitch/conf.db";

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

pub(crate) fn start(host: &Host) -> Result<()> {
    let address = host.underlay().ok_or_else(|| Error::new("no network for tunnels"))?;
    let remote = "--remote=punix:/run/openvswitch/db.sock";
    let pidfile = "--pidfile=/run/openvswitch/ovsdb-server.pid";
    let quiet = "-vconsole:warn";
    let mut database =
        Daemon::new("ovsdb-server", &["ovsdb-server", DATABASE, remote, pidfile, quiet]);
    database.before = format!(
        "rm -f /run/openvswitch/db.sock
         test -e {DATABASE} || ovsdb-tool create {DATABASE} {SCHEMA}"
    );
    database.ready = "test -S /run/openvswitch/db.sock".into();
    database.after = "ovs-vsctl --no-wait init".into();
    host.install(database)?;

    let pidfile = "--pidfile=/run/openvswitch/ovs-vswitchd.pid";
    let mut switch = Daemon::new("ovs-vswitchd", &["ovs-vswitchd", pidfile, quiet]);
    // A bridge that the database knows from before the restart comes a little later.
    // Sums of packets from the kernel's side would not be there: TCP would hang.
    switch.after = format!(
        "ovs-vsctl --may-exist add-br br-phy -- set bridge br-phy datapath_type=netdev \
             -- --may-exist add-port br-phy eth1 -- set interface br-phy mtu_request=1600
         until ip link show br-phy >/dev/null 2>&1; do sleep 0.02; done
         ip addr flush dev eth1
         ip addr replace {address}/24 dev br-phy
         ip link set br-phy up
         ethtool -K br-phy tx off >/dev/null"
    );
    host.install(switch)
}
