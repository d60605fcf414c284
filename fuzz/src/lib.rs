//! What strangers may send pavo's readers: every reader of what a user, a guest, an image or
//! another process wrote, as a function of bytes that must not panic, hang or break a promise.
//!
//! `tests/short.rs` gives each some thousand mutations of its first inputs in every test run,
//! with any compiler; `make fuzz` lets libFuzzer look for as long as one likes.

mod controllers;
mod guests;
mod people;
mod processes;

use std::time::Duration;

use tokio::time::timeout;

/// A reader that is fuzzed.
#[derive(Debug)]
pub struct Target {
    pub name: &'static str,
    /// Reads one input, and says whether it was taken for what it should be. It panics where
    /// the reader does, or where a promise is broken.
    pub read: fn(&[u8]) -> bool,
    /// Inputs that get far, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "config", read: people::config, seeds: people::config_seeds },
    Target { name: "cluster", read: people::cluster, seeds: people::cluster_seeds },
    Target { name: "sets", read: people::sets, seeds: people::sets_seeds },
    Target { name: "nodeset", read: people::nodeset, seeds: people::nodeset_seeds },
    Target { name: "inventory", read: people::inventory, seeds: people::inventory_seeds },
    Target { name: "user_data", read: people::user_data, seeds: people::user_data_seeds },
    Target { name: "image", read: guests::image, seeds: guests::image_seeds },
    Target { name: "dhcp", read: guests::dhcp, seeds: guests::dhcp_seeds },
    Target { name: "dhcp6", read: guests::dhcp6, seeds: guests::dhcp6_seeds },
    Target { name: "dns", read: guests::dns, seeds: guests::dns_seeds },
    Target { name: "guest_agent", read: guests::qemu_agent, seeds: guests::qemu_agent_seeds },
    Target { name: "agent_line", read: guests::line, seeds: guests::line_seeds },
    Target { name: "pcocc_agent", read: guests::pcocc, seeds: guests::pcocc_seeds },
    Target { name: "copy", read: guests::copy, seeds: guests::copy_seeds },
    Target { name: "qmp", read: processes::qmp, seeds: processes::qmp_seeds },
    Target { name: "ask", read: processes::ask, seeds: processes::ask_seeds },
    Target { name: "messages", read: processes::messages, seeds: processes::messages_seeds },
    Target { name: "ipmi", read: controllers::ipmi, seeds: controllers::ipmi_seeds },
    Target { name: "redfish", read: controllers::redfish, seeds: controllers::redfish_seeds },
];

/// Reads one input with the target of that name.
///
/// # Panics
/// When there is no such target, and where the reader breaks.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    let _ = (target.unwrap_or_else(|| panic!("there is no target `{name}`")).read)(data);
}

/// Lets a future run to its end on this thread.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// A connection to one who says a line at once and another for each that it hears, or when it
/// has heard nothing for a moment, and hangs up after the last.
async fn said(data: &[u8]) -> tokio::net::UnixStream {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    const MOMENT: Duration = Duration::from_millis(1);
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let data = data.to_vec();
    tokio::spawn(async move {
        let (reader, mut writer) = theirs.into_split();
        let mut reader = BufReader::new(reader);
        let mut heard = Vec::new();
        for line in data.split_inclusive(|byte| *byte == b'\n') {
            // Whoever listens may have heard enough.
            if writer.write_all(line).await.is_err() {
                return;
            }
            let _ = timeout(MOMENT, reader.read_until(b'\n', &mut heard)).await;
        }
        drop(writer);
        let _ = reader.read_to_end(&mut heard).await;
    });
    ours
}
