//! The networks between the hosts: a switch in a network namespace of its own.
//!
//! ```text
//!   eth0 of every host ── p<port> ─ br0   10.99.0.0/24, Slurm and the store
//!   eth1 of n1…        ── u<port> ─ br1   10.98.0.0/24, MTU 1600, what tunnels run on
//! ```
//!
//! The switch is not a host: it lives on when any host dies, and another lab's switch
//! is in another namespace, so labs use the same addresses.

use std::io::Write;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, Result};
use crate::keeper::Keeper;

#[derive(Debug)]
pub(crate) struct Wire {
    switch: Keeper,
}

/// A host's place on the networks: its port, which is the last byte of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub number: u8,
    /// Whether it is on the second network, too.
    pub underlay: bool,
}

impl Port {
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, self.number)
    }

    pub fn underlay_address(self) -> Option<Ipv4Addr> {
        self.underlay.then(|| Ipv4Addr::new(10, 98, 0, self.number))
    }
}

impl Wire {
    pub fn start(keepers: &Path) -> Result<Self> {
        let switch = Keeper::start(&keepers.join("switch"))?;
        // A bridge without timers: ports forward at once.
        batch(
            switch.command(None, &["ip", "-batch", "-"])?,
            "link set lo up
             link add br0 type bridge forward_delay 0 mcast_snooping 0
             link set br0 up
             link add br1 mtu 1600 type bridge forward_delay 0 mcast_snooping 0
             link set br1 up",
        )?;
        Ok(Self { switch })
    }

    /// Takes the links of a host that is gone: the kernel does so in its own time.
    pub fn unplug(&self, port: Port) {
        let _ = self.on_switch(&format!("link del p{}", port.number));
        if port.underlay {
            let _ = self.on_switch(&format!("link del u{}", port.number));
        }
    }

    /// Wires a host that has just booted.
    pub fn plug(&self, port: Port, host: &Keeper) -> Result<()> {
        let Port { number, underlay } = port;
        let (switch_pid, pid) = (self.switch.pid(), host.pid());
        // The same cards after a reboot: neighbours remember.
        let veth = |name, mtu, peer, card| {
            format!(
                "link add name {name}{number} mtu {mtu} netns {switch_pid} type veth \
                 peer name {peer} address 02:00:00:00:{card:02x}:{number:02x} mtu {mtu} netns {pid}\n"
            )
        };
        let mut pairs = veth("p", 1500, "eth0", 0);
        let mut inside = format!(
            "link set lo up
             addr add {}/24 dev eth0
             link set eth0 up
             route add default via 10.99.0.254\n",
            port.address()
        );
        let mut ports = format!("link set p{number} master br0 up\n");
        if let Some(address) = port.underlay_address().filter(|_| underlay) {
            pairs += &veth("u", 1600, "eth1", 1);
            inside += &format!("addr add {address}/24 dev eth1\nlink set eth1 up\n");
            ports += &format!("link set u{number} master br1 up\n");
        }
        let mut here = Command::new("ip");
        here.args(["-batch", "-"]);
        batch(here, &pairs)?;
        self.on_switch(&ports)?;
        batch(host.command(None, &["ip", "-batch", "-"])?, &inside)
    }

    /// Nothing reaches the host any more and nothing leaves it; its links stay up.
    pub fn cut(&self, port: Port) -> Result<()> {
        self.each_port(port, |link, _| format!("link set {link} nomaster\n"))
    }

    pub fn mend(&self, port: Port) -> Result<()> {
        self.each_port(port, |link, bridge| format!("link set {link} master {bridge}\n"))
    }

    fn each_port(&self, port: Port, line: impl Fn(String, &str) -> String) -> Result<()> {
        let mut text = line(format!("p{}", port.number), "br0");
        if port.underlay {
            text += &line(format!("u{}", port.number), "br1");
        }
        self.on_switch(&text)
    }

    fn on_switch(&self, text: &str) -> Result<()> {
        batch(self.switch.command(None, &["ip", "-batch", "-"])?, text)
    }
}

/// Runs `ip` over the lines of `text`.
fn batch(mut ip: Command, text: &str) -> Result<()> {
    ip.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = ip.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        for line in text.lines() {
            writeln!(stdin, "{}", line.trim())?;
        }
    }
    let done = child.wait_with_output()?;
    if done.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(Error::new(format!("ip: {why}\nof:\n{text}")))
}
